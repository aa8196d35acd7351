"""The retrieval task of `benchmark.py`: models tuned on half of the users of each dataset, tested with three seeds.

    python scripts/experiments/benchmark_retrieval.py --sets data/steam data/office --output runs/benchmark

A set is a directory written by `hllm prepare --split leave_one_out`. Every model has at most four settings ("trials",
`MODELS`: options that differ from configs/recipes/retrieval.yaml). Each trial is trained on half of the users, and the
one with the best validation NDCG@10 is trained on all users with every seed; its test targets are ranked once. The
models with text have one setting and no trials: `text_id` is the unchanged recipe, `text` the recipe without item IDs.
The Markov chain and EASE tune their settings on the validation part; popularity has none. Every job has a separate
directory, so the script can be stopped and started again; with --done it runs no jobs.

Writes OUTPUT/retrieval.json: for each set, metrics with 95% intervals over users, differences of NDCG@10 from the
references, the trials, and Recall@10 by the item's number of training events, and for the users whose last two events
have different timestamps; prints the tables of docs/results.md.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from benchmark_ranking import COUNTS
from jobs import ROOT, experiment_parser, run_job
from retrieval_table import BASELINES, as_json

from hllm_torchrec.common.run_log import read_log
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.evaluation.retrieval_comparison import compare_models, markdown, markdown_of_differences

RECIPE = ROOT / "configs" / "recipes" / "retrieval.yaml"
METRICS = ("recall@10", "ndcg@10", "recall@50", "ndcg@50")
CHOSEN_BY = "ndcg@10"
HALF = "--data.train_users=0.5"
IDS = (
    *("--item_llm.enabled=false", "--objective.text_similarity=0", "--objective.transitions=0"),
    *("--stages=[{name: ids, epochs: 60}]", "--evaluation.patience=6"),
)
"""Options of the models over IDs. These learn more slowly than the models with texts, so they get more epochs and twice
the recipe's patience."""


def _shape(**fields: Any) -> str:
    return f"--user.shape={json.dumps(fields)}"


def _sasrec(dropout: float, *more: str, width: int = 64) -> tuple[str, ...]:
    shape = _shape(width=width, layers=2, heads=1, max_positions=200, dropout=dropout)
    return (*IDS, "--user.encoder=sasrec", shape, f"--user.dropout={dropout}", *more)


def _hstu(dropout: float, *more: str, width: int = 64) -> tuple[str, ...]:
    shape = _shape(
        preset="research", width=width, layers=2, heads=1, max_positions=200, divide_by="length", time_of="next",
        dropout=dropout,
    )  # fmt: skip
    return (*IDS, "--user.encoder=hstu", shape, f"--user.dropout={dropout}", *more)


SLOW = ("--optim.lr=1.0e-3", "--optim.table_lr=0.05")
MODELS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sasrec": (_sasrec(0.5), _sasrec(0.2), _sasrec(0.5, *SLOW), _sasrec(0.5, width=128)),
    "hstu": (_hstu(0.5), _hstu(0.2), _hstu(0.5, *SLOW), _hstu(0.5, width=128)),
    "text": (("--features.item_id=false",),),
    "text_id": ((),),
}
"""Model -> settings to try: the options that differ from the recipe."""


@dataclass(frozen=True)
class Place:
    """A dataset and the folder of its runs."""

    dataset: Path
    folder: Path

    def run(self, model: str, kind: str) -> Path:
        """Directory of a run: `trial-N` or `seed-N` of a model."""
        return self.folder / model / kind


def train(place: Place, run: Path, options: Sequence[str], seed: int, *, test: bool) -> None:
    """Train a run, unless it is complete; test: also rank its test targets."""
    done = run / ("metrics.json" if test else "trained")
    arguments = ["--config", str(RECIPE), "--data.dataset", str(place.dataset), "--output", str(run)]
    log = run.with_suffix(".log")
    run_job("train", [*arguments, "--seed", str(seed), "--resume", "true", *options], log, done)
    if test:
        run_job("evaluate", ["--run", str(run), "--split", "test"], log, done)
    else:
        done.touch()


def validation(run: Path) -> dict[str, float]:
    """The best evaluation of a run on the validation part: step, NDCG@10, Recall@10."""
    lines = [line for line in read_log(run) if line["event"] == "eval" and line.get(CHOSEN_BY) is not None]
    best = max(lines, key=lambda line: line[CHOSEN_BY])
    return {"step": best["step"], CHOSEN_BY: best[CHOSEN_BY], "recall@10": best["recall@10"]}


def choose(place: Place, model: str, *, done: bool) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Options of a model's best trial, and the results of all its trials; a model with one setting has no trials."""
    options = MODELS[model]
    if len(options) == 1:
        return options[0], []
    trials = []
    for number, one in enumerate(options):
        run = place.run(model, f"trial-{number}")
        if not done:
            train(place, run, [*one, HALF], 0, test=False)
        if (run / "trained").exists():
            trials.append({"options": list(one), **validation(run)})
    best = max(trials, key=lambda trial: trial[CHOSEN_BY]) if trials else {"options": list(options[0])}
    return tuple(best["options"]), trials


