"""Compares models with several tasks, context, position bias and sampled negatives on the generated shop (`shop.py`).

    python scripts/experiments/tasks.py --output runs/tasks [--tiny] [--arms joint click ...] [--seed 0]

The shop has 504,000 exposures of 9,000 users in 14 days; day 13 is validation, day 14 test. Each arm is a run:

    joint                      click, like and watch time in one model (shared bottom), with device and hour
    click, like, watch         one model for each label, otherwise the same
    no_context                 joint without device and hour
    bias                       joint with the position bias tower, which is not used in serving
    rate_25, rate_5            joint, trained on 25% and 5% of the non-clicks, with the correction of the logit
    rate_25_raw, rate_5_raw    the same without the correction
    rate_5_long, rate_5_slow   rate_5 with twice the epochs; rate_5_slow also with a third of the learning rate
    rate_5_equal               rate_5 with four times the epochs: about as many exposures as `joint` reads
    rate_5_file                rate_5 with the same non-clicks in all epochs, as if the file had only these

An arm with OUTPUT/<arm>/result.json is not trained again, so the script can be stopped and restarted. OUTPUT/tasks.json
has the comparison: metrics of each arm on the test day, and paired differences from `joint` with intervals over users;
`permuted` is `joint`, scored with permuted devices and hours.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import shop
from jobs import experiment_parser
from scipy.stats import kendalltau

from hllm_torchrec.config.loading import load_config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.events import Events, Piece
from hllm_torchrec.data.predictions import save_predictions
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.request_context import RequestContext
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.split import Split
from hllm_torchrec.distributed.process_group import distributed_device
from hllm_torchrec.evaluation.model_comparison import evaluate_files
from hllm_torchrec.evaluation.offline_evaluation import EvaluationSettings
from hllm_torchrec.evaluation.prediction_layout import describe_predictions
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.evaluation.scoring import score_split
from hllm_torchrec.training.trainer_setup import build_trainer

FULL = shop.Shop(
    days=14, first_items=600, daily_items=0, first_users=9000, daily_users=0, active=4500, slots=8, signals=True
)
TINY = shop.Shop(
    days=14, first_items=60, daily_items=0, first_users=80, daily_users=0, active=40, slots=8, signals=True
)

COMMON: dict[str, Any] = {
    "item_llm.enabled": False,
    "user": {"encoder": "sasrec", "shape": {"width": 32, "layers": 1, "heads": 2, "max_positions": 64, "dropout": 0.1}},
    "features": {"time_depth": 0, "init_scale": 0.05, "shard_from_rows": 100000, "action": False},
    "data": {
        "history": "positive",
        "item_features": ["genres"],
        "context": ["device", "hour"],
        "max_history": 64,
        "batch_users": 64,
    },
    "objective": {"fusion": "late", "head_hidden": 64},
    "optim": {"lr": 3.0e-3, "table_lr": 0.02, "weight_decay": 0.05},
    "evaluation": {"batch_users": 128, "keep_last": 1},
}
EVERY = {"click": {}, "like": {}, "watch_seconds": {}}
ARMS: dict[str, dict[str, Any]] = {
    "joint": {"objective.tasks": EVERY},
    "click": {"objective.tasks": {}},
    "like": {"objective.tasks": {"click": {"weight": 0}, "like": {}}},
    "watch": {"objective.tasks": {"click": {"weight": 0}, "watch_seconds": {}}},
    "no_context": {"objective.tasks": EVERY, "data.context": []},
    "bias": {"objective.tasks": EVERY, "objective.position_bias": ["position"]},
    "rate_25": {"objective.tasks": EVERY, "data.negative_rate": 0.25},
    "rate_5": {"objective.tasks": EVERY, "data.negative_rate": 0.05},
    "rate_25_raw": {"objective.tasks": EVERY, "data.negative_rate": 0.25},
    "rate_5_raw": {"objective.tasks": EVERY, "data.negative_rate": 0.05},
    "rate_5_long": {"objective.tasks": EVERY, "data.negative_rate": 0.05},
    "rate_5_slow": {"objective.tasks": EVERY, "data.negative_rate": 0.05, "optim.lr": 1.0e-3},
    "rate_5_equal": {"objective.tasks": EVERY, "data.negative_rate": 0.05},
    "rate_5_file": {"objective.tasks": EVERY, "data.negative_rate": 0.05},
}
LONGER = {"rate_5_long": 2, "rate_5_slow": 2, "rate_5_equal": 4}
"""Arm -> factor of its number of epochs."""


class PermutedContext(RequestContext):
    """Context in which the values of a batch are permuted, to measure the effect of uninformative context."""

    def ids(self, events: Events, name: str, *, count: bool) -> np.ndarray:
        """The ids of the events in a random order."""
        ids = super().ids(events, name, count=False)
        return np.random.default_rng(len(ids)).permutation(ids)


def write_shop(output: Path, size: shop.Shop) -> Dataset:
    """Write and prepare the shop in `output` unless it exists, and open it; truth.parquet has the true relevance."""
    files = output / "files"
    if not (output / "truth.parquet").is_file():
        days = []
        for day in shop.days(size):
            shop.write_day(day, files)
            days.append(day.events)
        pq.write_table(pa.concat_tables(days), output / "truth.parquet")
    mapping = shop.write_mapping(files, "all", "day-*.csv", signals=True)
    last = shop.START + (size.days - 2) * shop.DAY
    split = Split("date", train_until=last, valid_until=last + shop.DAY)
    return Dataset.open(prepare(table(mapping), output / "dataset", split=split))


def train(arm: str, output: Path, dataset: Dataset, seed: int, epochs: float) -> None:
    """Train an arm and score the test day, unless the arm has a result."""
    run = output / arm
    if (run / "result.json").is_file():
        return
    values = {"output": str(run), "data.dataset": str(dataset.root), "seed": seed, "resume": True}
    values |= {"stages": [{"name": "all", "epochs": epochs * LONGER.get(arm, 1)}]}
    settings = _flat(COMMON) | ARMS[arm] | values
    options = [f"--{n}={value if isinstance(value, str) else json.dumps(value)}" for n, value in settings.items()]
    with distributed_device() as device:
        trainer = build_trainer(load_config(options), device)
        for end, change in CHANGES.items():
            if arm.endswith(end):
                loader = trainer._loader(trainer.config.stages[0])
                loader.collator = ChangedCollator(loader.collator, change)
        metrics = trainer.run()
        _score(run, "test", device)
        if arm == "joint":
            _score(run, "permuted", device)
    (run / "result.json").write_text(json.dumps(metrics))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{name}.{key}" if key else name: one
        for name, value in values.items()
        for key, one in (value.items() if isinstance(value, dict) else [("", value)])
    }


class ChangedCollator:
    """The loader's collator, with batches changed by `change`."""

    def __init__(self, collator: Collator, change: Callable[..., HybridBatch]) -> None:
        self._collator, self._change = collator, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collator, name)

    def __call__(self, pieces: Sequence[Piece], epoch: int, step: int, rank: int = 0) -> HybridBatch:
        """The changed batch of the pieces."""
        return self._change(self._collator, pieces, epoch, step, rank)


