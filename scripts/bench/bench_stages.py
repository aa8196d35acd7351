"""A training step of stage I (end to end through the Item LLM) against one of stage II (stored item embeddings).

    python scripts/bench/bench_stages.py [--quick] [--out FILE] [--dataset DIR] [--tokenizer DIR]

The Item LLM has width 576 and 6 layers, the user encoder width 576 and 2 layers; late fusion with the generative loss
(lambda 1, 512 negatives), on texts of MovieLens-100k. A step is `Trainer.train_step`: forward, backward, optimizer,
without the loader. `stage1_vs_stage2_step` is seconds of stage I / stage II on the same batch of 32 real users with
history 50. `costs` also has the seconds of steps of 8 users with generated histories of 500 and 1,000 events: items are
drawn by popularity, without repeats until the catalogue is exhausted, and the second half is labelled, as in the pieces
of a long history. These steps are measured for stage II and, without `--quick`, for stage I
(`stage1_vs_stage2_step_h<history>`).

Stage I with more than 600 unique items would not fit in memory. Then the item embeddings are computed in advance
without a graph, which is not timed, and each group of items runs forward and backward with the resulting gradients (see
`bench_step.EncodedBeforehand`). So the timed work is that of one step. The store has random vectors, on whose values
the cost of a step does not depend.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_step import SMALL, TEXT_KEYS, labelled_piece, timed_step
from benchmarking import (
    SMOLLM2,
    add_dataset,
    alternate,
    arguments,
    keep_large_buffers,
    matmul_peak,
    medians,
    ratio,
    report,
    say,
)
from plain_hllm import draw_samples

from hllm_torchrec.config.encoders import ItemLLMConfig, UserEncoderConfig
from hllm_torchrec.config.objective import ObjectiveConfig
from hllm_torchrec.config.schema import Config, DataConfig, FeatureConfig, StageConfig
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.events import Piece
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.fingerprint import item_facts
from hllm_torchrec.models.stored_items import use_stored_items
from hllm_torchrec.modules.encoders.backbone import backbone_flops
from hllm_torchrec.modules.encoders.item_llm import EncodingCounts
from hllm_torchrec.store import EmbeddingStore
from hllm_torchrec.training.throughput import user_token_counts
from hllm_torchrec.training.trainer_setup import build_trainer

SHAPES = {"item": SMOLLM2, "user": SMOLLM2 | {"num_hidden_layers": 2, "vocab_size": 8}}
TINY_SHAPES = {"item": SMALL, "user": SMALL | {"num_hidden_layers": 1, "vocab_size": 8}}
ITEMS_AT_ONCE = 600


@dataclass(frozen=True)
class Row:
    """One batch. generated: histories are random instead of real; stages: the stages that are timed."""

    history: int
    users: int
    generated: bool
    stages: tuple[str, ...] = ("stage1", "stage2")


def rows_of(options: argparse.Namespace) -> list[Row]:
    """Rows to measure; the first one gives the main ratio."""
    if options.tiny:
        return [Row(5, 3, False), Row(12, 2, True)]
    long = ("stage2",) if options.quick else ("stage1", "stage2")
    return [Row(50, 32, False), Row(500, 8, True, long), Row(1000, 8, True, long)]


def config_of(stage: str, options: argparse.Namespace, folder: str) -> Config:
    """The experiment as a user would configure it; stage2 reads the store `folder`/store."""
    shapes = TINY_SHAPES if options.tiny else SHAPES
    stored = stage == "stage2"
    return Config(
        output=f"{folder}/{stage}",
        data=DataConfig(dataset=str(options.dataset), max_history=2048, batch_users=1),
        item_llm=ItemLLMConfig(
            shape=shapes["item"],
            tokenizer=str(options.tokenizer),
            text_keys=TEXT_KEYS if not options.tiny else ("title", "brand"),
            max_text_length=64,
            store=f"{folder}/store" if stored else None,
        ),
        user=UserEncoderConfig(shape=shapes["user"]),
        features=FeatureConfig(time_depth=0),
        objective=ObjectiveConfig(
            fusion="late",
            generative_weight=1.0,
            negatives=8 if options.tiny else 512,
            collapse_above=1.0,  # no collapse alarm: random weights may collapse, which does not matter here
        ),
        stages=(StageConfig(name=stage, item_embeddings="stored" if stored else "trained"),),
    )


def fill_store(experiment: Experiment, path: Path) -> None:
    """Write a store of random vectors for every item, marked as made by the experiment's Item LLM."""
    ids = experiment.dataset.items["raw_item_id"].cast("large_string").combine_chunks()
    assert experiment.hllm.item_llm is not None
    width = experiment.hllm.item_llm.width
    store = EmbeddingStore.create(path, width, "fp16", "string", item_facts(experiment))
    with store.writer() as writer:
        writer.upsert(ids, torch.randn(len(ids), width, generator=torch.Generator().manual_seed(0)))
        writer.commit()


