"""Two weeks of nightly training: AUC of each day for a stale model, a nightly increment, and training from scratch.

    python scripts/experiments/fortnight.py --output runs/fortnight --seeds 0 1 2
    python scripts/experiments/fortnight.py --output runs/weeks --mapping ml-100k/table.yaml --seeds 0 1 2

Without --mapping the data are the shop of `shop.py` (periods of a day, after a week); with it they are the last
fourteen weeks of a table source. The events of each period are appended as a new version, and these models are scored
on all exposures of the period:

    stale     the nightly model that was trained one night earlier, without events of the previous period
    nightly   one more epoch over the events that were added since, starting from stale with its optimizer state
    scratch   trained on all events, to its best validation epoch
    frozen    the first model, without further training

The models nightly and scratch use training events until the same time in the previous period; the rest of that period
is the validation part. Costs are CPU seconds of training (`build_trainer` and `run`) and samples, i.e. exposures times
epochs. Results are written to OUTPUT/seed-N/results.jsonl, so that the script can be stopped and started again, and all
of them to OUTPUT/fortnight.json.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import shop
import torch
import yaml
from jobs import experiment_parser

from hllm_torchrec.common.run_log import read_log
from hllm_torchrec.config.loading import load_config
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.split import Split
from hllm_torchrec.distributed.process_group import distributed_device
from hllm_torchrec.evaluation.run_loader import load_run, run_config
from hllm_torchrec.evaluation.scoring import quick_metrics, score_split
from hllm_torchrec.training.trainer_setup import build_trainer

FIRST, PERIODS = 6, 14
"""Number of days of the shop on which the first model is trained, and number of periods that are scored. One period
lies between them, on which the first night is trained."""
HELD = 0.2
"""Share of a period's events that is the validation part: the last events."""
ARMS = ("stale", "nightly", "scratch", "frozen")

COMMON: dict[str, Any] = {
    "item_llm": {"enabled": False},
    "user": {"encoder": "sasrec", "shape": {"width": 32, "layers": 1, "heads": 2, "max_positions": 64, "dropout": 0.1}},
    "features": {"time_depth": 0, "init_scale": 0.05, "shard_from_rows": 64},
    "objective": {"fusion": "early", "head_hidden": 32},
    "optim": {"lr": 2.0e-3, "table_lr": 0.02, "weight_decay": 0.05, "ema": 0.0},
    "evaluation": {"batch_users": 64, "patience": 2, "keep_last": 1},
    "stages": [{"name": "all", "epochs": 12}],
}
WORLDS: dict[str, dict[str, Any]] = {
    "shop": {"data": {"item_features": ["genres"], "user_features": ["country"], "max_history": 64, "batch_users": 32}},
    "table": {
        "data": {
            "item_features": ["genres"],
            "numeric_features": ["history_length", "user_mean"],
            "max_history": 64,
            "batch_users": 16,
        }
    },
}
INCREMENT: dict[str, Any] = {
    "stages": [{"name": "night", "epochs": 1}],
    "optim.warmup": 0,
    "optim.lr": 5.0e-4,
    "optim.table_lr": 0.01,
    "optim.min_lr_ratio": 1.0,
    "start_from_optimizer": True,
}


@dataclass(frozen=True)
class Period:
    """A period: its mapping for `hllm prepare --source table`, and the sorted seconds of its events.

    The first period, which is longer, has only the seconds of its last events, over the length of the other periods.
    """

    mapping: Path
    seconds: np.ndarray

    @property
    def start(self) -> int:
        """Second of its first event."""
        return int(self.seconds[0])

    @property
    def cut(self) -> int:
        """First second of its validation part."""
        return int(self.seconds[int((1 - HELD) * self.seconds.size)])


def shop_periods(folder: Path, seed: int, sizes: Mapping[str, int]) -> list[Period]:
    """Periods of the shop: the first days as one period, then each day."""
    found = []
    for day in shop.days(shop.Shop(seed=seed, **sizes)):
        shop.write_day(day, folder)
        if day.number >= FIRST:
            pattern = f"day-0[1-{FIRST}].csv" if day.number == FIRST else f"day-{day.number:02d}.csv"
            mapping = shop.write_mapping(folder, f"until-{day.number:02d}", pattern)
            found.append(Period(mapping, day.events["second"].to_numpy()))
    return found


