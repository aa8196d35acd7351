"""What a reader of the numbers should be warned of."""

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
"""Fewer rows of a class than this make a slice tiny: its interval is wide and rests on an approximation."""

FEW_USERS = 50
SUSPICIOUS_AUC = 0.99
WIDER_RATIO = 1.25
MAX_NAMED = 6
READ_ROWS = 1 << 20


@dataclass(frozen=True)
class Overlap:
    """Exposures of the test part that the training part has too."""

    exposures: int
    """Distinct exposures looked at."""
    seen: int
    """Those of them that the training part has."""
    keys: str
    """What makes two exposures the same."""
    share: float
    """Share of all exposures that were looked at: 1 if the memory held them."""


def metric_warnings(metrics: Mapping[str, Any], overlap: Overlap | None = None) -> list[str]:
    """Warnings, the gravest first; empty if there are none."""
    found = []
    if overlap and overlap.seen:
        found.append(
            f"Train/test overlap: {overlap.seen:,} of {overlap.exposures:,} exposures ({overlap.keys}) are in the "
            "training part too; a model may know their labels."
        )
    for name, model in metrics["models"].items():
        if model["auc"] is None:
            found.append(f"{name}: no AUC, the rows are of one class only.")
        elif model["auc"] > SUSPICIOUS_AUC:
            found.append(
                f"{name}: AUC {model['auc']:.4f} is above {SUSPICIOUS_AUC}: look for leakage, such as a feature "
                "that is known only after the label, or training on these rows."
            )
    found += _alike_rows(metrics)
    left_out = (metrics.get("bootstrap") or {}).get("left_out")
    if left_out:
        instead = "The interval over users is by formula." if metrics.get("users") else "Rows count as independent."
        found.append(f"No bootstrap over users: {left_out}. {instead}")
    if metrics.get("users") and metrics["users"] < FEW_USERS:
        found.append(f"Only {metrics['users']} users: intervals over users are rough.")
    found += _tiny_slices(metrics)
    if metrics.get("rows_without_weight"):
        found.append(f"{metrics['rows_without_weight']:,} rows of weight 0 were left out.")
    return found


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
        f"DeLong's (rows as independent), as many times: {times}. Trust the wider intervals."
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

    Where both have the column of times, it belongs to the key: without it a repeated purchase is an overlap.

    Raises:
        ValueError: no columns of user and item, or files without them.
    """
    if not (layout.user and layout.item):
        raise ValueError("--train needs columns of users and items in both; name them with --user and --item")
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
    """(first, end) of this rank's share of some rows."""
    rank, ranks = group_rank(), world_size()
    return rows * rank // ranks, rows * (rank + 1) // ranks


def count_overlap(
    test: Iterable[np.ndarray], train: Iterable[np.ndarray], rows: int, memory: int, names: str
) -> Overlap:
    """Count the distinct test keys (uint64) of all ranks that the training keys hold, on one key in so many as memory
    asks for. Collective: each rank gives its share of both, and looks up a share of the keys.

    Args:
        rows: number of test keys of all ranks.
        memory: bytes on a rank; a key needs 32 while they are sorted.
    """
    ranks = world_size()
    one_in = np.uint64(max(1, -(-rows * 32 // (ranks * max(memory, 1)))))

    def dealt(shares: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for share in in_step(iter(shares)):
            keys = np.empty(0, np.uint64) if share is None else share[share % one_in == 0]
            owner = (keys // one_in % np.uint64(ranks)).astype(np.int64)
            order = np.argsort(owner, kind="stable")
            sent = np.bincount(owner, minlength=ranks).tolist()
            yield all_to_all(keys[order].view(np.int64), sent).view(np.uint64)

    wanted = np.unique(np.concatenate([*dealt(test), np.empty(0, np.uint64)]))
    hit = np.zeros(len(wanted), dtype=bool)
    for keys in dealt(train):
        places = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
        if len(wanted):
            hit[places[wanted[places] == keys]] = True
    exposures, seen = np.sum(gather_objects((len(wanted), int(hit.sum()))), axis=0).tolist()
    return Overlap(exposures, seen, names, 1 / int(one_in))