def pieces_of(dataset: Dataset, row: Row) -> list[Piece]:
    """Pieces of `history` + 1 events: real ones, all labelled, or generated ones, whose second half is labelled."""
    if not row.generated:
        return [labelled_piece(s.user_id, s.items, s.timestamps) for s in draw_samples(dataset, row.history, row.users)]
    rng = np.random.default_rng(0)
    counts = dataset.training_item_counts()[1:].astype(np.float64)
    seen = np.flatnonzero(counts)
    found = []
    for user in range(1, row.users + 1):
        drawn: list[np.ndarray] = []
        while sum(map(len, drawn)) < row.history + 1:  # items repeat only after the catalogue is exhausted
            drawn.append(
                1 + rng.choice(seen, min(seen.size, row.history + 1), replace=False, p=counts[seen] / counts.sum())
            )
        items = np.concatenate(drawn)[: row.history + 1]
        found.append(labelled_piece(user, items, 1_000_000_000 + np.arange(items.size), (row.history + 1) // 2))
    return found


class Stages:
    """Trainers of both stages on the same dataset and weights."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        device = torch.device("cpu")
        self.trainers = {"stage1": build_trainer(config_of("stage1", options, folder), device)}
        fill_store(self.trainers["stage1"].experiment, Path(folder) / "store")
        self.trainers["stage2"] = build_trainer(config_of("stage2", options, folder), device)
        use_stored_items(self.trainers["stage2"].experiment)
        self.work = EncodingCounts()

    def batch(self, row: Row) -> HybridBatch:
        """Batch of a row, which is the same for both stages."""
        experiment = self.trainers["stage1"].experiment
        return Collator(experiment.dataset, experiment.batch_spec, 0, training=True)(
            pieces_of(experiment.dataset, row), 0, 0
        )

    def step(self, stage: str, batch: HybridBatch) -> float:
        """Run one step; returns its seconds."""
        groups = -(-batch.unique_items.numel() // ITEMS_AT_ONCE) if stage == "stage1" else 1
        _, seconds, work = timed_step(self.trainers[stage], batch, groups)
        if stage == "stage1":
            self.work = work
        return seconds

    def flops(self, stage: str, batch: HybridBatch) -> float:
        """FLOPs of the matrix products of the LLMs in the last step."""
        hllm = self.trainers[stage].hllm
        users = 3 * backbone_flops(hllm.user.backbone, *user_token_counts(batch, queries=True))
        return users if stage == "stage2" else users + 3 * hllm.item_llm.flops(self.work)


def measure(stages: Stages, row: Row, repeats: int) -> dict[str, Any]:
    """Measure one row: seconds and shapes."""
    batch = stages.batch(row)
    times = alternate({name: lambda name=name: stages.step(name, batch) for name in row.stages}, repeats, warmup=0)
    seconds = medians(times)
    events = row.users * (row.history + 1)
    say(f"history {row.history}, {row.users} users: " + ", ".join(f"{k} {v:.2f} s" for k, v in seconds.items()))
    return {
        "history": row.history,
        "users": row.users,
        "generated": row.generated,
        "unique_items": batch.unique_items.numel(),
        "user_tokens": user_token_counts(batch, queries=True)[0],
        "item_tokens": stages.work.tokens if "stage1" in row.stages else None,
        "seconds": seconds,
        "seconds_per_event": {stage: value / events for stage, value in seconds.items()},
        "times": times,
        "flops": {stage: stages.flops(stage, batch) for stage in seconds},
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench."""
    parser = arguments(__doc__)
    add_dataset(parser, tokenizer=True)
    options = parser.parse_args(argv)
    init_distributed()
    Dataset.open(options.dataset)  # fails early, with a message that names the remedy
    peak = matmul_peak(seconds=0.1 if options.tiny else 1.0)
    with tempfile.TemporaryDirectory() as folder:
        stages = Stages(options, folder)
        small = stages.batch(Row(5, 2, False))
        for stage in stages.trainers:  # warm-up with a small batch: a full one would take most of a quick run
            stages.step(stage, small)
        repeats = 1 if options.tiny else 2 if options.quick else 5
        costs = [
            measure(stages, row, repeats if number == 0 else min(repeats, 3))
            for number, row in enumerate(rows_of(options))
        ]
    destroy_distributed()
    ratios = {}
    for number, cost in enumerate(costs):
        if len(cost["seconds"]) == 2:
            name = "stage1_vs_stage2_step" + (f"_h{cost['history']}" if number else "")
            ratios[name] = ratio(cost["times"]["stage1"], cost["times"]["stage2"])
    share = {
        f"h{cost['history']}_b{cost['users']}": {
            s: cost["flops"][s] / cost["seconds"][s] / peak for s in cost["seconds"]
        }
        for cost in costs
    }
    shapes = {"models": TINY_SHAPES if options.tiny else SHAPES, "negatives": 8 if options.tiny else 512}
    found = {"ratios": ratios, "shapes": shapes, "costs": costs, "matmul_peak": peak, "matmul_share": share}
    return report("stages", options, found)


if __name__ == "__main__":
    keep_large_buffers()
    main()
