"""The part of `hllm evaluate` that knows about files of predictions of any origin: which columns are what."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.evaluation.prediction_layout import STANDARD_COLUMNS

if TYPE_CHECKING:
    from hllm_torchrec.evaluation.prediction_layout import ColumnLayout, PredictionModel

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options on files of predictions."""
    group = parser.add_argument_group(
        "files of predictions",
        "Parquet or CSV with a label (0 or 1) and a score a row; all models on the same rows in one order. Columns "
        f"named {', '.join(STANDARD_COLUMNS.values())} are used by themselves; NONE leaves one out.",
    )
    group.add_argument("--score", nargs="+", default=[], metavar="[NAME=]COLUMN", help="default: score")
    group.add_argument(
        "--probability", nargs="+", default=[], metavar="[NAME=]COLUMN", help="default: probability, if there"
    )
    for name, column in STANDARD_COLUMNS.items():
        group.add_argument(f"--{name.replace('_', '-')}", metavar="COLUMN", help=f"default: {column}, if there")
    group.add_argument(
        "--slices", nargs="+", default=[], metavar="COLUMN", help="report every value of these columns apart"
    )
    group.add_argument("--train", nargs="+", default=[], metavar="PATH", help="training exposures, to find overlaps")
    group.add_argument(
        "--memory",
        type=size,
        help="for rows, on each rank, e.g. 512M (default: 1G); more goes to disk",
    )
    group.add_argument("--spill", metavar="DIR", help="where it goes (default: the system's temporary folder)")


def size(text: str) -> int:
    """Bytes: `512M` → 536870912.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    match = re.fullmatch(r"(\d+)([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, or 512M, or 4G")
    return int(match[1]) * UNITS[match[2].upper()]


def is_own_format(paths: Mapping[str, Path]) -> bool:
    """Whether all are directories that `hllm evaluate` or `hllm baselines` wrote."""
    from hllm_torchrec.evaluation.prediction_files import column_names
    from hllm_torchrec.evaluation.prediction_pairing import PAIR_COLUMNS

    for path in paths.values():
        parts = sorted(path.glob("part-*.parquet")) if path.is_dir() else []
        if not parts or not {*PAIR_COLUMNS, "item_id", "label", "score", "probability"} <= set(column_names(parts[0])):
            return False
    return True


def describe(paths: Mapping[str, Path], args: argparse.Namespace) -> "tuple[list[PredictionModel], ColumnLayout]":
    """The models and the columns that the options and the files' own names give.

    Raises:
        ValueError: a name or column that is not there.
    """
    from hllm_torchrec.evaluation.prediction_layout import describe_predictions

    return describe_predictions(
        paths,
        scores=_by_model(args.score, paths, "--score"),
        probabilities=_by_model(args.probability, paths, "--probability"),
        columns={name: given for name in STANDARD_COLUMNS if (given := getattr(args, name)) is not None},
        slices=args.slices,
    )


def refuse_without_effect(args: argparse.Namespace, ranks_exposures: bool) -> None:
    """Raise ValueError for an option that the other options leave without an effect.

    ranks_exposures: whether there are predictions at all; a generative run without others to compare has none.
    """
    if args.checkpoint is not None and args.run is None:
        raise ValueError(f"--checkpoint {args.checkpoint} is of a run; name it with --run-dir, or leave it out")
    for option in ("max_drop", "on_unsure"):
        if getattr(args, option) is not None and args.baseline is None:
            raise ValueError(f"--{option.replace('_', '-')} is the gate's; name what to pass against with --baseline")
    if ranks_exposures:
        return
    for option in ("score", "probability", "slices", "train", "memory", "spill", "baseline", *STANDARD_COLUMNS):
        if getattr(args, option):
            raise ValueError(
                f"--{option.replace('_', '-')}: {args.run} ranks items only (objective.fusion: none), and no scored "
                "exposures are compared; leave the option out"
            )


def files_provenance(models: "Sequence[PredictionModel]") -> dict[str, Any]:
    """Model → its files, its columns and the fingerprint of their content."""
    from hllm_torchrec.evaluation.prediction_files import find_files, fingerprint_files

    found: dict[str, Any] = {}
    for model in models:
        files = find_files(model.files)
        found[model.name] = {
            "files": [str(file) for file in files],
            "score": model.score,
            "probability": model.probability,
            "fingerprint": fingerprint_files(files),
        }
    return found


def _by_model(entries: Sequence[str], models: Mapping[str, Path], option: str) -> dict[str, str]:
    """`[NAME=]COLUMN` entries by model; without a name the column is that of all models."""
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, column = entry.partition("=")
        if not equals:
            found |= dict.fromkeys(models, entry)
        elif name not in models:
            raise ValueError(
                f"{option} {entry}: no model {name!r}{did_you_mean(name, models)}; there are {list(models)}"
            )
        else:
            found[name] = column
    return found