def table_periods(folder: Path, mapping_file: Path, length: int, count: int) -> list[Period]:
    """Periods of a table source: all events before the last `count` periods of `length` seconds, then each of these."""
    mapping = yaml.safe_load(mapping_file.read_text())
    events = pyarrow.csv.read_csv(mapping_file.parent / mapping["events"]["path"])
    events = events.sort_by(mapping["events"]["time"])
    seconds = events[mapping["events"]["time"]].to_numpy()
    bounds = seconds[-1] + 1 - length * np.arange(count + 1, -1, -1)
    starts = np.searchsorted(seconds, [0, *bounds[1:]])  # the first period has all earlier events
    for kind in ("items", "users"):
        if kind in mapping:
            mapping[kind]["path"] = str((mapping_file.parent / mapping[kind]["path"]).resolve())
    found = []
    folder.mkdir(parents=True, exist_ok=True)
    for number, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        name = f"period-{number:02d}"
        pyarrow.csv.write_csv(events.slice(start, end - start), folder / f"{name}.csv")
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({**mapping, "events": {**mapping["events"], "path": f"{name}.csv"}})
        )
        own = seconds[start:end]
        # `Period.cut` divides these seconds: of the first period only the last `length` seconds, as in the others.
        found.append(Period(folder / f"{name}.yaml", own[own >= bounds[0]] if number == 0 else own))
    return found


class Fortnight:
    """The nights of one seed in its folder; results: (period, arm) -> measured values."""

    def __init__(self, folder: Path, world: str, seed: int, periods: list[Period], device: torch.device) -> None:
        self.folder, self.world, self.seed, self.periods, self.device = folder, world, seed, periods, device
        self.data, self.log = folder / "data", folder / "results.jsonl"
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        self.results = {(row["period"], row["arm"]): row for row in map(json.loads, lines)}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "common.yaml").write_text(yaml.safe_dump(COMMON | WORLDS[world]))

    def run(self) -> None:
        """Run all nights; complete trainings and scores are skipped."""
        # The first model is trained on the first period without its validation part.
        first = self.periods[0]
        split = Split("date", train_until=first.cut, valid_until=int(first.seconds[-1]))
        prepare(table(first.mapping), self.data, split=split)
        self.train(0, "scratch", {})
        for number, period in enumerate(self.periods[1:], start=1):
            before = self.periods[number - 1]
            split = Split("date", train_until=before.cut, valid_until=period.start)
            append_events(table(period.mapping), self.data, split=split)
            if number == 1:  # the training part has no events that the first model was not trained on
                continue
            chain = self.path(0, "scratch") if number == 2 else self.path(number - 1, "nightly")
            for arm, run in (("frozen", self.path(0, "scratch")), ("stale", chain)):
                self.score(number, arm, run)
            for arm, options in (("nightly", self.increment(number, chain)), ("scratch", {})):
                self.train(number, arm, options)
                self.score(number, arm, self.path(number, arm))

    def increment(self, number: int, chain: Path) -> dict[str, Any]:
        """Options of a night's increment: training on the events since the previous night's training."""
        return {**INCREMENT, "start_from": str(chain), "data.train_since": self.periods[number - 2].cut}

    def path(self, number: int, arm: str) -> Path:
        """Run directory of an arm's model."""
        return self.folder / f"{arm}-{number:02d}"

    def train(self, number: int, arm: str, options: Mapping[str, Any]) -> None:
        """Train a model, unless that is done."""
        if (number, f"train {arm}") in self.results:
            return
        given = {"output": str(self.path(number, arm)), "seed": self.seed, "resume": True} | options
        given |= {"data.dataset": str(self.data), "data.version": number + 1}
        started = time.process_time()
        trainer = build_trainer(self.config(given), self.device)
        trainer.run()
        spent = time.process_time() - started
        steps = [line for line in read_log(self.path(number, arm)) if line["event"] == "step"]
        samples = round(sum(line["samples_per_second"] * line["seconds"] for line in steps))
        self.record(number, f"train {arm}", steps=trainer.step, samples=samples, cpu_seconds=round(spent, 2))

    def config(self, options: Mapping[str, Any]) -> Config:
        """The configuration of a training."""
        words = [
            f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()
        ]
        return load_config(["--config", str(self.folder / "common.yaml"), *words])

    def score(self, number: int, arm: str, run: Path) -> None:
        """Score a model on the period's exposures, unless that is done."""
        if (number, arm) in self.results:
            return
        loaded = load_run(run, "best", self.device, run_config(run, self.data))
        experiment = loaded.experiment
        loader = experiment.loader("test", experiment.config.evaluation.batch_users)
        with loaded.weights, experiment.evaluation_items():
            columns = score_split(experiment, loader)
        new = {name: column[columns["item_is_cold"]] for name, column in columns.items()}
        found = quick_metrics(columns)
        cold_auc = quick_metrics(new)["auc"] if 0 < new["label"].sum() < new["label"].size else None
        self.record(number, arm, **{name: round(float(value), 5) for name, value in found.items()}, cold_auc=cold_auc)

    def record(self, number: int, arm: str, **facts: Any) -> None:
        """Store and print a result."""
        row = {"period": number, "arm": arm, **facts}
        self.results[number, arm] = row
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({"seed": self.seed, **row}), flush=True)


