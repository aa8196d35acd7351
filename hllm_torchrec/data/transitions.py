"""Transitions: a ridge regression of a user's next item on the decayed history, solved in seconds.

    min over B of  sum over t |y_t - B^T x_t|^2 + lambda tr(B^T K^-1 B)       x_t = sum over j < t of d^(t - 1 - j) e_j

y_t and e_j are one-hot vectors of items, so B[i, j] is the evidence that an event of item i gives for j as the next
item. A sequence model over IDs needs many epochs to learn this (Choi et al., "Session-aware Linear Item-Item Models",
WWW 2021; Steck, EASE, arXiv 1905.03375). With K = I + E E^T for unit text embeddings E, items with similar texts get
similar rows. B is projected to rank R, to the directions of the largest predictions. Then B = S T^T, and the score of
item i after a history is the inner product of sum_j d^(age of j) S[j] and T[i].

The regression belongs to a run: it is fitted when training starts, to all events that the run trains on, and is saved
with the run. No trained weight depends on it, so a run that starts from another run fits a new regression.

Legend: N items (0 is unknown), n of them in the fit, T events of some users, R rank, E width of a text embedding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Floats, Ints, save_arrays
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.run_arrays import hash_arrays, load_run_arrays

FILE = "transitions.npz"
"""Name of the file in a run directory."""
RANK = 512
RIDGE = 4.0
"""Lambda, relative to the mean of the diagonal of sum of x x^T."""
MAX_ITEMS = 16_384
"""Maximum number of items in the fit (those with the most events), which needs up to five float32 arrays [n, n]."""
NEGLIGIBLE = 1e-3
"""Events of the history with a weight below this are left out of the fit."""
MAX_LAGS = 50
OVERSAMPLING, ITERATIONS = 32, 3
"""Subspace iteration: number of additional directions, and number of iterations."""


@dataclass(frozen=True)
class Transitions:
    """The fitted regression: source S [N, R], target T [N, R + 1], both float32.

    T's last column gives all rows of T the same norm, so that ranking by cosine equals ranking by inner product; the
    user's vector is 0 there. S is scaled so that the mean score of the next items in training is 1. Items outside of
    the fit have zeros in S, and in T in all columns but the last.
    """

    source: Floats
    target: Floats

    @classmethod
    def of_factors(cls, source: Floats, target: Floats) -> "Transitions":
        """Build from S [N, R] and T [N, R]; adds the last column of T."""
        squares = np.square(target).sum(1)
        return cls(source, np.column_stack([target, np.sqrt(squares.max() - squares)]).astype(np.float32))

    def without(self, items: Ints) -> "Transitions":
        """A copy in which the rows of `items` are replaced by those of the unknown item."""
        source, target = self.source.copy(), self.target.copy()
        source[items], target[items] = source[0], target[0]
        return Transitions(source, target)

    @property
    def fingerprint(self) -> str:
        """Hash of both arrays."""
        return hash_arrays((self.source, self.target))

    def save(self, folder: Path) -> None:
        """Write `transitions.npz` into a run directory."""
        save_arrays(folder / FILE, vars(self))

    @classmethod
    def load(cls, folder: Path) -> "Transitions | None":
        """Read `transitions.npz` from a run directory; None if there is no such file.

        Raises:
            ValueError: the file is damaged.
        """
        return load_run_arrays(folder / FILE, lambda saved: cls(saved["source"], saved["target"]))


@dataclass(frozen=True)
class TransitionOptions:
    """Options of the fit that follow from a run's configuration.

    part: part of the dataset that is fitted; decay: d; positive_history: the history has only events with label 1;
    positive_targets: events with label 0 are not targets.
    """

    part: str = "train"
    decay: float = 0.7
    positive_history: bool = False
    positive_targets: bool = False


def fit_transitions(dataset: Dataset, texts: Floats | None, options: TransitionOptions) -> Transitions:
    """Fit the regression to a part of a dataset. If no event follows another, all scores are 0.

    texts: [N, E] whitened text embeddings; None: K = I.
    """
    place = _places(dataset, options.part)
    moments, following, targets = _moments(dataset, options, place)
    source, target = np.zeros((2, dataset.num_items, 1), np.float32)
    if targets:
        unit = None if texts is None else _unit(texts[place >= 0])
        solved, directions = _solve(moments, following, unit)
        # Scale the mean score of the next items to 1, so that a good weight relative to other scores depends little on
        # the data.
        solved *= targets / max(float((solved * (following @ directions)).sum()), 1e-12)
        source, target = (_scattered(rows, place) for rows in (solved, directions))
    return Transitions.of_factors(source, target)


def _size(place: Ints) -> int:
    return int(place.max(initial=-1)) + 1


def _places(dataset: Dataset, part: str) -> Ints:
    """[N] row of each item in the fit, or -1; the fit has the MAX_ITEMS items with the most events in the part."""
    counts = np.zeros(dataset.num_items, np.int64)
    for group in dataset.row_groups(part):
        counts += np.bincount(dataset.sequences([group], ["item_ids"]).item_ids, minlength=len(counts))
    counts[0] = 0
    kept = np.sort(np.argsort(-counts, kind="stable")[: min(MAX_ITEMS, int((counts > 0).sum()))])
    place = np.full(dataset.num_items, -1)
    place[kept] = np.arange(len(kept))
    return place


def _moments(dataset: Dataset, options: TransitionOptions, place: Ints) -> tuple[Floats, Floats, int]:
    """(sum of x x^T [n, n], sum of x y^T [n, n], number of targets) over all targets (events that follow another)."""
    size, decay = _size(place), options.decay
    moments, following, targets = np.zeros((size, size), np.float32), np.zeros((size, size), np.float32), 0
    lags = MAX_LAGS if decay == 1 else math.ceil(math.log(NEGLIGIBLE) / math.log(max(decay, NEGLIGIBLE)))
    for items, left, wanted in _sequences(dataset, options, place):
        ahead = _ahead(wanted, left, 1) * (left > 0)
        targets += int(ahead.sum())
        # An event is in the x of every later target, so sum the squares of its weights over these targets.
        weight = np.sum([decay ** (2 * k) * _ahead(ahead, left, k) for k in range(min(lags, MAX_LAGS))], axis=0)
        for lag in range(min(lags, MAX_LAGS) + 1):
            first = np.flatnonzero(left >= lag)
            second = first + lag
            known = (items[first] >= 0) & (items[second] >= 0)
            second = second[known]
            earlier, later = items[first[known]], items[second]
            seen = (decay**lag * weight[second]).astype(np.float32)
            _add(moments, earlier, later, seen)
            if lag:
                _add(moments, later, earlier, seen)
                _add(following, earlier, later, (decay ** (lag - 1) * wanted[second]).astype(np.float32))
    return moments, following, targets


def _sequences(dataset: Dataset, options: TransitionOptions, place: Ints) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Yield (row of the item in the fit, number of the user's later events, 1 if it may be a target), each [T]."""
    for group in dataset.row_groups(options.part):
        rows = dataset.sequences([group], ["item_ids", "labels"])
        kept = rows.labels == 1 if options.positive_history else np.ones(len(rows.item_ids), bool)
        ends = np.concatenate([[0], np.cumsum(kept)])[rows.offsets]
        lengths = np.diff(ends)
        left = np.repeat(ends[1:], lengths) - 1 - np.arange(ends[-1])
        wanted = rows.labels[kept] != 0 if options.positive_targets else np.ones(ends[-1])
        yield place[rows.item_ids[kept]], left, wanted.astype(np.float32)


