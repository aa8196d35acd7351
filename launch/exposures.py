"""`hllm exposures`: writes for every exposure the user vector that was available then, for training a ranking model.

    hllm exposures --run runs/stages/2 --users stores/users --items stores/item-features
    torchrun --nproc_per_node 2 -m hllm_torchrec.launch.exposures --run-dir runs/stages/2 --users stores/users

--users DIR gets one store per mode. nearline: vectors from events of strictly earlier seconds; daily: vectors from
events before the exposure's day (UTC). --items DIR gets the item vectors that the user encoder reads (text, ID
and item features); the user vectors of late fusion are in the same vector space.
"""

import argparse
import sys
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point

MODES = ("nearline", "daily")
PARTS = ("train", "valid", "test")


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm exposures", description=__doc__)
    parser.add_run()
    parser.add_argument(
        "--users", type=Path, metavar="DIR", help="folder of stores of user vectors by exposure: DIR/MODE"
    )
    parser.add_argument(
        "--items", type=Path, metavar="DIR", help="store of the item vectors that the user encoder reads"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: both")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="parts of the run's dataset; default: all"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Load the run's model, write the stores, and print how many exposures have a vector.

    Raises:
        ValueError: no store is named, the run or checkpoint does not exist, or a store is of another model or mode.
    """
    if args.items is None and args.users is None:
        raise ValueError("name a store: --users, --items or both")
    from hllm_torchrec.distributed.coordination import rank
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.evaluation.run_loader import load_run
    from hllm_torchrec.inference.exposure_store import coverage_lines, embed_exposures, embed_item_features
    from hllm_torchrec.inference.user_embedder import open_embedder

    lines: list[str] = []
    with distributed_device() as device:
        loaded = load_run(args.run, args.checkpoint, device, dataset=args.dataset)
        with loaded.weights, open_embedder(loaded.experiment):  # prepare item embeddings once
            if args.items is not None:
                items = embed_item_features(loaded, args.items)
                lines.append(f"{args.items}: {items.encoded:,} of {items.items:,} items in {items.seconds:.1f} s")
            for mode in args.modes if args.users is not None else ():
                report = embed_exposures(loaded, args.users / mode, mode, args.parts)
                lines += [f"{args.users / mode}: in {report.seconds:.1f} s", *coverage_lines(report)]
        if rank() == 0:
            say("\n".join(lines))


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
