"""`hllm embed`: writes the item embeddings of a run into a store: those that are new, or whose text has changed.

    hllm embed --run runs/quickstart --items stores/items
    torchrun --nproc_per_node 2 -m hllm_torchrec.launch.embed --run-dir runs/quickstart --items stores/items

Run it again every night: what it costs follows what has changed. A store made by other weights is refused.
"""

import argparse
import sys
from pathlib import Path

from hllm_torchrec.launch.command import CommandParser, run_job


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="hllm embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run_help = "run directory of hllm train; behind torchrun write --run-dir: it takes --run for one of its own"
    parser.add_argument("--run", "--run-dir", dest="run", type=Path, required=True, metavar="DIR", help=run_help)
    parser.add_argument("--items", type=Path, required=True, metavar="DIR", help="the store, made if it is not there")
    parser.add_argument("--checkpoint", default="best", help="best (the default), latest, or a directory")
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="of a new store")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 after a message on a mistake of the user's."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return run_job(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Load the run's model, embed what has changed, and say what was done.

    Raises:
        ValueError: no such run or checkpoint, or a store of another model.
    """
    from hllm_torchrec.embed import embed_items
    from hllm_torchrec.offline import load_run
    from hllm_torchrec.parallelize import start_process, stop_process
    from hllm_torchrec.ranks import rank

    device = start_process()
    try:
        loaded = load_run(args.run, args.checkpoint, device)
        with loaded.weights:
            report = embed_items(loaded.experiment, args.items, args.dtype)
        if rank() == 0:
            print(
                f"embedded {report.encoded:,} of {report.items:,} items in {report.seconds:.1f} s; "
                f"{args.items} is at version {report.version}"
            )
    finally:
        stop_process()


if __name__ == "__main__":
    sys.exit(main())
