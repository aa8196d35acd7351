"""`hllm export-tower`: writes user encoder and head of a late-fusion run as one program that needs only torch to run.

hllm export-tower --run runs/late --output exports/tower.pt2
"""

import argparse
import sys
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm export-tower", description=__doc__)
    parser.add_run()
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.pt2", help="new file to write, a torch.export program"
    )
    parser.add_argument(
        "--compiled",
        type=Path,
        metavar="FILE.pt2",
        help="also write an AOTInductor package (new file) for this machine's type of processor; needs a C++ compiler",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Export the tower, and compare the written program with the scorer.

    Raises:
        ValueError: the run or checkpoint does not exist, the model cannot be exported, an output exists, or --compiled
            is given and there is no C++ compiler.
    """
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.serving.batch_scorer import BatchScorer
    from hllm_torchrec.serving.exported_tower import check_compiler, check_outputs, export_tower

    check_outputs(args.output, args.compiled)
    if args.compiled is not None:
        check_compiler()
    with (
        distributed_device() as device,
        BatchScorer.of_run(args.run, args.checkpoint, device, dataset=args.dataset) as scorer,
    ):
        difference = export_tower(scorer, args.output, args.compiled)
    written = " and ".join(str(file) for file in (args.output, args.compiled) if file is not None)
    say(f"{written}: model {scorer.mark}, largest difference to the scorer's logits {difference:.1e}")
    if args.compiled is not None:
        say(f"{args.compiled}: run it with AOTI_RUNTIME_CHECK_INPUTS=1, or it takes wrong shapes, types and strides")


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
