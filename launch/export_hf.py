"""`hllm export-hf`: writes a run's LLMs as Hugging Face directories, other weights as safetensors, and a model card.

hllm export-hf --run runs/quickstart --output models/quickstart
"""

import argparse
import sys
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm export-hf", description=__doc__)
    parser.add_run()
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder to write")
    return parser


def run(args: argparse.Namespace) -> None:
    """Export, and print the names of the written files.

    Raises:
        ValueError: no such run or checkpoint, or the output already exists.
    """
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.weights.export import export_huggingface

    with distributed_device() as device:
        left_out = export_huggingface(args.run, args.checkpoint, args.output, device, args.dataset)
    if left_out is not None:
        say(f"no directory for sentence-transformers: {left_out}")
    say(f"{args.output}: {', '.join(sorted(path.name for path in args.output.iterdir()))}")


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
