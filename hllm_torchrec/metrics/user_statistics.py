"""Statistics that need all rows of a user together: AUC within users, and user-clustered standard errors of the AUC.

Rows are partitioned by user over the ranks and over buckets, which are stored on disk if they are large. This bounds
the memory.

Legend: n rows, M models, I users.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.distributed.array_collectives import all_to_all, gather_objects, world_size
from hllm_torchrec.metrics.group_auc import NO_USER, ROWS_WITHOUT_USER, grouped_auc
from hllm_torchrec.metrics.registry import USER_METRICS
from hllm_torchrec.metrics.score_chunks import MemoryPool
from hllm_torchrec.metrics.user_metrics import GAUC

GROUPING_BYTES = 12
"""Memory for grouping a bucket's rows, as a multiple of the size of the rows."""


@dataclass(frozen=True)
class UserStatistics:
    """Statistics of all rows of all users; lists are in the order of the models."""

    users: int
    metrics: dict[str, list[float]]
    """Key of each `UserMetric` of the registry → its values."""
    users_counted: int
    """Number of users with both classes."""
    standard_error: list[float]
    """Standard error of the AUC with users as the independent units; `nan` with fewer than two units (each row without
    a user counts as one)."""
    difference_error: list[float]
    """Standard error of the AUC minus the AUC of the first model."""
    rows_without_user: int = 0
    gauc_error: list[float] = field(default_factory=list)
    """Standard error of the GAUC with users as the independent units; `nan` with fewer than two users with both
    classes."""
    gauc_difference_error: list[float] = field(default_factory=list)
    """Standard error of the GAUC minus the GAUC of the first model."""


@dataclass
class _Sums:
    squares: np.ndarray
    """Sum of the squares of the users' influences on each model's AUC, [M]."""
    difference_squares: np.ndarray
    users: int = 0
    counted: int = 0
    rows_without_user: int = 0
    ratios: dict[str, np.ndarray] = field(default_factory=dict)
    """Key of a `UserMetric` → its numerators and denominators [2, M]."""
    weight: float = 0.0
    """Sum of the weights w of the users with both classes."""
    gauc_moments: np.ndarray = field(default_factory=lambda: np.zeros((2, 3, 0)))
    """Sums of w^2, w^2 a and w^2 a^2 over the users with both classes, [2, 3, M]. Index 0: a is the AUC within the
    user; index 1: a is that AUC minus the AUC of the first model within the user."""


def record_type(models: int) -> np.dtype:
    """Dtype of a row: user, class, weight, and for each model the `order_keys` of its score and the influence on its
    AUC."""
    scores, influences = (np.int64, (models,)), (np.float64, (models,))
    values = [("score", *scores), ("influence", *influences)]
    return np.dtype([("user", "i8"), ("positive", "i1"), ("weight", "f8"), *values])


def order_keys(scores: np.ndarray) -> np.ndarray:
    """Convert scores [n] (floats without NaN, or int64) to int64 keys [n] with the same order and the same ties."""
    if scores.dtype == np.int64:
        return scores
    bits = (scores.astype(np.float64) + 0.0).view(np.int64)  # + 0 turns -0.0 into 0.0
    # The bits of negative floats order in reverse: all but the sign bit are flipped.
    return bits ^ ((bits >> 63) & np.int64(2**63 - 1))


