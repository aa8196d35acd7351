"""Options and job of `hllm creatives import`: tables of existing personalized texts."""

import argparse
from collections import Counter
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, refuse_options_of_others

_OPTIONS = {
    "hllm_creator": ("files", "split"),
    "lamp": ("task", "questions", "outputs", "split"),
    "table": ("files", "drop_bad"),
}
"""Options of each source, in addition to those of all sources."""
_NEEDED = ("files", "task", "questions", "outputs")


def add_import_options(parser: CommandParser) -> None:
    """Add the options of `import`."""
    parser.add_argument(
        "--source",
        required=True,
        choices=list(_OPTIONS),
        help="hllm_creator (the published format) and lamp also make the dataset; table is for an existing dataset",
    )
    parser.add_argument("--files", nargs="+", type=Path, metavar="FILE", help="hllm_creator: Parquet; table: any table")
    parser.add_argument("--task", choices=("LaMP-4", "LaMP-5"), help="lamp: headlines of news, or titles of papers")
    parser.add_argument("--questions", nargs="+", type=Path, metavar="FILE", help="lamp: *_questions.json")
    parser.add_argument(
        "--outputs",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="lamp: *_outputs.json; the last of several files is the test part",
    )
    parser.add_argument(
        "--split",
        choices=("leave_one_out", "time"),
        help="hllm_creator, lamp: division of the dataset's events (default: leave_one_out)",
    )
    parser.add_argument("--drop-bad", action="store_true", default=None, help="table: leave out invalid rows")
    parser.add_fractions(0.7, 0.1, 0.2, help="shares of the users in each part")


def run_import(args: argparse.Namespace) -> None:
    """Import a table.

    Raises:
        ValueError: an option, a file or the dataset is not usable.
    """
    from hllm_torchrec.data.creative_table import check_fractions, check_name

    refuse_options_of_others(args, "source", args.source, _OPTIONS)
    for name in _NEEDED:
        if name in _OPTIONS[args.source] and getattr(args, name) is None:
            raise ValueError(f"--{name} is missing: --source {args.source} needs it")
    check_name(args.name)
    check_fractions(args.fractions)
    (_text_table if args.source == "table" else _with_dataset)(args)


def _with_dataset(args: argparse.Namespace) -> None:
    from hllm_torchrec.creative.imports.hllm_creator import read_hllm_creator
    from hllm_torchrec.creative.imports.lamp import read_lamp
    from hllm_torchrec.creative.imports.samples import import_samples

    if args.source == "lamp":
        samples, origin = read_lamp(args.task, args.questions, args.outputs), f"import:{args.task}"
    else:
        samples, origin = read_hllm_creator(args.files), "import:hllm_creator"
    split, fractions = args.split or "leave_one_out", tuple(args.fractions)
    made = import_samples(samples, args.dataset.absolute(), args.name, split, fractions, origin)
    say(f"{args.dataset}: the dataset of the histories (row order as time, every event positive)")
    _report(made.path, made.counts, made.left_out)
    if made.conflicts:
        say(f"caution: {made.conflicts:,} times an item has another title than before; the first one is kept")


def _text_table(args: argparse.Namespace) -> None:
    import numpy as np
    import pyarrow as pa

    from hllm_torchrec.creative.imports import text_table
    from hllm_torchrec.data.creative_table import split_by_user, write_table
    from hllm_torchrec.data.dataset import Dataset
    from hllm_torchrec.data.split import SPLITS

    dataset, rows = Dataset.open(args.dataset), text_table.read_text_table(args.files)
    reasons = text_table.reasons_of(rows, dataset)
    if not args.drop_bad:
        text_table.check_rows(rows, reasons, dataset)
    is_good = np.array([not reason for reason in reasons], bool)
    kept, dropped = rows.filter(pa.array(is_good)), rows.filter(pa.array(~is_good))
    why = pa.array([[reason] for reason in reasons if reason], pa.list_(pa.string()))
    dropped = dropped.append_column("reasons", why)
    if "origin" not in kept.column_names:
        kept = kept.append_column("origin", pa.array(["import:table"] * len(kept)))
    drawn = list(split_by_user(kept["raw_user_id"].to_pylist(), args.fractions))
    of_row = np.array(text_table.parts_of(kept, drawn))
    parts = {split: kept.filter(pa.array(of_row == split, pa.bool_())) for split in SPLITS}
    left_out = dict(sorted(Counter(reason for reason in reasons if reason).items()))
    facts = {"writer": "import:table", "left_out": left_out, "fractions": list(args.fractions)}
    path = write_table(dataset, args.name, parts, dropped, facts)
    _report(path, {split: len(part) for split, part in parts.items()}, left_out)
    if unseen := text_table.unseen_rows(kept, dataset):
        say(f"caution: {unseen:,} texts are not later than their user's first event: their users count as unknown")


def _report(path: Path, counts: dict[str, int], left_out: dict[str, int]) -> None:
    parts = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    say(f"{path}: {sum(counts.values()):,} texts ({parts}); {sum(left_out.values()):,} left out")
    for reason, count in left_out.items():
        say(f"  {count:,}: {reason}")
