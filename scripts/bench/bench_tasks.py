"""Cost of several tasks: training steps with three and eight labels, and with MMoE, against steps with one label.

    python scripts/bench/bench_tasks.py [--quick] [--out FILE]

The bench times `Trainer.train_step` on the same pages of a synthetic shop (late fusion, SASRec of width 64 with two
layers, item IDs only), alternately for one binary task, for three and eight on a shared bottom, and for eight with
MMoE. `tasks_three`, `tasks_eight` and `tasks_mmoe` are the times of a step divided by those with one task: medians of
the quotients of the same round.

`evaluate_eight` is the CPU time of evaluating predictions of eight label columns at once, divided by that of eight
evaluations of one column each, on the same files, alternately.
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
import yaml
from benchmarking import alternate, arguments, medians, ratio, report, timed

from hllm_torchrec.config.encoders import ItemLLMConfig, UserEncoderConfig
from hllm_torchrec.config.objective import ObjectiveConfig
from hllm_torchrec.config.schema import Config, DataConfig, FeatureConfig, OptimConfig
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.model_comparison import evaluate_files
from hllm_torchrec.evaluation.offline_evaluation import EvaluationSettings
from hllm_torchrec.evaluation.prediction_layout import ColumnLayout, PredictionModel, describe_predictions
from hllm_torchrec.training.trainer import Trainer
from hllm_torchrec.training.trainer_setup import build_trainer

LABELS = tuple(f"label{number}" for number in range(8))
SIDES = {"one": 1, "three": 3, "eight": 8, "mmoe": 8}
"""Number of tasks of each side; the side mmoe has MMoE instead of a shared bottom."""


def write_shop(folder: Path, users: int, pages: int, slots: int, items: int) -> Path:
    """Prepare a dataset of pages: `slots` items shown in the same second, with eight labels; returns its folder."""
    rng = np.random.default_rng(0)
    number = users * pages
    columns: dict[str, Any] = {
        "user": np.repeat(np.char.add("u", np.repeat(np.arange(users), pages).astype(str)), slots),
        "item": np.char.add("i", rng.random((number, items)).argsort(axis=1)[:, :slots].ravel().astype(str)),
        "second": np.repeat(1_600_000_000 + np.tile(np.arange(pages), users) * 3600, slots),
    }
    columns |= {name: (rng.random(number * slots) < 0.3).astype(int) for name in LABELS}
    pa.csv.write_csv(pa.table(columns), folder / "events.csv")
    titles = pa.table({"item": [f"i{i}" for i in range(items)], "title": [f"item {i}" for i in range(items)]})
    pa.csv.write_csv(titles, folder / "items.csv")
    events = {"path": "events.csv", "user": "user", "item": "item", "time": "second"}
    mapping = {
        "name": "bench",
        "events": events | {"labels": dict.fromkeys(LABELS, "binary")},
        "items": {"path": "items.csv", "item": "item", "text": ["title"]},
    }
    (folder / "mapping.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))
    return prepare(table(folder / "mapping.yaml"), folder / "dataset")


def trainer_of(dataset: Path, tasks: int, output: Path, batch_users: int, mixed: bool) -> Trainer:
    """Trainer for the first `tasks` labels; mixed: with MMoE instead of a shared bottom."""
    named: dict[str, dict[str, Any]] = {name: {} for name in LABELS[:tasks]} if tasks > 1 else {}
    config = Config(
        output=str(output),
        data=DataConfig(dataset=str(dataset), max_history=256, batch_users=batch_users),
        item_llm=ItemLLMConfig(enabled=False),
        user=UserEncoderConfig(encoder="sasrec", shape={"width": 64, "layers": 2, "heads": 2, "max_positions": 256}),
        features=FeatureConfig(time_depth=0),
        objective=ObjectiveConfig(fusion="late", tasks=named, towers="mmoe" if mixed else "shared_bottom"),
        optim=OptimConfig(lr=1e-4, table_lr=1e-4),
    )
    return build_trainer(config, torch.device("cpu"))


def write_predictions(folder: Path, rows: int) -> Path:
    """Write predictions of eight binary labels for 25 exposures per user; returns their folder."""
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {"user_id": np.arange(rows) // 25, "item_id": rng.integers(1, 50_000, rows)}
    for place, task in enumerate(LABELS):
        name = f"_{task}" if place else ""
        label = (rng.random(rows) < 0.2).astype(np.float32)
        score = rng.standard_normal(rows, dtype=np.float32) + label - 2
        columns |= {f"label{name}": label, f"score{name}": score, f"probability{name}": 1 / (1 + np.exp(-score))}
    folder.mkdir()
    pa.parquet.write_table(pa.table(columns), folder / "part-0.parquet")
    return folder


def evaluate_all(folder: Path) -> None:
    """Evaluate all label columns in one reading of the rows."""
    models, layout = describe_predictions({"model": folder})
    assert len(layout.tasks) == len(LABELS) - 1
    evaluate_files(models, layout, EvaluationSettings(), paired=False)


def evaluate_each(folder: Path) -> None:
    """Evaluate each label column separately."""
    for place, task in enumerate(LABELS):
        name = f"_{task}" if place else ""
        model = PredictionModel("model", (folder,), f"score{name}", f"probability{name}")
        layout = ColumnLayout(f"label{name}", user="user_id", item="item_id")
        evaluate_files([model], layout, EvaluationSettings(), paired=False)


def evaluation_times(folder: Path, rows: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of `evaluate_all` and of `evaluate_each`, alternately."""
    predictions = write_predictions(folder, rows)
    jobs = {"evaluate_at_once": evaluate_all, "evaluate_each": evaluate_each}
    return alternate({name: timed(partial(job, predictions), time.process_time) for name, job in jobs.items()}, rounds)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench."""
    options = arguments(__doc__).parse_args(argv)
    rounds, users = (2, 4) if options.tiny else (15, 16) if options.quick else (40, 32)
    pages, slots = (3, 4) if options.tiny else (24, 8)
    init_distributed()
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = write_shop(folder, 3 * users, pages, slots, 200)
        trainers = {
            side: trainer_of(dataset, tasks, folder / side, users, side == "mmoe") for side, tasks in SIDES.items()
        }
        batches = {side: next(iter(one._loader(one.config.stages[0]).batches(0))) for side, one in trainers.items()}
        for turn in range(rounds + 2):
            for side in list(SIDES)[:: 1 if turn % 2 else -1]:  # every other round in reverse order
                start = time.perf_counter()
                trainers[side].train_step([batches[side]])
                if turn >= 2:  # the first two rounds are a warm-up
                    seconds[side].append(time.perf_counter() - start)
        exposures = batches["one"].num_exposures
        rows = 2_000 if options.tiny else 200_000 if options.quick else 1_000_000
        evaluated = evaluation_times(folder / "predictions", rows, 1 if options.tiny else 5)
    destroy_distributed()
    ratios = {f"tasks_{side}": ratio(seconds[side], seconds["one"]) for side in ("three", "eight", "mmoe")}
    ratios["evaluate_eight"] = ratio(evaluated["evaluate_at_once"], evaluated["evaluate_each"])
    seconds |= evaluated
    shapes = {"exposures": exposures, "users": users, "rounds": rounds, "rows": rows}
    found = {"ratios": ratios, "seconds": medians(seconds), "shapes": shapes}
    return report("tasks", options, found)


if __name__ == "__main__":
    main()