def summary(results: Mapping[tuple[int, str], Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the periods: AUC of each arm, differences of nightly from scratch and stale, and the cost of nightly
    as a share of that of scratch."""
    periods = sorted({number for number, arm in results if arm == "scratch"})
    auc = {arm: [results[number, arm]["auc"] for number in periods] for arm in ARMS}
    cost = {
        name: {
            arm: float(np.mean([results[number, f"train {arm}"][name] for number in periods]))
            for arm in ("nightly", "scratch")
        }
        for name in ("samples", "cpu_seconds")
    }
    return {
        "periods": len(periods),
        "auc": {arm: round(float(np.mean(values)), 4) for arm, values in auc.items()},
        "least_auc": {arm: min(values) for arm, values in auc.items()},
        "nightly_minus_scratch": round(float(np.mean(np.subtract(auc["nightly"], auc["scratch"]))), 4),
        "nightly_minus_stale": round(float(np.mean(np.subtract(auc["nightly"], auc["stale"]))), 4),
        **{f"share_of_{name}": round(one["nightly"] / one["scratch"], 4) for name, one in cost.items()},
    }


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = experiment_parser(__doc__, "fortnight", seeds=[0])
    parser.add_argument(
        "--mapping", type=Path, help="mapping of a table source with times in seconds, instead of the shop"
    )
    period_help = "length of a period of the table source in seconds (default: a week)"
    parser.add_argument("--period", type=int, default=7 * shop.DAY, help=period_help)
    parser.add_argument("--periods", type=int, default=PERIODS, help=f"periods to score (default: {PERIODS})")
    parser.add_argument("--tiny", action="store_true", help="a tiny shop, for tests")
    return parser.parse_args()


def periods_of(options: argparse.Namespace, folder: Path, seed: int) -> Iterator[Period]:
    """Write the files of a seed's periods; yield the periods."""
    if options.mapping is not None:
        yield from table_periods(folder / "files", options.mapping, options.period, options.periods + 1)
        return
    sizes = {"days": FIRST + 1 + options.periods}
    if options.tiny:
        sizes |= {"first_items": 30, "daily_items": 2, "first_users": 40, "daily_users": 3, "active": 20}
    yield from shop_periods(folder / "files", seed, sizes)


def main() -> None:
    """Run all seeds, and write the results of all."""
    options = arguments()
    world, found = "shop" if options.mapping is None else "table", {}
    with distributed_device() as device:
        for seed in options.seeds:
            folder = options.output.absolute() / f"seed-{seed}"
            one = Fortnight(folder, world, seed, list(periods_of(options, folder, seed)), device)
            one.run()
            rows = [one.results[key] for key in sorted(one.results)]
            found[seed] = {"summary": summary(one.results), "rows": rows}
            print(json.dumps({"seed": seed, **found[seed]["summary"]}), flush=True)
    versions = {"dataset_versions": Dataset.open(one.data).version, "torch": torch.__version__}
    result = {"bench": "fortnight", "world": world, "common": COMMON | WORLDS[world], "increment": INCREMENT}
    text = json.dumps({**result, **versions, "seeds": found}, indent=1)
    (options.output / "fortnight.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
