"""`hllm cluster`: fits clusters to the user vectors of a store, and assigns the users to them.

hllm cluster --users stores/users --clusters 64 --output stores/clusters
hllm cluster --users stores/users --output stores/clusters

The second command assigns all users of the store to the existing clusters, whose titles stay valid. `--refit` fits new
clusters; settings that are not given are those of the previous ones. Then run `hllm create` for their titles.
"""

import argparse
import sys
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point, natural, positive


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm cluster", description=__doc__)
    parser.add_argument(
        "--users", type=Path, required=True, metavar="STORE", help="store of users (hllm embed --users)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the clusters")
    parser.add_argument("--clusters", type=positive, metavar="K", help="number of clusters of a fit")
    parser.add_argument(
        "--metric",
        choices=("euclidean", "standardized", "cosine"),
        help="distance between vectors minus their mean (default: euclidean); standardized: after division by the "
        "standard deviation of each dimension",
    )
    parser.add_argument(
        "--center",
        choices=("mean", "medoid"),
        help="vector that represents a cluster in prompts: mean of its users' vectors (default), or medoid, the vector "
        "of the user nearest to the fitted center",
    )
    parser.add_argument(
        "--least",
        type=natural,
        metavar="N",
        help="dissolve clusters with fewer users, because titles for a small cluster may reveal a person (default: 10)",
    )
    parser.add_argument("--seed", type=natural, help="random seed of the sample and the fit (default: 0)")
    parser.add_argument("--refit", action="store_true", help="fit again; earlier titles are then invalid")
    return parser


def run(args: argparse.Namespace) -> None:
    """Fit clusters or assign users, and print a summary.

    Raises:
        ValueError: see `cluster_users`.
    """
    from hllm_torchrec.creative.cluster_fit import cluster_users, settings_with

    names = ("clusters", "metric", "center", "least", "seed")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    report = cluster_users(args.users, args.output, settings_with(args.output, given), args.refit)
    sizes, facts = report.clusters.sizes, report.clusters.facts
    say(
        f"{args.output}: {report.users:,} users in {sizes.size} clusters of {sizes.min():,} to {sizes.max():,} users, "
        f"mean distance {facts['mean_distance']:.4f}"
    )
    if report.new or report.moved or report.gone:
        say(f"{report.new:,} new users, {report.moved:,} moved to another cluster, {report.gone:,} gone")
    for note in report.notes:
        say(note)


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
