"""`hllm plan`: estimates memory, traffic and time per step of a configuration on hardware that need not be available.

    hllm plan --config configs/paper/books_hllm_7b.yaml --nodes 4 --gpus 8 --items 695762 --users 694898
    hllm plan --config configs/ml100k/trained.yaml --nodes 1 --gpus 2 --hardware cpu

The numbers of items and users come from the configuration's dataset if it is prepared. Options of the configuration
(--parallel.dense fsdp) can be changed on the command line.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point, positive, positive_number

if TYPE_CHECKING:
    from hllm_torchrec.config.schema import Config
    from hllm_torchrec.data.dataset import Dataset
    from hllm_torchrec.planning.estimate import Estimate, Machine, Workload

UNKNOWN_ROWS = 1000
"""Assumed number of rows of a categorical feature's table if there is no dataset."""


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm plan", description=__doc__)
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="configuration file; options such as --parallel.dense override its fields",
    )
    parser.add_argument("--nodes", type=positive, default=1, help="number of hosts (default: 1)")
    parser.add_argument("--gpus", type=positive, default=8, help="ranks per host (default: 8)")
    parser.add_argument(
        "--hardware", choices=("h100", "a100", "cpu"), default="h100", help="device of a rank (default: h100)"
    )
    parser.add_argument(
        "--memory", type=positive_number, metavar="GB", help="memory of a rank (default: the hardware's)"
    )
    parser.add_argument("--items", type=positive, help="number of items (default: the dataset's)")
    parser.add_argument("--users", type=positive, help="number of users (default: the dataset's)")
    parser.add_argument(
        "--item-tokens",
        type=positive_number,
        help="mean tokens per text (default: the dataset's, or item_llm.max_text_length)",
    )
    parser.add_argument(
        "--history",
        type=positive_number,
        help="mean events per piece of a user's sequence (default: the dataset's, or data.max_history)",
    )
    parser.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="FEATURE=N",
        help="rows of a feature's table if there is no dataset (repeatable; default: 1,000)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def run(args: argparse.Namespace, options: list[str]) -> int:
    """Estimate and print; return 0 if the model fits into nine tenths of the memory (`FILLED`), else 1.

    Raises:
        ValueError: the configuration is invalid, the shape of a model is unknown; or see `workload`.
    """
    from hllm_torchrec.common.warning_filters import quiet_libraries
    from hllm_torchrec.config.loading import load_config
    from hllm_torchrec.planning.estimate import FILLED, HARDWARE, Machine, advice, estimate

    quiet_libraries()
    config = load_config(["--config", args.config, *options])
    machine = Machine(args.nodes, args.gpus, **HARDWARE[args.hardware])
    if args.memory:
        machine = dataclasses.replace(machine, memory=args.memory * 1e9)
    work, tables = workload(args, config)
    found = estimate(config, work, machine, tables)
    if args.json:
        say(json.dumps(dataclasses.asdict(found) | {"peak": found.peak, "machine": dataclasses.asdict(machine)}))
    else:
        say(as_text(config, work, machine, found))
        say("\n".join(advice(config, found, machine)))
    return int(found.peak > FILLED * machine.memory)


def workload(args: argparse.Namespace, config: "Config") -> tuple["Workload", dict[str, int]]:
    """Workload and rows of the tables, from the dataset or from the options.

    Raises:
        ValueError: neither has the numbers of items and users; or `--rows` is invalid, or given although the dataset
            is prepared.
    """
    from hllm_torchrec.data.dataset import Dataset
    from hllm_torchrec.models.assembly import batch_spec_of
    from hllm_torchrec.planning.estimate import Workload

    tokens = float(config.item_llm.max_text_length)
    history, busiest = args.history or float(config.data.max_history), 1.0
    popularity = None
    if (Path(config.data.dataset) / "manifest.json").is_file():
        if args.rows:
            raise ValueError(
                f"--rows {args.rows[0]}: not needed, because {config.data.dataset} is prepared and has the numbers of "
                "rows: leave out --rows"
            )
        dataset = Dataset.open(config.data.dataset, config.data.version)
        tables = batch_spec_of(config, dataset).tables(dataset)
        counts = dataset.manifest["counts"]
        items, users = args.items or counts["items"], args.users or counts["users"]
        if not args.history:
            history, busiest = passes(dataset, config, args.nodes * args.gpus)
        tokens = min(tokens, mean_tokens(dataset.root, config) or tokens)
        # With another number of items the dataset's item frequencies do not apply.
        popularity = None if args.items else dataset.training_item_counts()[1:]
    else:
        if not (args.items and args.users):
            raise ValueError(
                f"{config.data.dataset}: not prepared here: give the numbers of items and users with --items and "
                "--users"
            )
        items, users, tables = args.items, args.users, guessed_tables(config) | rows_of(args.rows, config)
    if config.features.item_id and "item_id" in tables:
        tables["item_id"] = items + 1
    return Workload(items, users, args.item_tokens or tokens, history, popularity, busiest), tables


def passes(dataset: "Dataset", config: "Config", world: int) -> tuple[float, float]:
    """Return, for the planned stage, (mean events per piece, events of an epoch's largest step / those of a mean step).

    A step of all ranks has n pieces; the standard deviation of their total events is sqrt(n) times that of one piece.
    The largest of an epoch's S such sums is about sqrt(2 ln S) standard deviations above the mean (Gaussian extremes),
    and at most n times the longest piece.
    """
    import numpy as np

    from hllm_torchrec.data.pieces import cut_into_pieces
    from hllm_torchrec.planning.estimate import planned_stage

    stage, lengths = planned_stage(config), []
    for group in dataset.row_groups("train"):
        users = dataset.sequences([group], ["target_start", "actions"])
        rows, most = np.arange(users.target_start.size), stage.max_history or config.data.max_history
        pieces_of_group = cut_into_pieces(np.zeros_like(rows), rows, users.lengths, users.target_start, most)
        lengths.append(pieces_of_group.lengths)
    pieces = np.concatenate(lengths)
    mean, together = float(pieces.mean()), (stage.batch_users or config.data.batch_users) * world
    above = math.sqrt(2 * math.log(max(1.0, pieces.size / together)) / together) * float(pieces.std())
    return mean, min(mean + above, float(pieces.max())) / mean