def run_set(place: Place, models: Sequence[str], seeds: Sequence[int], *, done: bool) -> dict[str, Any]:
    """Run a set; return the trials of each model, and model -> directories of the test targets' ranks."""
    ranks = {name: [place.folder / name / "retrieval" / "test"] for name in BASELINES}
    if not done and not all(paths[0].is_dir() for paths in ranks.values()):
        run_job("retrieval", ["--dataset", str(place.dataset), "--output", str(place.folder)], place.folder / "b.log")
    trials = {}
    for model in models:
        options, trials[model] = choose(place, model, done=done)
        for seed in seeds:
            if not done:
                train(place, place.run(model, f"seed-{seed}"), options, seed, test=True)
        ranks[model] = [place.run(model, f"seed-{seed}") / "retrieval" / "test" for seed in seeds]
    found = {name: [path for path in paths if path.is_dir()] for name, paths in ranks.items()}
    return {"trials": trials, "ranks": {name: paths for name, paths in found.items() if paths}}


def tie_at_the_end(dataset: Dataset) -> np.ndarray:
    """Ids of the users whose last two events are in one second, so that the file's order decides on the target."""
    if not dataset.manifest.get("has_timestamps", True):
        return np.empty(0, np.int64)
    rows = dataset.sequences(dataset.row_groups("test"), ["user_id", "timestamps"])
    last = rows.offsets[1:] - 1
    return rows.user_ids[(np.diff(rows.offsets) > 1) & (rows.timestamps[last] == rows.timestamps[last - 1])]


def by_group(dataset: Dataset, paths: Sequence[Path]) -> dict[str, dict[str, float | int | None]]:
    """Recall@10 and NDCG@10, mean over seeds, by the number of training events of the target's item, and for users
    without a tie at the end."""
    tables = [pq.read_table(path, columns=["user_id", "item_id", "rank"]) for path in paths]
    users, items, rank = (
        np.concatenate([table[name].to_numpy() for table in tables]) for name in ("user_id", "item_id", "rank")
    )
    counts = dataset.training_item_counts()[items]
    groups = {f"items with {name} training events": (counts >= a) & (counts <= b) for name, (a, b) in COUNTS.items()}
    groups["users without a tie at the end"] = ~np.isin(users, tie_at_the_end(dataset))
    return {name: _figures(rank[rows], len(paths)) for name, rows in groups.items()}


def _figures(rank: np.ndarray, seeds: int) -> dict[str, float | int | None]:
    hit = rank <= 10
    if not rank.size:
        return {"targets": 0, "recall@10": None, "ndcg@10": None}
    gain = float((hit / np.log2(rank + 1.0)).mean())
    return {"targets": rank.size // seeds, "recall@10": float(hit.mean()), "ndcg@10": gain}


def tabulate(place: Place, found: dict[str, Any], references: Sequence[str]) -> tuple[dict[str, Any], str]:
    """JSON and Markdown of a set whose ranks were `found`."""
    ranks, dataset = found["ranks"], Dataset.open(place.dataset)
    results = {name: compare_models(ranks, METRICS, name) for name in references if name in ranks}
    first = next(iter(results.values())) if results else compare_models(ranks, METRICS)
    content = {
        "trials": found["trials"],
        "seeds": {name: len(paths) for name, paths in ranks.items()},
        "models": {name: as_json(row["value"]) for name, row in first.items()},
        "minus": {ref: {n: as_json(row["difference"]) for n, row in rows.items()} for ref, rows in results.items()},
        "groups": {name: by_group(dataset, paths) for name, paths in ranks.items()},
    }
    text = (
        f"### {dataset.name}\n\n{markdown(first)}\n\n{markdown_of_differences(results, CHOSEN_BY) if results else ''}"
    )
    return content, text


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, set by set; write the JSON after each, and print the tables."""
    parser = experiment_parser(__doc__, "benchmark", seeds=[0, 1, 2])
    parser.add_argument("--sets", nargs="+", type=Path, required=True, help="directories of leave-one-out datasets")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--references", nargs="+", default=["sasrec", "hstu"], help="models that all are compared with")
    parser.add_argument("--done", action="store_true", help="run nothing, tabulate what is complete")
    options = parser.parse_args(arguments)
    output, report = options.output.absolute(), {}
    for path in options.sets:
        place = Place(path.absolute(), output / path.name)
        found = run_set(place, options.only, options.seeds, done=options.done)
        if found["ranks"]:
            report[path.name], text = tabulate(place, found, options.references)
            (output / "retrieval.json").write_text(json.dumps(report, indent=1))
            print(text, end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
