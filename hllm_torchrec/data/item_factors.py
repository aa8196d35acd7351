"""Item factors: a linear-Gaussian model of ratings, fitted by EM to the training part in seconds.

    value(u, i) = mean + b_i + v_i . z_u + noise,   z_u ~ N(0, I),  v_i ~ N(v_0, I / prior),  noise ~ N(0, s^2)

v_0 is zero except for a constant loading on the first user factor, so that z_u[0] models the mean of the user. The user
factors are integrated out (probabilistic PCA with missing entries), which gives a better solution than stochastic
gradients on a few hundred users. Given any history, z_u has a closed-form posterior. `hllm_torchrec.baselines.gaussian`
predicts with this posterior, and `data.item_vectors: [factors]` passes (v_i, b_i) to the model as dense item features.

Legend: N items (0 is unknown), K factors without that of the user's mean, J = K + 1, n events of a user, X prefixes of
a user's events, T events of R users, V features of an item.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hllm_torchrec.common.arrays import AnyFloats, Ints
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.derived_files import derived_path, refuse_links
from hllm_torchrec.data.jagged_arrays import offsets_from_lengths
from hllm_torchrec.data.validation import error_location
from hllm_torchrec.data.versions import newest_version

_logger = logging.getLogger(__name__)
FACTORS = "factors"
"""Name of the fitted item vectors in `data.item_vectors`."""
MEAN_LOADING = 0.45
"""v_0[0], in standard deviations of the values: the prior standard deviation of users' means."""


@dataclass(frozen=True)
class FactorOptions:
    """Settings of the fit. The defaults were chosen on MovieLens-100k's validation part."""

    factors: int = 5
    """K, not counting the factor of the user's mean."""
    prior: float = 40.0
    """Precision of an item's loadings around v_0, in units of the users' factors."""
    noise: float = 0.8
    """s^2, in units of the variance of the values."""
    iterations: int = 30
    """EM steps."""
    bias_shrinkage: float = 3.0
    """Pseudo-count: number of zero residuals added to each item's residuals."""
    max_users: int = 20_000
    """Maximum number of users (the first ones) that the fit uses."""
    seed: int = 0
    """Seed of the initial loadings."""


@dataclass(frozen=True)
class ItemFactors:
    """A fitted model; its parameters are in the units of the values.

    loadings: [N, J]; bias: [N]; mean: mean of all values; noise: variance s^2. The unknown item and items without
    training events have loading v_0 and bias 0.
    """

    loadings: AnyFloats
    bias: AnyFloats
    mean: float
    noise: float

    def posterior_mean(self, items: Ints, values: AnyFloats) -> AnyFloats:
        """E[z | history] [J] after rating `items` [n] with `values` [n]; zeros without history."""
        v = self.loadings[items]
        precision = v.T @ v / self.noise + np.eye(v.shape[1])
        mean: AnyFloats = np.linalg.solve(precision, v.T @ (values - self.mean - self.bias[items]) / self.noise)
        return mean

    def running_posterior(self, items: Ints, values: AnyFloats, counts: Ints) -> AnyFloats:
        """[X, J] `posterior_mean` of one user; row x uses the first counts[x] ratings of `items` [n], `values` [n]."""
        v, width = self.loadings[items], self.loadings.shape[1]
        centred = (values - self.mean - self.bias[items])[:, None]
        # Running sums over the events, preceded by zeros for count 0; rows with equal counts share one solution.
        outer = np.cumsum(v[:, :, None] * v[:, None, :], axis=0)
        distinct, which = np.unique(counts, return_inverse=True)
        precision = np.concatenate([np.zeros((1, width, width)), outer])[distinct] / self.noise + np.eye(width)
        weighted = np.concatenate([np.zeros((1, width)), np.cumsum(v * centred, axis=0)])[distinct] / self.noise
        means: AnyFloats = np.linalg.solve(precision, weighted[..., None])[which, :, 0]
        return means

    def predict(self, z: AnyFloats, items: Ints) -> AnyFloats:
        """Expected values [m] of `items` [m] for a user with factors z [J]."""
        return self.mean + self.bias[items] + self.loadings[items] @ z

    def scaling(self) -> tuple[AnyFloats, AnyFloats]:
        """(mean [J + 1], standard deviation [J + 1], 1 for a constant) of loadings and bias over all known items."""
        raw = self._columns()[1:]
        spread = raw.std(axis=0)
        return raw.mean(axis=0), np.where(spread > 0, spread, 1.0)

    def vectors(self, scaling: tuple[AnyFloats, AnyFloats] | None = None) -> NDArray[np.float32]:
        """[N, J + 1] float32: loadings and bias, each column standardized; row 0 is 0.

        scaling: mean and standard deviation of each column; None: `self.scaling()`.
        """
        center, spread = scaling or self.scaling()
        scaled = (self._columns() - center) / spread
        scaled[0] = 0
        return scaled.astype(np.float32)

    def _columns(self) -> AnyFloats:
        return np.concatenate([self.loadings, self.bias[:, None]], axis=1)


