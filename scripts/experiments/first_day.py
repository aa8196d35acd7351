"""New items on their first day, scored by their texts: against a model with IDs only, and after a night of training.

    python scripts/experiments/first_day.py --output runs/first-day --seeds 0

Two models are trained by nightly increments on the days of the shop of `shop.py`, as in `fortnight.py`. `text` reads
title embeddings of all-MiniLM-L6-v2 (frozen, whitened); `ids` has no texts. Both have item IDs (some of them are
replaced by the unknown id in training) and users' countries, and no item features. On each day the model of the night
before is scored on the exposures of

    first     the day's new items, on which no model was trained: the result of adding an item during the day
    second    the new items of the day before, after one night of training: the result of waiting until the night
    others    all other items

AUC is computed within each kind, over all days. Recall@20 is computed for the clicked items of the kinds first and
second; the complete catalogue is ranked for the user at the second of the click. (If new items were added only in the
night, they could not be recommended on their first day, and their Recall would be 0.) Results are written to
OUTPUT/seed-N/MODEL, so that the script can be stopped and started again, and all of them to OUTPUT/first_day.json.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fortnight import COMMON, FIRST, Fortnight, shop_periods
from jobs import experiment_parser

from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.quickstart_files import fetch_minilm
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.split import Split
from hllm_torchrec.data.visibility import visible_before
from hllm_torchrec.distributed.process_group import distributed_device
from hllm_torchrec.evaluation.run_loader import load_run, run_config
from hllm_torchrec.evaluation.scoring import score_split
from hllm_torchrec.metrics.auc import delong_interval
from hllm_torchrec.serving.scorer import Scorer, UserHistory

DAYS, TOP = 7, 20
KINDS = ("first", "second", "others")
MODELS = ("text", "ids")
DATA = {"user_features": ["country"], "max_history": 64, "batch_users": 32, "cold_dropout": 0.2}


def settings(model: str, encoder: Path) -> dict[str, Any]:
    """The configuration of a model."""
    text = {
        "pretrained": str(encoder),
        "pooling": "mean",
        "trainable": False,
        "whiten": True,
        "text_keys": ["title"],
        "max_text_length": 24,
    }
    stages = [{"name": "all", "epochs": 12, "item_embeddings": "cached"}]
    return COMMON | {"data": DATA} | ({"item_llm": text, "stages": stages} if model == "text" else {})


class FirstDays(Fortnight):
    """The nights of one model of one seed."""

    def run(self) -> None:
        """Run all nights; those that are complete are skipped."""
        first = self.periods[0]
        split = Split("date", train_until=first.cut, valid_until=int(first.seconds[-1]))
        prepare(table(first.mapping), self.data, split=split)
        self.train(0, "nightly", {})
        for number, period in enumerate(self.periods[1:], start=1):
            split = Split("date", train_until=self.periods[number - 1].cut, valid_until=period.start)
            append_events(table(period.mapping), self.data, split=split)
            if number > 1:  # in the first night the training part has no events that the first model was not trained on
                before = self.path(0 if number == 2 else number - 1, "nightly")
                self.train(number, "nightly", self.increment(number, before))
                self.score(number, "nightly", self.path(number, "nightly"))

    def increment(self, number: int, chain: Path) -> dict[str, Any]:
        """Options of a night's increment, which reads item embeddings as the first training does."""
        stages = [
            {**stage, "epochs": 1} for stage in yaml.safe_load((self.folder / "common.yaml").read_text())["stages"]
        ]
        return super().increment(number, chain) | {"stages": stages}

    def score(self, number: int, arm: str, run: Path) -> None:
        """Score a model on a day's exposures, and rank the catalogue for clicks on new items; skip if complete."""
        target = self.folder / f"day-{number:02d}.json"
        if target.is_file():
            return
        loaded = load_run(run, "best", self.device, run_config(run, self.data))
        experiment = loaded.experiment
        loader = experiment.loader("test", experiment.config.evaluation.batch_users)
        with loaded.weights, experiment.evaluation_items():
            columns = score_split(experiment, loader)
        bounds = [Dataset.open(self.data, version).num_items for version in (number - 1, number)]
        kind = np.array(KINDS)[::-1][np.searchsorted(bounds, columns["item_id"], side="right")]
        with loaded.weights:
            ranks = list(self._ranks(Scorer(experiment), columns, kind))
        facts = {name: columns[name].tolist() for name in ("label", "score")}
        replace_file(target, json.dumps({"kind": kind.tolist(), "ranks": ranks, **facts}) + "\n")

    def _ranks(self, scorer: Scorer, columns: dict[str, np.ndarray], kind: np.ndarray) -> Iterator[tuple[str, float]]:
        """Yield kind and rank (from 1) among all items of each clicked item that is new today or was new yesterday."""
        dataset = scorer.experiment.dataset
        items = np.arange(1, dataset.num_items)
        for row in np.flatnonzero((columns["label"] == 1) & (kind != "others")):
            user, second = int(columns["user_id"][row]), int(columns["timestamp"][row])
            events = dataset.user_events(user)
            seen = events[: int(visible_before(events.timestamps, second))]
            scores = scorer.score(scorer.read(UserHistory(user, **seen.columns)), items, second)
            own = scores[columns["item_id"][row] - 1]
            yield str(kind[row]), float(1 + (scores > own).sum() + ((scores == own).sum() - 1) / 2)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """AUC with its interval, Recall and numbers of exposures and clicks of each kind, over all days."""
    label, score, kind = (np.concatenate([row[name] for row in rows]) for name in ("label", "score", "kind"))
    ranks = [rank for row in rows for rank in row["ranks"]]
    found: dict[str, Any] = {}
    for name in KINDS:
        own = kind == name
        auc = delong_interval(label[own], score[own])
        bounds = [round(auc.low, 4), round(auc.high, 4)]
        found[name] = {"auc": round(auc.auc, 4), "interval": bounds, "exposures": int(own.sum())}
        hits = [rank <= TOP for of, rank in ranks if of == name]
        if hits:
            found[name] |= {f"recall@{TOP}": round(float(np.mean(hits)), 4), "clicks": len(hits)}
    return found


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = experiment_parser(__doc__, "first-day", seeds=[0])
    parser.add_argument("--days", type=int, default=DAYS, help=f"days to score (default: {DAYS})")
    parser.add_argument("--encoder", type=Path, help="folder with all-MiniLM-L6-v2, or with another encoder")
    parser.add_argument("--tiny", action="store_true", help="a tiny shop, for tests")
    return parser.parse_args()


def main() -> None:
    """Run both models of all seeds, and write the results of all."""
    options, found = arguments(), {}
    sizes = {"days": FIRST + 1 + options.days}
    if options.tiny:
        sizes |= {"first_items": 30, "daily_items": 4, "first_users": 40, "daily_users": 3, "active": 20}
    encoder = fetch_minilm(local=options.encoder)
    with distributed_device() as device:
        for seed in options.seeds:
            folder = options.output.absolute() / f"seed-{seed}"
            periods = shop_periods(folder / "files", seed, sizes)
            for model in MODELS:
                one = FirstDays(folder / model, "shop", seed, periods, device)
                (folder / model / "common.yaml").write_text(yaml.safe_dump(settings(model, encoder)))
                one.run()
                days = [json.loads(file.read_text()) for file in sorted((folder / model).glob("day-*.json"))]
                found[f"{model}-{seed}"] = summary(days)
                print(json.dumps({"seed": seed, "model": model, **summary(days)}), flush=True)
    result = {"bench": "first_day", "sizes": sizes, "torch": torch.__version__, "results": found}
    (options.output / "first_day.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
