"""Sanity checks of evaluation results: warnings, and the overlap of test and training exposures."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.distributed.array_collectives import all_to_all, gather_objects, group_rank, in_step, world_size
from hllm_torchrec.evaluation.prediction_files import RowReader, find_files, identities, seconds_of
from hllm_torchrec.evaluation.prediction_layout import ColumnLayout

SMALL_CLASS = 30
"""A slice with fewer rows of one class is reported as tiny: its interval is wide, and an approximation."""

FEW_USERS = 50
SUSPICIOUS_AUC = 0.99
WIDER_RATIO = 1.25
MAX_NAMED = 6
READ_ROWS = 1 << 20


@dataclass(frozen=True)
class Overlap:
    """Number of evaluated exposures that are also in the training part."""

    exposures: int
    """Number of distinct exposures that were checked."""
    seen: int
    """Number of these that are in the training part."""
    keys: str
    """Names of the columns by which exposures are compared."""
    share: float
    """Share of all exposures that were checked: 1 if they fit into memory."""


def metric_warnings(metrics: Mapping[str, Any], overlap: Overlap | None = None) -> list[str]:
    """Warnings about `metrics`, the most serious first."""
    found = []
    if overlap and overlap.seen:
        found.append(
            f"Train/test overlap: {overlap.seen:,} of {overlap.exposures:,} exposures ({overlap.keys}) are in the "
            "training part too; a model may know their labels."
        )
    for name, model in metrics["models"].items():
        found += _model_warnings(name, model, metrics.get("weighted", False))
    for task, block in (metrics.get("tasks") or {}).items():
        if block["kind"] == "binary":
            for name, model in block["models"].items():
                found += _model_warnings(f"task {task}, {name}", model, block.get("weighted", False))
        elif "rows_ranked" in block:
            found.append(
                f"task {task}: Spearman and XAUC are of {block['rows_ranked']:,} random rows of {block['rows']:,}, as "
                "many as --memory holds."
            )
    found += _alike_rows(metrics)
    left_out = (metrics.get("bootstrap") or {}).get("left_out")
    if left_out:
        instead = "The interval over users is by formula." if metrics.get("users") else "Rows count as independent."
        found.append(f"No bootstrap over users: {left_out}. {instead}")
    if metrics.get("users") and metrics["users"] < FEW_USERS:
        found.append(f"Only {metrics['users']} users: intervals over users are rough.")
    found += _tiny_slices(metrics)
    if metrics.get("rows_without_user"):
        found.append(f"{metrics['rows_without_user']:,} rows without a user contribute to the AUC, but not to GAUC.")
    if metrics.get("rows_without_weight"):
        found.append(f"{metrics['rows_without_weight']:,} rows of weight 0 were left out.")
    return found


def _model_warnings(name: str, model: Mapping[str, Any], weighted: bool) -> list[str]:
    """Warnings about a model's metrics on one label."""
    found = []
    if model["auc"] is None:
        found.append(f"{name}: no AUC, the rows are of one class only.")
    elif model["auc"] > SUSPICIOUS_AUC:
        found.append(
            f"{name}: AUC {model['auc']:.4f} is above {SUSPICIOUS_AUC}: look for leakage, such as a feature "
            "that is known only after the label, or training on these rows."
        )
    return found + _off_calibration(name, model, weighted)


def _off_calibration(name: str, model: Mapping[str, Any], weighted: bool) -> list[str]:
    """A warning if the sum of probabilities differs from the number of positives by more than its 95% interval.

    The standard error of the sum is estimated from the rows' residuals, sqrt(rows * Brier). With weights, whose squares
    are not known here, twice this error is allowed.
    """
    ratio, brier, positives = (model.get(key) for key in ("calibration", "brier", "positives"))
    if ratio is None or brier is None or not positives:
        return []
    half = 1.96 * (2 if weighted else 1) * math.sqrt(model["rows"] * brier) / positives
    if abs(ratio - 1) <= half:
        return []
    return [
        f"{name}: calibration {ratio:.3f} is outside its interval around 1 [{1 - half:.3f}, {1 + half:.3f}]: "
        "`hllm calibrate` corrects the probabilities of a run; data.negative_rate and sampling_rate do so for "
        "thinned-out negatives."
    ]


