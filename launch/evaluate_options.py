"""The part of `hllm evaluate` that knows about files of predictions of any origin: which columns are what."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hllm_torchrec.common.errors import did_you_mean

if TYPE_CHECKING:
    from hllm_torchrec.evaluation.prediction_rows import ColumnLayout, PredictionModel

STANDARD = {
    "label": "label",
    "weight": "weight",
    "user": "user_id",
    "item": "item_id",
    "timestamp": "timestamp",
    "history_length": "history_length",
    "item_is_cold": "item_is_cold",
}
"""Columns that are taken by themselves if the first model's files have them."""

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options on files of predictions."""
    group = parser.add_argument_group(
        "files of predictions",
        "Parquet or CSV with a label (0 or 1) and a score a row; all models on the same rows in one order. Columns "
        f"named {', '.join(STANDARD.values())} are used by themselves; NONE leaves one out.",
    )
    group.add_argument("--score", nargs="+", default=[], metavar="[NAME=]COLUMN", help="default: score")
    group.add_argument(
        "--probability", nargs="+", default=[], metavar="[NAME=]COLUMN", help="default: probability, if there"
    )
    for name, column in STANDARD.items():
        group.add_argument(f"--{name.replace('_', '-')}", metavar="COLUMN", help=f"default: {column}, if there")
    group.add_argument(
        "--slices", nargs="+", default=[], metavar="COLUMN", help="report every value of these columns apart"
    )
    group.add_argument("--train", nargs="+", default=[], metavar="PATH", help="training exposures, to find overlaps")
    group.add_argument(
        "--memory",
        type=size,
        default=1 << 30,
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


def is_own_format(paths: Mapping[str, Path], args: argparse.Namespace) -> bool:
    """Whether all are directories that `hllm evaluate` or `hllm baselines` wrote, and no column is renamed."""
    from hllm_torchrec.evaluation.model_comparison import COLUMNS
    from hllm_torchrec.evaluation.prediction_files import column_names

    renamed = [args.score, args.probability, args.slices, args.train, *(getattr(args, name) for name in STANDARD)]
    if any(renamed):
        return False
    for path in paths.values():
        parts = sorted(path.glob("part-*.parquet")) if path.is_dir() else []
        if not parts or not set(COLUMNS) <= set(column_names(parts[0])):
            return False
    return True


def describe(paths: Mapping[str, Path], args: argparse.Namespace) -> "tuple[list[PredictionModel], ColumnLayout]":
    """The models and the columns that the options and the files' own names give.

    Raises:
        ValueError: a name or column that is not there.
    """
    from hllm_torchrec.evaluation.prediction_files import column_names, find_files
    from hllm_torchrec.evaluation.prediction_rows import ColumnLayout, PredictionModel

    names = {name: column_names(find_files([path])[0]) for name, path in paths.items()}
    scores, probabilities = _by_model(args.score, paths, "--score"), _by_model(args.probability, paths, "--probability")
    models = []
    for name, path in paths.items():
        # a renamed score has no probability unless that is named too
        standard = "probability" if name not in scores and "probability" in names[name] else "NONE"
        probability = probabilities.get(name, standard)
        models.append(
            PredictionModel(name, (path,), scores.get(name, "score"), None if probability == "NONE" else probability)
        )
    first = next(iter(names.values()))
    layout = {name: _column(getattr(args, name), column, first) for name, column in STANDARD.items()}
    if layout["label"] is None:
        raise ValueError(f"no column 'label'; it has {', '.join(first)}; name the column of labels with --label")
    return models, ColumnLayout(**layout, slices=tuple(args.slices))  # type: ignore[arg-type]


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


def _column(given: str | None, standard: str, found: Sequence[str]) -> str | None:
    if given is not None:
        return None if given == "NONE" else given
    return standard if standard in found else None


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