def mean_tokens(root: Path, config: "Config") -> float | None:
    """Mean tokens per text of the dataset's token store with the configured settings, else of the one with the longest
    texts; None if there is no token store.

    Tokens of a shared prefix are not counted if the prefix is encoded once for all items.
    """
    from hllm_torchrec.data.token_store import TokenStore
    from hllm_torchrec.models.text_format import text_format
    from hllm_torchrec.planning.model_configs import with_model_configs

    item, found = config.item_llm, []
    if not item.enabled:
        return None
    is_here = item.pretrained is not None and (Path(item.pretrained) / "config.json").is_file()
    form = text_format("item_llm", item if is_here else with_model_configs(config).item_llm)
    for path in root.glob("tokens/*/store.json"):
        store = TokenStore.open(path.parent)
        configured = (form.prompt, list(item.text_keys), item.separator, item.max_text_length)
        is_same = configured == tuple(store.facts[name] for name in ("prompt", "keys", "separator", "max_text_length"))
        shared = store.begins_with_prefix.mean() * len(store.prefix) if item.share_prefix and form.causal else 0.0
        found.append((is_same, float(store.lengths.mean() - shared)))
    # True sorts after False: texts tokenized with the configured settings take precedence over longer ones.
    return max(found)[1] if found else None


def guessed_tables(config: "Config") -> dict[str, int]:
    """Table -> rows, for a configuration whose dataset is not available; sizes of features are assumed."""
    names = [*config.data.item_features, *config.data.user_features]
    tables = dict.fromkeys(names, UNKNOWN_ROWS)
    if config.features.item_id:
        tables["item_id"] = UNKNOWN_ROWS
    if config.features.action:
        tables["action"] = 16
    return tables


def rows_of(given: list[str], config: "Config") -> dict[str, int]:
    """Rows of tables given by `--rows`.

    Raises:
        ValueError: an entry names a feature that the configuration does not have, or its number is invalid.
    """
    found, known = {}, [*config.data.item_features, *config.data.user_features]
    for entry in given:
        name, _, rows = entry.partition("=")
        if name not in known or not rows.isdigit() or int(rows) < 1:
            raise ValueError(f"--rows {entry}: must be FEATURE=N; features are {', '.join(known) or 'none'}")
        found[name] = int(rows)
    return found


def collective(name: str, config: "Config") -> str:
    """Name of the collective of a part of a step's traffic."""
    if name == "gradients":
        return "all-reduce" if config.parallel.dense == "ddp" else "reduce-scatter"
    if name == "weights":
        return "all-gather"
    return "all-to-all, reduce-scatter" if name.startswith("table rows") else "all-to-all"


def largest_shards(estimate: "Estimate") -> dict[str, str]:
    """Table -> description of its largest shard."""
    largest: dict[str, tuple[int, int]] = {}
    for name, _, rows, columns in estimate.shards:
        largest[name] = max(largest.get(name, (0, 0)), (rows, columns))
    return {name: f", up to {rows:,} rows x {columns} each" for name, (rows, columns) in largest.items()}


def as_text(config: "Config", work: "Workload", machine: "Machine", estimate: "Estimate") -> str:
    """Format the estimate as a table."""
    counts = estimate.counts
    lines = [
        f"{config.output}: {machine.nodes} x {machine.ranks} ranks of {machine.memory / 1e9:.0f} GB; "
        f"{work.items:,} items of {work.item_tokens:.0f} tokens, {work.users:,} users",
        f"a step of a rank: {counts['pieces']:.0f} pieces of users' sequences, {counts['positions']:,.0f} events, "
        f"{counts['encoded_items']:,.0f} items encoded ({counts['item_tokens']:,.0f} tokens), "
        f"{counts['negatives']:,.0f} negatives",
        "",
        "memory of the fullest rank",
        *(f"  {name:<18} {_bytes(size):>10}" for name, size in estimate.memory.items() if size),
        f"  {'together':<18} {_bytes(estimate.peak):>10}  of {_bytes(machine.memory)}",
        "sent by a rank in a step",
        *(
            f"  {name:<20} {_bytes(size):>8}  {collective(name, config)}"
            for name, size in estimate.traffic.items()
            if size
        ),
        "seconds of a step",
        f"  {'compute':<18} {estimate.seconds['compute']:>10.4f}  at {machine.efficiency:.0%} of "
        f"{machine.flops / 1e12:,.0f} TFLOP/s",
        f"  {'traffic':<18} {estimate.seconds['traffic']:>10.4f}  at {machine.bandwidth / 1e9:,.0f} GB/s, "
        f"and {machine.intra / 1e9:,.0f} GB/s within a node",
        f"  {'a step':<18} {max(estimate.seconds.values()):>10.4f}  if all traffic overlaps with compute, "
        f"{sum(estimate.seconds.values()):.4f} if none does",
    ]
    shards = largest_shards(estimate)
    if estimate.tables:
        lines += ["tables", *(f"  {name:<18} {place}{shards.get(name, '')}" for name, place in estimate.tables.items())]
    return "\n".join(lines)


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"


main = entry_point(build_parser, run, takes_options=True)

if __name__ == "__main__":
    sys.exit(main())
