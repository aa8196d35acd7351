"""`hllm index`: writes a FAISS index of a run's items, in the vector space of the generative loss.

hllm index --run runs/retrieval/hstu --output exports/items
hllm index --run runs/retrieval/hstu --output exports/items --kind ivf --cells 4096

The user vectors of a run without late fusion (`hllm embed --users`) are in the same space.
"""

import argparse
import sys
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm index", description=__doc__)
    parser.add_run()
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder to write")
    parser.add_argument(
        "--kind",
        choices=("flat", "ivf"),
        default="flat",
        help="flat: exact search (default); ivf: search in clusters of similar items",
    )
    parser.add_argument("--cells", type=int, default=0, help="clusters of an ivf index; 0: 4 sqrt(items) (default)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Load the run's model, embed the catalogue and write the index.

    Raises:
        ValueError: the run or checkpoint does not exist, the run has no generative loss, faiss is not installed, or
            the output exists.
    """
    from hllm_torchrec.distributed.coordination import rank
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.inference.item_index import export_item_index

    if args.output.exists():
        raise ValueError(f"--output {args.output}: already exists: choose another folder, or remove it")
    with distributed_device() as device:
        number = export_item_index(
            args.run, args.output, args.checkpoint, device, args.kind, args.cells, dataset=args.dataset
        )
        if rank() == 0:
            say(f"{number:,} items: {args.output}")


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