def event_values(labels: NDArray[np.float32], actions: Ints, action_values: AnyFloats) -> AnyFloats:
    """Value of each event [n]: its action's number (rating 1..5) if actions have different numbers, else its label.

    action_values: `Dataset.action_values`. NaN for events without a value.
    """
    return action_values[actions] if _are_graded(action_values) else labels.astype(np.float64)


def value_scale(action_values: AnyFloats) -> NDArray[np.float32] | None:
    """`event_values` of each action scaled to [-1, 1] (lowest -1, highest 1); None if labels are the values."""
    if not _are_graded(action_values):
        return None
    low, high = np.nanmin(action_values), np.nanmax(action_values)
    return (2 * (action_values - low) / (high - low) - 1).astype(np.float32)


def scaled_values(labels: NDArray[np.float32], actions: Ints, scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """`event_values` [n] scaled to [-1, 1]; scale: the result of `value_scale`. Labels 0 and 1 become -1 and 1."""
    return 2 * labels - 1 if scale is None else scale[actions]


def _are_graded(action_values: AnyFloats) -> bool:
    """True if actions have at least two different numbers."""
    return np.unique(action_values[~np.isnan(action_values)]).size > 1


def item_vectors(dataset: Dataset, name: str) -> NDArray[np.float32]:
    """Dense item features [N, V] float32 from <dataset>/vectors/<name>.npy.

    The file `factors` (in the cache if the dataset is read-only) is fitted if it does not exist; items added after the
    fit have zeros. Only runs without a file of their own (`run_factors`) use this file. In other files, appended items
    without a row read row 0, with a warning. Rows of items that only later versions have are left out.

    Raises:
        ValueError: the file does not exist, is a link or damaged, has a value that is not finite, or does not have the
            dataset's number of rows.
    """
    if Path(f"{name}.npy").name != f"{name}.npy" or "\0" in name:
        raise ValueError(f"data.item_vectors: {name!r}: must be a plain name of a file in {dataset.root / 'vectors'}")
    path = dataset.root / "vectors" / f"{name}.npy"
    refuse_links(dataset.root, path)
    if name == FACTORS:
        path = derived_path(dataset, "vectors", f"{name}.npy")
    if name == FACTORS and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Write to a temporary name, then rename, so that a file with the final name is always complete.
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, fit_item_factors(dataset).vectors())
        temporary.rename(path)
    if not path.is_file():
        raise ValueError(
            f"data.item_vectors: {name!r}: no file {path}; save a float32 array [{dataset.num_items}, V] there, "
            "or use `factors`"
        )
    with error_location(path, "save it again"):
        vectors = np.load(path, allow_pickle=False).astype(np.float32)
    if not np.isfinite(vectors).all():
        row = int(np.argwhere(~np.isfinite(vectors))[0][0])
        raise ValueError(f"{path}: row {row} is not finite; save a number for every item and feature")
    if name == FACTORS and vectors.ndim == 2:
        vectors = np.pad(vectors, ((0, max(0, dataset.num_items - len(vectors))), (0, 0)))
    if vectors.ndim == 2 and dataset.version < newest_version(dataset.root):
        vectors = vectors[: dataset.num_items]  # the file also has the items of later versions
    if vectors.ndim == 2 and 1 < len(vectors) < dataset.num_items and dataset.manifest.get("appends"):
        later = dataset.num_items - len(vectors)
        _logger.warning("%s: the last %d items have no row yet, and read row 0, the unknown item's", path, later)
        vectors = np.concatenate([vectors, np.tile(vectors[:1], (later, 1))])
    if vectors.ndim != 2 or vectors.shape[0] != dataset.num_items:
        raise ValueError(
            f"{path}: shape {vectors.shape}: must be [{dataset.num_items}, V], row i for item i, row 0 unknown"
        )
    return vectors


