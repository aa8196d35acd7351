"""`hllm check-model`: compares this library's embeddings from a Hugging Face directory with plain transformers'.

    hllm check-model --model models/bge-small-en-v1.5

The command prints how this library would use the model (causal or bidirectional, packed or padded texts, pooling,
prompt), and encodes texts with this library and with plain transformers. If the embeddings differ, or a file is
damaged, it prints one line and exits with status 2.
"""

import argparse
import sys
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point, positive


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm check-model", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory")
    parser.add_argument(
        "--max-text-length", type=positive, default=64, metavar="N", help="maximum tokens per text (default: 64)"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Check, and print the report.

    Raises:
        ValueError: see `report_model`.
    """
    from hllm_torchrec.models.model_report import report_model

    say("\n".join(report_model(args.model, args.max_text_length).lines()))


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