def _alike_rows(metrics: Mapping[str, Any]) -> list[str]:
    wider = {
        name: model["clustered_se"] / model["auc_se"]
        for name, model in metrics["models"].items()
        if model.get("auc_se") and model.get("clustered_se") and model["clustered_se"] > WIDER_RATIO * model["auc_se"]
    }
    if not wider:
        return []
    times = ", ".join(f"{name} {factor:.1f}" for name, factor in wider.items())
    return [
        "Rows of one user resemble each other: with users as independent units the standard errors are larger than "
        f"DeLong's (rows as independent), by these factors: {times}. Trust the wider intervals."
    ]


def _tiny_slices(metrics: Mapping[str, Any]) -> list[str]:
    model = metrics["models"].get(metrics.get("reference")) or {}
    tiny = [
        f"{name} ({block['rows']:,})"
        for name, block in (model.get("slices") or {}).items()
        if 0 < block["rows"] and min(block["positives"], block["rows"] - block["positives"]) < SMALL_CLASS
    ]
    if not tiny:
        return []
    more = f" and {len(tiny) - MAX_NAMED} more" if len(tiny) > MAX_NAMED else ""
    return [
        f"Tiny slices, with fewer than {SMALL_CLASS} rows of a class: {', '.join(tiny[:MAX_NAMED])}{more}; do not "
        "conclude from them."
    ]


def file_overlap(
    test: Sequence[str | Path], train: Sequence[str | Path], layout: ColumnLayout, memory: int, folder: Path
) -> Overlap:
    """Compare the exposures of prediction files with training files that have the same columns. Collective.

    The column of times is part of the key if both have it; without it, a repeated purchase counts as an overlap.

    Raises:
        ValueError: the layout or the files do not have columns of users and items.
    """
    if not (layout.user and layout.item):
        raise ValueError("--train needs columns of users and items in all files; name them with --user and --item")
    columns, times = [layout.user, layout.item], layout.timestamp
    readers = [RowReader(find_files(files), columns, folder) for files in (test, train)]
    if times and all(reader.has(times) for reader in readers):
        columns.append(times)
        readers = [RowReader(find_files(files), columns, folder, [times]) for files in (test, train)]
    names = "user, item" if len(columns) == 2 else "user, item, time"

    def keys(reader: RowReader) -> Iterator[np.ndarray]:
        for table in reader.batches(*own_rows(reader.rows), READ_ROWS):
            users, items, *seconds = (table[column] for column in columns)
            yield hash_columns(identities(users), identities(items), *map(seconds_of, seconds))

    return count_overlap(keys(readers[0]), keys(readers[1]), readers[0].rows, memory, names)


def own_rows(rows: int) -> tuple[int, int]:
    """(first, end) of this rank's range of `rows` rows."""
    rank, ranks = group_rank(), world_size()
    return rows * rank // ranks, rows * (rank + 1) // ranks


def count_overlap(
    test: Iterable[np.ndarray], train: Iterable[np.ndarray], rows: int, memory: int, names: str
) -> Overlap:
    """Count the distinct test keys that are among the training keys. Collective.

    Each rank passes its share of both parts, and looks up a share of all keys. If the keys do not fit into `memory`, a
    sample of one in `1 / share` keys is checked.

    Args:
        test, train: this rank's keys (hashes, uint64) in chunks.
        rows: number of test keys of all ranks.
        memory: bytes per rank; sorting needs 32 bytes per key.
        names: names of the key's columns, for the result.
    """
    ranks = world_size()
    one_in = np.uint64(max(1, -(-rows * 32 // (ranks * max(memory, 1)))))

    def dealt(shares: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        # Sampling by the key, not by the row, selects the same keys in both parts. Equal keys go to the same rank.
        for share in in_step(iter(shares)):
            keys = np.empty(0, np.uint64) if share is None else share[share % one_in == 0]
            owner = (keys // one_in % np.uint64(ranks)).astype(np.int64)
            order = np.argsort(owner, kind="stable")
            sent = np.bincount(owner, minlength=ranks).tolist()
            yield all_to_all(keys[order].view(np.int64), sent).view(np.uint64)

    wanted = np.unique(np.concatenate([*dealt(test), np.empty(0, np.uint64)]))
    hit = np.zeros(len(wanted), dtype=bool)
    for keys in dealt(train):
        # searchsorted returns len(wanted) for keys larger than all wanted ones: clip before indexing.
        at = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
        if len(wanted):
            hit[at[wanted[at] == keys]] = True
    exposures, seen = np.sum(gather_objects((len(wanted), int(hit.sum()))), axis=0).tolist()
    return Overlap(exposures, seen, names, 1 / int(one_in))