def _add(matrix: Floats, rows: Ints, columns: Ints, values: Floats) -> None:
    """Add values [k] to entries (rows [k], columns [k]) of a matrix; values of repeated entries are summed."""
    np.add.at(matrix.reshape(-1), rows * matrix.shape[1] + columns, values)


def _ahead(x: Floats, left: Ints, steps: int) -> Floats:
    """x [T] of the event `steps` later of the same user; 0 where there is none."""
    found = np.zeros_like(x)
    rows = np.flatnonzero(left >= steps)
    found[rows] = x[rows + steps]
    return found


def _solve(moments: Floats, following: Floats, texts: Floats | None) -> tuple[Floats, Floats]:
    """(S [n, R], T [n, R] without its last column) from the moments; texts: unit rows [n, E]."""
    seen, next_seen, size = torch.from_numpy(moments), torch.from_numpy(following), len(moments)
    penalty = RIDGE * float(seen.trace()) / size
    matrix = seen + penalty * torch.eye(size)
    if texts is not None:
        # K^-1 = I - E (I + E^T E)^-1 E^T; 0.01 I is added to keep it positive definite in float32 if texts repeat.
        matrix += 0.01 * penalty * torch.eye(size)
        rows = torch.from_numpy(texts)
        wide = rows.double()
        inner = torch.linalg.solve(torch.eye(rows.shape[1], dtype=torch.float64) + wide.T @ wide, wide.T)
        matrix -= penalty * (rows @ inner.float())
    factor = torch.linalg.cholesky(matrix)
    # Largest eigenvectors of B^T (sum of x x^T) B by subspace iteration; computing B would need n right-hand sides.
    rank, start = min(RANK, size), np.random.default_rng(0)
    block = torch.from_numpy(start.standard_normal((size, min(size, rank + OVERSAMPLING))).astype(np.float32))
    for _ in range(ITERATIONS):
        image = torch.cholesky_solve(next_seen @ torch.linalg.qr(block)[0], factor)
        block = next_seen.T @ torch.cholesky_solve(seen @ image, factor)
    basis = torch.linalg.qr(block)[0]
    image = torch.cholesky_solve(next_seen @ basis, factor)
    turn = torch.linalg.eigh((image.T @ (seen @ image)).double())[1].flip(1)[:, :rank].float()
    return (image @ turn).numpy(), (basis @ turn).numpy()


def _unit(texts: Floats) -> Floats:
    return texts / np.maximum(np.linalg.norm(texts, axis=1, keepdims=True), 1e-6)


def _scattered(rows: Floats, place: Ints) -> NDArray[np.float32]:
    """[N, R] array with the `rows` [n, R] of the items in the fit, and zeros for all other items."""
    found = np.zeros((len(place), rows.shape[1]), np.float32)
    found[place >= 0] = rows
    return found
