"""Options of `hllm evaluate` for prediction files of any origin: columns, slices, memory."""

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
    """Add the options for prediction files."""
    group = parser.add_argument_group(
        "prediction files",
        "Parquet or CSV with a label (0 or 1) and a score per row; all models need the same rows in the same order. "
        f"Columns named {', '.join(STANDARD_COLUMNS.values())} are used automatically; NONE ignores a column.",
    )
    group.add_argument(
        "--score", nargs="+", default=[], metavar="[NAME=]COLUMN", help="column of scores (default: score)"
    )
    group.add_argument(
        "--probability",
        nargs="+",
        default=[],
        metavar="[NAME=]COLUMN",
        help="column of probabilities (default: probability, if it exists)",
    )
    for name, column in STANDARD_COLUMNS.items():
        group.add_argument(
            f"--{name.replace('_', '-')}", metavar="COLUMN", help=f"column to use (default: {column}, if it exists)"
        )
    group.add_argument(
        "--slices", nargs="+", default=[], metavar="COLUMN", help="report every value of these columns separately"
    )
    group.add_argument(
        "--train", nargs="+", default=[], metavar="PATH", help="training exposures, to find overlaps and cold items"
    )
    group.add_argument(
        "--memory",
        type=size,
        help="memory for rows on each rank, e.g. 512M (default: 1G); further rows are spilled to disk",
    )
    group.add_argument(
        "--spill", type=Path, metavar="DIR", help="directory for spilled rows (default: the system's temporary folder)"
    )


def size(text: str) -> int:
    """Parse a number of bytes: `512M` -> 536870912.

    Raises:
        argparse.ArgumentTypeError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+)([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write bytes, or 512M, or 4G")
    return int(match[1]) * UNITS[match[2].upper()]


def is_own_format(paths: Mapping[str, Path]) -> bool:
    """True if all paths are directories written by `hllm evaluate` or `hllm baselines`."""
    from hllm_torchrec.evaluation.prediction_files import column_names
    from hllm_torchrec.evaluation.prediction_pairing import PAIR_COLUMNS

    for path in paths.values():
        parts = sorted(path.glob("part-*.parquet")) if path.is_dir() else []
        if not parts or not {*PAIR_COLUMNS, "item_id", "label", "score", "probability"} <= set(column_names(parts[0])):
            return False
    return True


def describe(paths: Mapping[str, Path], args: argparse.Namespace) -> "tuple[list[PredictionModel], ColumnLayout]":
    """Models and column layout, from the options and the names of the files' columns.

    Raises:
        ValueError: a model name or column does not exist.
    """
    from hllm_torchrec.evaluation.prediction_layout import describe_predictions

    return describe_predictions(
        paths,
        scores=_by_model(args.score, paths, "--score"),
        probabilities=_by_model(args.probability, paths, "--probability"),
        columns={name: given for name in STANDARD_COLUMNS if (given := getattr(args, name)) is not None},
        slices=args.slices,
    )


def check_paths(args: argparse.Namespace) -> None:
    """Raise ValueError for a path that cannot be written or read, before anything is scored."""
    for option, folder in (("--output", args.output), ("--spill", args.spill)):
        existing = next((path for path in (folder, *folder.parents) if path.exists()), None) if folder else None
        if existing is not None and not existing.is_dir():
            raise ValueError(f"{option} {folder}: {existing} is a file; name a directory")
    if args.spill is not None and not args.spill.is_dir():
        raise ValueError(f"--spill {args.spill}: no such directory; create it, or leave the option out")
    for path in map(Path, args.train):
        if not path.exists():
            raise ValueError(f"--train {path} is not a file or a directory")


def refuse_without_effect(args: argparse.Namespace, ranks_exposures: bool) -> None:
    """Raise ValueError for an option that has no effect with the other options.

    ranks_exposures: True if there are predictions; a generative run without models to compare has none.
    """
    for option in ("checkpoint", "dataset"):
        if getattr(args, option) is not None and args.run is None:
            given = f"--{option} {getattr(args, option)}"
            raise ValueError(f"{given} applies to a run; name the run with --run-dir, or leave the option out")
    for option in ("max_drop", "max_gauc_drop", "max_task_drop", "on_unsure"):
        if getattr(args, option) is not None and args.baseline is None:
            raise ValueError(
                f"--{option.replace('_', '-')} belongs to the regression gate; name its reference with --baseline"
            )
    if ranks_exposures:
        return
    for option in ("score", "probability", "slices", "train", "memory", "spill", "baseline", *STANDARD_COLUMNS):
        if getattr(args, option):
            raise ValueError(
                f"--{option.replace('_', '-')}: {args.run} ranks items only (objective.fusion: none), and no scored "
                "exposures are compared; leave the option out"
            )


def files_provenance(models: "Sequence[PredictionModel]") -> dict[str, Any]:
    """Model name -> its files, its columns of scores and probabilities, and a fingerprint of the files' content."""
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
    """Assign `[NAME=]COLUMN` entries to models; an entry without a name applies to all models."""
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