class UserBuckets:
    """Collects rows; all rows of a user, from all ranks, are put into one bucket of one rank."""

    def __init__(self, pool: MemoryPool, models: int, rows: int):
        """Create empty buckets. rows: number of rows of all ranks, which determines the number of buckets."""
        self._pool, self._type = pool, record_type(models)
        size = rows * self._type.itemsize * GROUPING_BYTES // world_size()
        self._count = 1 + size // max(pool.memory, 1)
        self._held: list[list[np.ndarray]] = [[] for _ in range(self._count)]
        self._paths = [pool.folder / f"users-{id(self)}-{bucket}" for bucket in range(self._count)]

    def add(self, records: np.ndarray) -> None:
        """Add records of this rank (possibly none); each is sent to the rank of its user. Collective."""
        ranks = world_size()
        spread = hash_columns(records["user"])
        if ranks > 1:
            owner = (spread % np.uint64(ranks)).astype(np.int64)
            order = np.argsort(owner, kind="stable")
            sent = np.bincount(owner, minlength=ranks).tolist()
            raw = records[order].view(np.uint8).reshape(-1, self._type.itemsize)
            records = all_to_all(raw, sent).reshape(-1).view(self._type)
            spread = hash_columns(records["user"])
        # The bucket depends on the quotient, because all records of a rank have the same remainder.
        bucket = (spread // np.uint64(ranks) % np.uint64(self._count)).astype(np.int64)
        order = np.argsort(bucket, kind="stable")
        cuts = np.searchsorted(bucket[order], np.arange(self._count + 1))
        for index in np.unique(bucket):
            self._keep(int(index), records[order[cuts[index] : cuts[index + 1]]])

    def _keep(self, bucket: int, records: np.ndarray) -> None:
        if self._pool.sorted_bytes + records.nbytes <= self._pool.memory // 4:
            self._pool.sorted_bytes += records.nbytes
            self._held[bucket].append(records)
            return
        with self._paths[bucket].open("ab") as file:
            records.tofile(file)
        self._pool.spilled += records.nbytes

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the records of each of this rank's buckets."""
        for held, path in zip(self._held, self._paths):
            stored = [np.fromfile(path, self._type)] if path.exists() else []
            yield np.concatenate([*held, *stored, np.empty(0, self._type)])

    def statistics(self, models: int) -> UserStatistics:
        """Compute the statistics of the users of all ranks; the result is the same on every rank. Collective."""
        ratios = {metric.key: np.zeros((2, models)) for metric in USER_METRICS}
        sums = _Sums(np.zeros(models), np.zeros(models), ratios=ratios, gauc_moments=np.zeros((2, 3, models)))
        for records in self:
            _add_bucket(sums, records, models)
        return _finish(gather_objects(sums))


def _add_bucket(sums: _Sums, records: np.ndarray, models: int) -> None:
    """Add the users of a bucket to `sums`."""
    if not len(records):
        return
    unique, users = np.unique(records["user"], return_inverse=True)
    is_positive = records["positive"] == 1
    sums.users += len(unique)
    sums.rows_without_user += int((unique < NO_USER + ROWS_WITHOUT_USER).sum())
    # The influence of a user is the sum over its rows: summing before squaring accounts for their correlation.
    influences = np.stack([np.bincount(users, records["influence"][:, m], len(unique)) for m in range(models)])
    sums.squares += (influences**2).sum(axis=1)
    sums.difference_squares += ((influences - influences[0]) ** 2).sum(axis=1)
    weights = None if (records["weight"] == 1).all() else records["weight"]
    aucs = []
    for model in range(models):
        within = grouped_auc(users, is_positive, records["score"][:, model], weights)
        aucs.append(within.aucs)
        for metric in USER_METRICS:
            sums.ratios[metric.key][:, model] += metric.ratio(within)
    sums.counted += len(within.aucs)
    sums.weight += float(within.weights.sum())
    a_MI = np.stack(aucs)
    powers = [[(within.weights**2 * a**power).sum(axis=1) for power in range(3)] for a in (a_MI, a_MI - a_MI[0])]
    sums.gauc_moments += np.array(powers)


def _finish(parts: Sequence[_Sums]) -> UserStatistics:
    users, counted = sum(part.users for part in parts), sum(part.counted for part in parts)
    # The factor n / (n - 1) makes the variance of the users' influences unbiased.
    correction = users / (users - 1) if users > 1 else math.nan
    metrics = {}
    for metric in USER_METRICS:
        numerators, denominators = np.sum([part.ratios[metric.key] for part in parts], axis=0)
        metrics[metric.key] = (numerators / (denominators if counted else math.nan)).tolist()
    squares = (np.sum([getattr(part, name) for part in parts], axis=0) for name in ("squares", "difference_squares"))
    error, difference = (np.sqrt(square * correction).tolist() for square in squares)
    without = sum(part.rows_without_user for part in parts)
    moments, weight = np.sum([part.gauc_moments for part in parts], axis=0), sum(part.weight for part in parts)
    gauc = np.array(metrics[GAUC.key])
    of_gauc = (_ratio_error(m, mean, weight, counted) for m, mean in zip(moments, (gauc, gauc - gauc[0]), strict=True))
    return UserStatistics(users - without, metrics, counted, error, difference, without, *of_gauc)


def _ratio_error(moments_3M: np.ndarray, mean_M: np.ndarray, weight: float, users: int) -> list[float]:
    """Return the standard error of the ratio sum(w a) / sum(w) over users, linearized as w (a - mean) / sum(w).

    moments_3M: sums of w^2, w^2 a and w^2 a^2; mean_M: the ratio; weight: sum of w.
    """
    if users < 2:
        return [math.nan] * len(mean_M)
    zeroth, first, second = moments_3M
    spread = np.maximum(second - 2 * mean_M * first + mean_M**2 * zeroth, 0)
    found: list[float] = (np.sqrt(spread * users / (users - 1)) / weight).tolist()
    return found