def number_of_vectors(dataset: Dataset, name: str) -> int:
    """Number of the dataset's items that have a row in the file of `item_vectors`, the unknown item included."""
    path = dataset.root / "vectors" / f"{name}.npy"
    with error_location(path, "save it again"):
        return min(len(np.load(path, mmap_mode="r", allow_pickle=False)), dataset.num_items)


def fit_item_factors(dataset: Dataset, options: FactorOptions | None = None) -> ItemFactors:
    """Fit the model to the training part by EM.

    Raises:
        ValueError: all values are equal (implicit feedback), so there is nothing to factorize.
    """
    options = options or FactorOptions()
    return fit_factors(training_ratings(dataset, options.max_users), dataset.num_items, options)


@dataclass(frozen=True)
class Ratings:
    """Values of users' events, grouped by user: items [T], values [T], user_ids [R], offsets [R + 1] of the users."""

    items: Ints
    values: AnyFloats
    user_ids: Ints
    offsets: Ints

    def of_users(self, chosen: NDArray[np.bool_]) -> "Ratings":
        """The ratings of some users; chosen: bool [R]."""
        lengths = np.diff(self.offsets)
        kept = np.repeat(chosen, lengths)
        offsets = offsets_from_lengths(lengths[chosen])
        return Ratings(self.items[kept], self.values[kept], self.user_ids[chosen], offsets)


def training_ratings(dataset: Dataset, max_users: int) -> Ratings:
    """The training events that have a value, of the first `max_users` users with such an event.

    Raises:
        ValueError: all values are equal, or there are none.
    """
    items, values, user_ids, lengths = [], [], [], []
    found = 0
    for group in dataset.row_groups("train"):
        rows = dataset.sequences([group], ["user_id", "item_ids", "labels", "actions"])
        value = event_values(rows.labels, rows.actions, dataset.action_values)
        known = ~np.isnan(value)
        count = np.add.reduceat(np.append(known, False).astype(np.int64), rows.offsets[:-1]) if len(known) else known
        rated = np.flatnonzero(count)[: max_users - found]
        found += rated.size
        kept = known & np.repeat(np.isin(np.arange(count.size), rated), np.diff(rows.offsets))
        items.append(rows.item_ids[kept])
        values.append(value[kept])
        user_ids.append(rows.user_ids[rated])
        lengths.append(count[rated])
        if found == max_users:
            break
    every = np.concatenate(values) if values else np.empty(0)
    if every.size == 0 or np.ptp(every) == 0:
        raise ValueError(
            f"{dataset.root}: no two training values differ: item factors need ratings or two labels; "
            "drop `factors` from data.item_vectors, and data.evidence"
        )
    offsets = offsets_from_lengths(np.concatenate(lengths))
    return Ratings(np.concatenate(items), every, np.concatenate(user_ids), offsets)