def _without_correction(collate: Collator, pieces: Sequence[Piece], epoch: int, step: int, rank: int) -> HybridBatch:
    """A batch without the logit correction, as if it had all non-clicks."""
    batch = collate(pieces, epoch, step, rank)
    batch.logit_offset = None
    return batch


def _of_first_draw(collate: Collator, pieces: Sequence[Piece], epoch: int, step: int, rank: int) -> HybridBatch:
    """A batch with the negatives of the first epoch; in this experiment nothing else depends on the epoch."""
    return collate(pieces, 0, step, rank)


CHANGES = {"_raw": _without_correction, "_file": _of_first_draw}
"""Suffix of an arm's name -> function that builds its batches."""


def _score(run: Path, name: str, device: Any) -> None:
    loaded = load_run(run, "latest", device)
    experiment = loaded.experiment
    loader = experiment.loader("test", 128)
    if name == "permuted":
        own = loader.collator.context
        loader.collator.context = PermutedContext(experiment.dataset.schema, own.names, own.state())
    columns = score_split(experiment, loader)
    save_predictions(columns, run / "predictions" / name)


def compare(output: Path, dataset: Dataset, arms: Sequence[str]) -> dict[str, Any]:
    """Metrics of all arms on the test day, and their paired differences from `joint`."""
    paths = {arm: output / arm / "predictions" / "test" for arm in arms}
    paths |= {"permuted": output / "joint" / "predictions" / "permuted"} if "joint" in arms else {}
    models, layout = describe_predictions(paths)
    metrics, _ = evaluate_files(models, layout, EvaluationSettings("test"), paired=True)
    shown = ("auc", "auc_low", "auc_high", "gauc", "log_loss", "calibration")
    found: dict[str, Any] = {"rows": metrics["rows"], "users": metrics["users"]}
    found["click"] = {arm: {key: block[key] for key in shown} for arm, block in metrics["models"].items()}
    found["click_paired"] = metrics["paired"]
    for task, block in metrics["tasks"].items():
        keys = shown if block["kind"] == "binary" else tuple(next(iter(block["models"].values())))
        found[task] = {arm: {key: one[key] for key in keys} for arm, one in block["models"].items()}
        found[f"{task}_paired"] = block.get("paired")
        found[f"{task}_rows"] = block["rows"]
    relevance = truth_of(output, dataset)
    orders = {arm: served_order(relevance, path) for arm, path in paths.items()}
    reference = next(iter(orders.values()))
    found["tau"] = {arm: mean_over_users(order) for arm, order in orders.items()}
    found["tau_paired"] = {arm: mean_over_users(order - reference) for arm, order in orders.items()}
    return found


