"""Statistics that need all rows of a user together: AUC within users, and user-clustered standard errors of the AUC.

Rows are partitioned by user over the ranks and over buckets, which are stored on disk if they are large. A bucket that
is still too large, because some of its users have many rows, is partitioned again by these users, and a user whose rows
alone are too many is sorted on disk. This bounds the memory for any distribution of the rows over users.

Legend: n rows, M models, I users.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.distributed.array_collectives import SINGLE_RANK, all_to_all, gather_objects, world_size
from hllm_torchrec.metrics.exact_auc import rank_statistics
from hllm_torchrec.metrics.group_auc import NO_USER, ROWS_WITHOUT_USER, AucPerGroup, grouped_auc
from hllm_torchrec.metrics.registry import USER_METRICS
from hllm_torchrec.metrics.score_chunks import MemoryPool, SortedChunks
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
    """Standard error of the difference between a model's AUC and the first model's."""
    rows_without_user: int = 0
    gauc_error: list[float] = field(default_factory=list)
    """Standard error of the GAUC with users as the independent units; `nan` with fewer than two users with both
    classes."""
    gauc_difference_error: list[float] = field(default_factory=list)
    """Standard error of the difference between a model's GAUC and the first model's."""


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
        for bucket in self._buckets():
            yield bucket.records()

    def _buckets(self) -> Iterator["_Bucket"]:
        for held, path in zip(self._held, self._paths):
            yield _Bucket(path, self._type, held)

    def statistics(self, models: int) -> UserStatistics:
        """Compute the statistics of the users of all ranks; the result is the same on every rank. Collective."""
        ratios = {metric.key: np.zeros((2, models)) for metric in USER_METRICS}
        sums = _Sums(np.zeros(models), np.zeros(models), ratios=ratios, gauc_moments=np.zeros((2, 3, models)))
        for bucket in self._buckets():
            self._add_bucket(sums, bucket)
        return _finish(gather_objects(sums))

    def _add_bucket(self, sums: _Sums, bucket: "_Bucket") -> None:
        """Add the users of a bucket to `sums`."""
        most = max(self._pool.memory // (GROUPING_BYTES * self._type.itemsize), 1)
        if bucket.rows <= 2 * most:  # twice, because buckets by hash are of unequal size
            _add_users(sums, bucket.records())
        elif bucket.users is not None and len(bucket.users) == 1:
            self._add_one_user(sums, bucket, most)
        else:
            for part in bucket.divided(most):
                self._add_bucket(sums, part)
                part.path.unlink(missing_ok=True)

    def _add_one_user(self, sums: _Sums, bucket: "_Bucket", most: int) -> None:
        """Add the only user of a bucket to `sums`; its rows are sorted by score on disk."""
        assert bucket.users is not None
        models = len(sums.squares)
        influences, weight, weighted, within = np.zeros((models, 1)), 0.0, False, []
        for records in bucket.blocks(most):
            influences[:, 0] += records["influence"].sum(axis=0)
            weight += float(records["weight"].sum())
            weighted |= bool((records["weight"] != 1).any())
        for model in range(models):
            chunks = SortedChunks(MemoryPool(self._pool.memory, self._pool.folder), np.dtype(np.int64), weighted)
            for records in bucket.blocks(most):
                weights = records["weight"].copy() if weighted else None
                chunks.add(records["score"][:, model].copy(), records["positive"] == 1, weights)
            auc = rank_statistics(chunks, SINGLE_RANK)[0].interval.auc
            self._pool.spilled += chunks.pool.spilled
            counted = [] if math.isnan(auc) else [0]
            aucs, weights = np.full(len(counted), auc), np.full(len(counted), weight)
            within.append(AucPerGroup(np.array(counted, np.int64), aucs, weights, 1 - len(counted)))
        _add_to_sums(sums, bucket.users, influences, within)


class _Bucket:
    """Rows of some users: arrays in memory, then a file.

    Args:
        users: unique users, ascending; None: not known.
    """

    def __init__(self, path: Path, kind: np.dtype, held: Sequence[np.ndarray] = (), users: np.ndarray | None = None):
        self.path, self.users, self._type, self._held = path, users, kind, held
        stored = path.stat().st_size // kind.itemsize if path.exists() else 0
        self.rows = stored + sum(len(records) for records in held)

    def records(self) -> np.ndarray:
        """Return all rows."""
        stored = [np.fromfile(self.path, self._type)] if self.path.exists() else []
        return np.concatenate([*self._held, *stored, np.empty(0, self._type)])

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Yield all rows in blocks of at most `size` rows."""
        for records in self._held:
            for first in range(0, len(records), size):
                yield records[first : first + size]
        if self.path.exists():
            with self.path.open("rb") as file:
                while len(records := np.fromfile(file, self._type, size)):
                    yield records

    def divided(self, most: int) -> list["_Bucket"]:
        """Divide the rows into files: one for each user with more than `most` rows, others of at most 2 x `most`."""
        users, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        for records in self.blocks(most):
            found, times = np.unique(records["user"], return_counts=True)
            users, place = np.unique(np.concatenate([users, found]), return_inverse=True)
            counts = np.bincount(place, np.concatenate([counts, times]), len(users)).astype(np.int64)
        alone = counts > most
        together = np.where(alone, 0, counts)
        key = np.where(alone, -1 - np.arange(len(users)), (together.cumsum() - together) // most)
        part = np.unique(key, return_inverse=True)[1]
        paths = [self.path.with_name(f"{self.path.name}-{number}") for number in range(int(part.max()) + 1)]
        for records in self.blocks(most):
            of_row = part[np.searchsorted(users, records["user"])]
            for number in np.unique(of_row):
                with paths[number].open("ab") as file:
                    records[of_row == number].tofile(file)
        return [_Bucket(path, self._type, users=users[part == number]) for number, path in enumerate(paths)]


def _add_users(sums: _Sums, records: np.ndarray) -> None:
    """Add the users of records, which have all rows of these users, to `sums`."""
    if not len(records):
        return
    models = len(sums.squares)
    unique, users = np.unique(records["user"], return_inverse=True)
    is_positive = records["positive"] == 1
    influences = np.stack([np.bincount(users, records["influence"][:, m], len(unique)) for m in range(models)])
    weights = None if (records["weight"] == 1).all() else records["weight"]
    within = [grouped_auc(users, is_positive, records["score"][:, model], weights) for model in range(models)]
    _add_to_sums(sums, unique, influences, within)


def _add_to_sums(sums: _Sums, users: np.ndarray, influences_MI: np.ndarray, within: Sequence[AucPerGroup]) -> None:
    """Add users to `sums`.

    Args:
        users: unique ids [I].
        influences_MI: sum of the influences of each user's rows: summing before squaring accounts for their
            correlation.
        within: the AUC within each user, for each model.
    """
    sums.users += len(users)
    sums.rows_without_user += int((users < NO_USER + ROWS_WITHOUT_USER).sum())
    sums.squares += (influences_MI**2).sum(axis=1)
    sums.difference_squares += ((influences_MI - influences_MI[0]) ** 2).sum(axis=1)
    for model, of_model in enumerate(within):
        for metric in USER_METRICS:
            sums.ratios[metric.key][:, model] += metric.ratio(of_model)
    weights = within[0].weights
    sums.counted += len(weights)
    sums.weight += float(weights.sum())
    a_MI = np.stack([of_model.aucs for of_model in within])
    powers = [[(weights**2 * a**power).sum(axis=1) for power in range(3)] for a in (a_MI, a_MI - a_MI[0])]
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
