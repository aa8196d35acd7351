"""Measures the times that a training step of several ranks waits: for the next batch, and for table rows.

    torchrun --nproc_per_node 2 scripts/bench/bench_waiting.py [--quick] [--out FILE] [--config FILE]

Trains some steps of the last stage of a configuration (default: configs/ml100k/early.yaml, whose item embeddings are
cached, so that the rest of a step is short). On every rank it sums the seconds until the loader's thread delivers a
batch, and the seconds of the forward pass of the TorchRec tables, in which ranks exchange ids and rows and wait for one
another. The reported shares are these seconds / the seconds of the steps, as means over ranks: overlapping the waits
with computation could save at most this share. The share of the tables also contains their lookups, which
`--nproc_per_node 1` measures alone. Then blocks of steps with and without `parallel.overlap_tables` alternate:
`overlap` is the seconds of a block without / with it on rank 0, the median over the pairs of blocks.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmarking import ROOT, arguments, keep_large_buffers, ratio, report

from hllm_torchrec.config.loading import config_from_file
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.distributed.collectives import global_sum
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.training.trainer import Trainer
from hllm_torchrec.training.trainer_setup import build_trainer

BLOCK = 10
"""Number of consecutive steps with, or without, overlap."""


class Stopwatch:
    """Sums the seconds of a module's forward passes."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.seconds = 0.0
        self._begun = 0.0
        module.register_forward_pre_hook(lambda *_: self._begin())
        module.register_forward_hook(lambda *_: self._end())

    def _begin(self) -> None:
        self._begun = time.perf_counter()

    def _end(self) -> None:
        self.seconds += time.perf_counter() - self._begun


def run(config: Config, steps: int, skipped: int) -> dict[str, float]:
    """Total seconds of the counted steps (means over ranks of step, batch, table_forward), and the ratio overlap."""
    trainer = build_trainer(config, init_distributed())
    segment = trainer.schedule.segments[0]
    if segment.stage.item_embeddings == "cached":
        trainer.experiment.use_cached_items()
    tables = trainer.hllm.features.tables
    assert tables is not None, "the model has no tables, so no rows are exchanged"
    watch, batches = Stopwatch(tables), all_batches(trainer)
    spent = torch.zeros(3, dtype=torch.float64)
    for number in range(skipped + steps):
        watch.seconds, begun = 0.0, time.perf_counter()
        batch = next(batches)
        ready = time.perf_counter()
        trainer.train_step(batch)
        if number >= skipped:
            spent += torch.tensor([time.perf_counter() - begun, ready - begun, watch.seconds], dtype=torch.float64)
    mean = (global_sum(spent) / dist.get_world_size()).tolist()
    found = dict(zip(("step", "batch", "table_forward"), mean, strict=True))
    return found | {"overlap": overlap_ratio(trainer, batches, steps)}


def all_batches(trainer: Trainer) -> Iterator[list[HybridBatch]]:
    """Yield the micro-batches of each step, of all epochs."""
    for segment in trainer.schedule.segments:
        yield from trainer._micro_batches(segment)


def overlap_ratio(trainer: Trainer, batches: Iterator[list[HybridBatch]], steps: int) -> float:
    """Seconds of a block of steps without / with the exchange of ids ahead of the step, on this rank."""
    assert trainer.table_prefetcher is not None
    size = min(BLOCK, steps)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    coming = next(batches)
    for number in range(2 * steps):
        ahead = number // size % 2 == 1
        now, coming = coming, next(batches)
        begun = time.perf_counter()
        trainer.train_step(now, coming if ahead else None)
        seconds[ahead].append(time.perf_counter() - begun)
    trainer.table_prefetcher.finish()
    without, ahead_of_it = ([sum(s[at : at + size]) for at in range(0, steps, size)] for s in seconds.values())
    return ratio(without, ahead_of_it)


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Run the benchmark; return the result on rank 0."""
    parser = arguments(__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "ml100k" / "early.yaml")
    options = parser.parse_args(argv)
    config = config_from_file(options.config)
    steps = 2 if options.tiny else 40 if options.quick else 200
    with tempfile.TemporaryDirectory() as folder:
        last = replace(config.stages[-1], epochs=1000)  # enough batches for any number of steps
        config = replace(config, output=folder, stages=(last,), max_steps=0, resume=False)
        config = replace(config, parallel=replace(config.parallel, overlap_tables=True))
        found = run(config, steps, skipped=0 if options.tiny else 10)
    world, rank = dist.get_world_size(), dist.get_rank()
    destroy_distributed()
    if rank != 0:
        return None
    ratios = {f"{name}_share_of_step": found[name] / found["step"] for name in ("batch", "table_forward")}
    ratios["overlap"] = found["overlap"]
    shapes = {"ranks": world, "steps": steps, "config": options.config.name}
    return report("waiting", options, {"ratios": ratios, "shapes": shapes, "seconds": found})


if __name__ == "__main__":
    keep_large_buffers()
    main()
