"""`hllm create`: generates titles of items for clusters of users, which a service then looks up.

hllm create --run runs/creator/ml100k --clusters stores/clusters --top 8 --output stores/titles
torchrun --nproc_per_node 2 -m hllm_torchrec.launch.create --run-dir runs/creator/ml100k ... --output stores/titles

A repeated or restarted job generates only the titles that the folder lacks.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point, natural

if TYPE_CHECKING:
    from hllm_torchrec.common.arrays import Ints
    from hllm_torchrec.creative.generate import CreateReport
    from hllm_torchrec.creative.title_writer import CreateOptions
    from hllm_torchrec.data.dataset import Dataset


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm create", description=__doc__)
    parser.add_run()
    parser.add_argument(
        "--clusters", type=Path, required=True, metavar="DIR", help="folder of clusters, written by `hllm cluster`"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the titles")
    parser.add_argument(
        "--items",
        type=Path,
        metavar="FILE",
        help="raw item ids, one per line; titles of other items stay (default: all items)",
    )
    pairs = parser.add_argument_group("selection of clusters")
    pairs.add_argument(
        "--match",
        choices=("head", "predictor", "none"),
        default="head",
        help="probability that a cluster likes an item: by the late-fusion head (default), or by the predictor of "
        "creative.losses.match; none: all clusters",
    )
    pairs.add_argument(
        "--top", type=natural, default=0, metavar="N", help="select the N best clusters of an item (default: 0, all)"
    )
    pairs.add_argument(
        "--above",
        type=float,
        default=0.0,
        metavar="P",
        help="select only clusters with at least this probability (default: 0)",
    )
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--temperature", type=float, default=0.0, help="temperature of sampling; 0: greedy decoding (default)"
    )
    texts.add_argument(
        "--top-k",
        type=natural,
        default=50,
        metavar="K",
        help="sample from the K likeliest tokens; 0: from all (default: 50)",
    )
    texts.add_argument(
        "--top-p", type=float, default=0.95, help="sample from the likeliest tokens of this total mass (default: 0.95)"
    )
    texts.add_argument(
        "--guidance",
        type=float,
        default=0.0,
        metavar="G",
        help="choose tokens by (1 + G) times their logits with the user minus G times those without (default: 0)",
    )
    texts.add_argument("--seed", type=natural, default=0, help="seed of sampled titles (default: 0)")
    texts.add_argument(
        "--retries",
        type=natural,
        default=2,
        help="further samples of a title that breaks a rule, if --temperature is above 0 (default: 2)",
    )
    texts.add_argument(
        "--source",
        metavar="COLUMN",
        help="text column that replaces a title that breaks a rule (default: title, else the first text column)",
    )
    texts.add_argument(
        "--support",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="minimum share of a title's names, numbers and content words that the item's texts contain (default: 1)",
    )
    texts.add_argument(
        "--no-filters",
        action="store_true",
        help="accept every non-empty title that ends with an end-of-sequence token",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Generate the missing titles, and print counts and the reasons for replaced titles.

    Raises:
        ValueError: the run, the clusters or an item does not exist, or the options do not fit them.
    """
    from hllm_torchrec.common.text_files import read_list
    from hllm_torchrec.creative.clusters import Clusters
    from hllm_torchrec.creative.generate import create_titles
    from hllm_torchrec.distributed.coordination import rank
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.evaluation.run_loader import load_run, run_config
    from hllm_torchrec.serving.scorer_loading import in_one_process

    options = _options(args)
    clusters, ids = Clusters.open(args.clusters), None if args.items is None else read_list(args.items)
    with distributed_device() as device:
        # Every rank loads the complete weights, because each rank generates its share of the titles independently.
        config = in_one_process(run_config(args.run, args.dataset))
        loaded = load_run(args.run, args.checkpoint, device, config)
        with loaded.weights:
            items = None if ids is None else _dense(loaded.experiment.dataset, ids, args.items)
            report = create_titles(loaded, clusters, args.output, options, items)
    if rank() != 0:
        return
    _print(report, args.output)
    if clusters.is_behind:
        say("caution: the store of users has changed since they were clustered: assign them again (hllm cluster)")


def _options(args: argparse.Namespace) -> "CreateOptions":
    """Return the options of the job. Raises ValueError for a number outside its range."""
    from hllm_torchrec.creative.filters import TextRules
    from hllm_torchrec.creative.pairs import PairRule
    from hllm_torchrec.creative.title_writer import CreateOptions

    if not (
        0 <= args.temperature < 100
        and 0 <= args.guidance < 100
        and 0 < args.top_p <= 1
        and 0 <= args.above <= 1
        and 0 <= args.support <= 1
    ):
        raise ValueError(
            "--temperature and --guidance must be from 0 to below 100, --top-p above 0 and at most 1, --above and "
            "--support from 0 to 1"
        )
    return CreateOptions(
        PairRule(args.match, args.top, args.above),
        args.temperature,
        args.top_k,
        args.top_p,
        args.guidance,
        args.seed,
        args.retries,
        args.source,
        None if args.no_filters else TextRules(support=args.support),
    )


def _print(report: "CreateReport", output: Path) -> None:
    """Print the counts of titles and the reasons for replaced ones."""
    say(
        f"{output}: {report.titles:,} titles of {report.items:,} items, {report.generated:,} of them new; "
        f"{report.fallbacks:,} are the item's own text"
    )
    for reason, number in report.reasons.items():
        say(f"replaced: {number:,}: {reason}")
    if report.too_long:
        say(f"left out: {report.too_long:,} items whose prompts are longer than creative.max_prompt_length")
    if not report.titles:
        say("caution: there are no titles")
    elif report.fallbacks == report.titles:
        say("caution: no title passes the rules: every title is the item's own text")
    elif report.equal_to_null is None:
        say("caution: there are no generated titles for clusters: nothing is personal")
    elif report.equal_to_null == 1:
        say("caution: all generated titles for clusters equal the item's title for everybody: nothing is personal")
    else:
        say(f"{report.equal_to_null:.1%} of the generated titles for clusters equal the item's title for everybody")


def _dense(dataset: "Dataset", raw_ids: list[str], file: Path) -> "Ints":
    """Return the ascending dense ids of raw item ids, which were read from `file`."""
    import numpy as np
    import pyarrow as pa

    from hllm_torchrec.data.creative_table import dense_ids

    return np.unique(dense_ids(pa.chunked_array([pa.array(raw_ids, pa.string())]), dataset, "item", file))


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