def fit_factors(ratings: Ratings, num_items: int, options: FactorOptions) -> ItemFactors:
    """Fit the model to `ratings` by EM; `num_items` is N."""
    scale, mean = float(ratings.values.std()), float(ratings.values.mean())
    rng = np.random.default_rng(options.seed)
    v_0 = np.zeros(options.factors + 1)
    v_0[0] = MEAN_LOADING * scale
    # Small random loadings break the symmetry between the factors; the user-mean factor starts at its prior.
    loadings = np.tile(v_0, (num_items, 1))
    loadings[:, 1:] = rng.normal(scale=0.1 * scale, size=(num_items, options.factors))
    model = ItemFactors(loadings, np.zeros(num_items), mean, options.noise * scale**2)
    matrix = _Sparse(ratings, num_items)
    for _ in tqdm(range(options.iterations), desc="item factors", delay=5):
        model = _em_step(model, matrix, v_0, options)
    return model


def _em_step(model: ItemFactors, ratings: "_Sparse", v_0: AnyFloats, options: FactorOptions) -> ItemFactors:
    """One EM step, computed by products of the sparse rating matrix with per-item and per-user moments.

    E: the Gaussian posterior of every user's z. M: the ridge solution of every item's loading from the expected
    moments sum(E[z z']) and sum(value * E[z]), and every item's shrunk bias.
    """
    items, width = model.loadings.shape
    v, eye = model.loadings, np.eye(width)
    # Sums over a user's events of v v' and of v * (value - mean - bias).
    precision = ratings.sum_by_user(_outer(v)).reshape(-1, width, width) / model.noise + eye
    weighted = ratings.sum_by_user(v, values=True) - ratings.sum_by_user(v * (model.mean + model.bias)[:, None])
    covariance = np.linalg.inv(precision)
    z = (covariance @ weighted[..., None])[..., 0] / model.noise
    # E[z z'] = covariance + mean mean'; then sums over an item's events of E[z z'] and of z * (value - mean - bias).
    second = ratings.sum_by_item(covariance.reshape(-1, width**2) + _outer(z)).reshape(-1, width, width)
    sum_z = ratings.sum_by_item(z)
    first = ratings.sum_by_item(z, values=True) - sum_z * (model.mean + model.bias)[:, None]
    residual = ratings.item_total - ratings.item_count * model.mean - (v * sum_z).sum(1)
    # The prior's precision has the same unit as the second moments (squared user factors), so it is simply added.
    right = (first + options.prior * v_0)[..., None]
    loadings: AnyFloats = np.linalg.solve(second + options.prior * eye, right)[..., 0]
    bias = residual / (ratings.item_count + options.bias_shrinkage)
    return ItemFactors(loadings, bias, model.mean, model.noise)


def _outer(rows: AnyFloats) -> AnyFloats:
    """Outer product of each row with itself: [n, J] to [n, J * J]."""
    return (rows[:, :, None] * rows[:, None, :]).reshape(len(rows), -1)


class _Sparse:
    """Ratings as two sparse matrices [R, N], one with ones and one with the values, and their transposes."""

    def __init__(self, ratings: Ratings, num_items: int) -> None:
        import scipy.sparse as sp  # the import takes a fifth of a second, and most jobs fit nothing

        shape = ratings.offsets.size - 1, num_items
        cells = ratings.items, ratings.offsets
        self._ones = sp.csr_matrix((np.ones(ratings.items.size), *cells), shape)
        self._values = sp.csr_matrix((ratings.values.astype(np.float64), *cells), shape)
        self._ones_of_item, self._values_of_item = self._ones.T.tocsr(), self._values.T.tocsr()
        self.item_count = np.bincount(ratings.items, minlength=num_items).astype(np.float64)
        self.item_total = np.bincount(ratings.items, ratings.values, num_items)

    def sum_by_user(self, of_items: AnyFloats, values: bool = False) -> AnyFloats:
        """[R, w] sum of rows of `of_items` [N, w] over each user's events; values: weighted by the events' values."""
        found: AnyFloats = (self._values if values else self._ones) @ of_items
        return found

    def sum_by_item(self, of_users: AnyFloats, values: bool = False) -> AnyFloats:
        """[N, w] sum of rows of `of_users` [R, w] over each item's events; values: weighted by the events' values."""
        found: AnyFloats = (self._values_of_item if values else self._ones_of_item) @ of_users
        return found
