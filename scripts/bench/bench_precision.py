"""Steps in bfloat16 against steps in float32 (`parallel.precision`) of any configuration.

    python scripts/bench/bench_precision.py [--quick] [--out FILE] -- --config FILE [OPTIONS OF hllm train]

Two trainers of the configuration alternate on the same batches of its first stage, after some steps that are not timed.
`precision_step` is the median over the steps of seconds in float32 / seconds in bfloat16.
"""

from dataclasses import replace
from typing import Any

import torch
from bench_subsample import compare
from benchmarking import arguments, keep_large_buffers, ratio, report, why_no_bf16

from hllm_torchrec.config.loading import load_config
from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch.recipes import with_recipe


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench."""
    parser = arguments(__doc__)
    parser.add_argument("training", nargs="+", help="options of hllm train, after --")
    options = parser.parse_args(argv)
    if reason := why_no_bf16():
        parser.error(reason)
    steps, skipped = (2, 1) if options.tiny else (30, 5) if options.quick else (100, 10)
    config = load_config(with_recipe(options.training))
    sides = {name: replace(config, parallel=replace(config.parallel, precision=name)) for name in ("fp32", "bf16")}
    found = compare(sides, steps, skipped)
    destroy_distributed()
    ratios = {"precision_step": ratio(found["seconds"]["fp32"], found["seconds"]["bf16"])}
    shapes = {"training": options.training, "steps": steps, "skipped": skipped}
    result = {"ratios": ratios, "shapes": shapes, **found}
    return report("precision", options, result)


if __name__ == "__main__":
    keep_large_buffers()
    torch.manual_seed(0)
    main()
