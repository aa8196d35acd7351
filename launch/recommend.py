"""`hllm recommend`: prints a user's history and a run's recommendations, with the items' texts.

hllm recommend --run runs/quickstart --user 196 --top 20
hllm recommend --run runs/shop --user u7 --context '{"page": "home"}'     # for a run with `data.context`
"""

import argparse
import sys
from typing import TYPE_CHECKING

from hllm_torchrec.common.terminal import printable, say
from hllm_torchrec.launch.entry import CommandParser, entry_point, natural

if TYPE_CHECKING:
    from hllm_torchrec.serving.recommend import Recommendations, RecommendedItem

WIDTH = 80
"""Maximum number of printed characters of a text."""


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm recommend", description=__doc__)
    parser.add_run()
    parser.add_argument("--user", required=True, metavar="ID", help="raw user id, as in the source")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="number of items to print (default: 10)")
    parser.add_argument(
        "--history", type=natural, default=10, metavar="N", help="number of latest events to print (default: 10)"
    )
    parser.add_argument("--time", type=int, metavar="SECOND", help="second (UTC) of the request (default: now)")
    parser.add_context()
    parser.add_argument("--seen-too", action="store_true", help="also recommend items of the history")
    return parser


def run(args: argparse.Namespace) -> None:
    """Recommend and print.

    Raises:
        ValueError: no such run, checkpoint or user.
    """
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.serving.recommend import recommend

    with distributed_device() as device:
        found = recommend(
            args.run,
            args.user,
            args.top,
            device,
            which=args.checkpoint,
            time=args.time,
            include_seen=args.seen_too,
            dataset=args.dataset,
            context=args.context,
        )
    say(as_text(args.user, found, args.history))


def as_text(user: str, found: "Recommendations", history: int) -> str:
    """Format both lists, one line per item."""
    latest = found.history[-history:] if history else []
    lines = [f"user {printable(user)}, {len(found.history)} events, the latest {len(latest)}:"]
    lines += [f"     {_line(item)}" for item in latest]
    lines.append(f"recommended, with {found.scored_by}:")
    lines += [f"{rank:>4} {item.score:.3f}  {_line(item)}" for rank, item in enumerate(found.items, 1)]
    return "\n".join(lines)


def _line(item: "RecommendedItem") -> str:
    raw_id, text = printable(item.raw_id), printable(" ".join(item.text.split()))
    return f"{raw_id:<8} {text if len(text) <= WIDTH else text[: WIDTH - 1] + '…'}"


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