def truth_of(output: Path, dataset: Dataset) -> dict[tuple[int, int, int], float]:
    """(Dense user, dense item, second) -> true relevance."""
    truth = pq.read_table(output / "truth.parquet", columns=["user", "item", "second", "relevance"])
    users, items = (
        {raw: i for i, raw in enumerate(table.to_pylist(), start=1)}
        for table in (dataset.users["raw_user_id"], dataset.items["raw_item_id"])
    )
    keys = zip(truth["user"].to_pylist(), truth["item"].to_pylist(), truth["second"].to_pylist(), strict=True)
    return {(users[u], items[i], s): r for (u, i, s), r in zip(keys, truth["relevance"].to_pylist(), strict=True)}


def served_order(relevance: dict[tuple[int, int, int], float], predictions: Path) -> pd.Series:
    """Kendall's tau of scores and true relevance for each page, indexed by user and second."""
    rows = pq.read_table(predictions, columns=["user_id", "item_id", "timestamp", "score"]).to_pandas()
    rows["relevance"] = [
        relevance[u, i, s] for u, i, s in zip(rows["user_id"], rows["item_id"], rows["timestamp"], strict=True)
    ]
    pages = {
        key: kendalltau(page["score"], page["relevance"])[0] for key, page in rows.groupby(["user_id", "timestamp"])
    }
    return pd.Series(pages)


def mean_over_users(pages: pd.Series) -> dict[str, float]:
    """Mean of the pages' values, and its standard error with users as independent units."""
    known = pages.dropna()
    sums = (known - known.mean()).groupby(level=0).sum()
    return {"mean": float(known.mean()), "error": float(np.sqrt((sums**2).sum()) / len(known))}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train the arms without a result, and write the comparison."""
    parser = experiment_parser(__doc__, None)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--tiny", action="store_true", help="a shop of 80 users, to try the script")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    dataset = write_shop(options.output, TINY if options.tiny else FULL)
    for arm in options.arms:
        train(arm, options.output, dataset, options.seed, options.epochs)
    done = [arm for arm in ARMS if (options.output / arm / "result.json").is_file()]
    found = {"seed": options.seed, "epochs": options.epochs, **compare(options.output, dataset, done)}
    (options.output / "tasks.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
