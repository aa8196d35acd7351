"""Steps that encode all items with gradients against steps that encode only a share of the items and read the others
from a cache (`item_llm.trained_share`).

    python scripts/bench/bench_subsample.py [--quick] [--out FILE] [--config configs/ml100k/trained.yaml] [--share 0.25]

Two trainers of one configuration (its first stage, end to end) alternate on the same batches, after some steps that
fill the cache and are not timed. `subsample` is the median over the steps of seconds with all items / seconds with the
share; `tokens` is the number of tokens that the Item LLM encoded with all items / the number with the share.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarking import ROOT, arguments, keep_large_buffers, ratio, report

from hllm_torchrec.config.loading import config_from_file
from hllm_torchrec.config.schema import Config
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.training.trainer_setup import build_trainer


def compare(sides: Mapping[str, Config], steps: int, skipped: int) -> dict[str, Any]:
    """Seconds of every timed step of the first stage, on the same batches, and numbers of encoded tokens, by side."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: build_trainer(
                replace(one, output=f"{folder}/{name}", stages=one.stages[:1], resume=False), init_distributed()
            )
            for name, one in sides.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        tokens = dict.fromkeys(trainers, 0)
        first = next(iter(trainers.values()))
        batches = first._micro_batches(first.schedule.segments[0])
        for number, batch in zip(range(skipped + steps), batches, strict=False):
            for name, trainer in trainers.items():
                encoder = trainer.experiment.item_encoder
                before, begun = encoder.work.tokens if encoder else 0, time.perf_counter()
                trainer.train_step(batch)
                if number >= skipped:
                    seconds[name].append(time.perf_counter() - begun)
                    tokens[name] += encoder.work.tokens - before if encoder else 0
        batches.close()
    return {"seconds": seconds, "tokens": tokens}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench."""
    parser = arguments(__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "ml100k" / "trained.yaml")
    parser.add_argument("--share", type=float, default=0.25, help="item_llm.trained_share")
    options = parser.parse_args(argv)
    steps, skipped = (2, 1) if options.tiny else (12, 8) if options.quick else (40, 15)
    full = config_from_file(options.config)
    part = replace(full, item_llm=replace(full.item_llm, trained_share=options.share))
    found = compare({"all": full, "share": part}, steps, skipped)
    destroy_distributed()
    ratios = {
        "subsample": ratio(found["seconds"]["all"], found["seconds"]["share"]),
        "tokens": found["tokens"]["all"] / found["tokens"]["share"],
    }
    shapes = {"share": options.share, "steps": steps, "skipped": skipped, "config": options.config.name}
    return report("subsample", options, {"ratios": ratios, "shapes": shapes, **found})


if __name__ == "__main__":
    keep_large_buffers()
    torch.manual_seed(0)
    main()
