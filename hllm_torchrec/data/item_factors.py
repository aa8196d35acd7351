"""Item factors: a linear-Gaussian model of ratings, fitted by EM to the training part in seconds.

    value(u, i) = mean + b_i + v_i . z_u + noise,   z_u ~ N(0, I),  v_i ~ N(v_0, I / prior),  noise ~ N(0, s^2)

v_0 puts a constant loading on the first user factor, so that z_u[0] is the user's own mean. The user factors are
integrated out (probabilistic PCA with missing entries), a solution that stochastic gradients on a few hundred users
do not reach. Given any history, z_u has a closed-form posterior: `hllm_torchrec.baselines.gaussian` predicts with
it, and `data.item_vectors: [factors]` passes (v_i, b_i) to the model as dense item features.

Legend: N items (0 is unknown), K factors without the user mean's, J = K + 1, n events of a user.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hllm_torchrec.common.arrays import AnyFloats, Ints
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.derived_files import derived_path, refuse_links
from hllm_torchrec.data.validation import error_location

MEAN_LOADING = 0.45
"""v_0[0]: the standard deviation of users' means, in standard deviations of the values."""


@dataclass(frozen=True)
class FactorOptions:
    """Settings of the fit. The defaults were chosen on MovieLens-100k's validation part."""

    factors: int = 5
    """K, without the user's mean."""
    prior: float = 40.0
    """Precision of an item's loadings around v_0, in units of the users' factors."""
    noise: float = 0.8
    """s^2, in variances of the values."""
    iterations: int = 30
    """EM steps."""
    bias_shrinkage: float = 3.0
    """Number of pseudo-residuals of 0 added to each item's residuals."""
    max_users: int = 20_000
    """Maximum number of users (the first ones) that the fit uses."""
    seed: int = 0
    """Seed of the initial loadings."""


@dataclass(frozen=True)
class ItemFactors:
    """A fitted model, on the scale of the values.

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

    def predict(self, z: AnyFloats, items: Ints) -> AnyFloats:
        """Expected values [m] of `items` [m] for a user with factors z [J]."""
        return self.mean + self.bias[items] + self.loadings[items] @ z

    def vectors(self) -> NDArray[np.float32]:
        """[N, J + 1] float32: loadings and bias, each column standardized over known items; row 0 is 0."""
        raw = np.concatenate([self.loadings, self.bias[:, None]], axis=1)
        spread = raw[1:].std(axis=0)
        scaled = (raw - raw[1:].mean(axis=0)) / np.where(spread > 0, spread, 1.0)
        scaled[0] = 0
        return scaled.astype(np.float32)


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
    """Dense item features [N, V] float32 from <dataset>/vectors/<name>.npy; `factors` is fitted if it does not exist.

    Raises:
        ValueError: the file does not exist, or its number of rows differs from the dataset's number of items.
    """
    if Path(f"{name}.npy").name != f"{name}.npy" or "\0" in name:
        raise ValueError(f"data.item_vectors: {name!r}: must be a plain name, of a file in {dataset.root / 'vectors'}")
    path = dataset.root / "vectors" / f"{name}.npy"
    refuse_links(dataset.root, path)
    if name == "factors":
        path = derived_path(dataset, "vectors", f"{name}.npy")
    if name == "factors" and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written under another name and renamed, so that a file of the final name is complete.
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
    if vectors.ndim != 2 or vectors.shape[0] != dataset.num_items:
        raise ValueError(
            f"{path}: shape {vectors.shape}: must be [{dataset.num_items}, V], row i for item i, row 0 unknown"
        )
    return vectors


def fit_item_factors(dataset: Dataset, options: FactorOptions | None = None) -> ItemFactors:
    """Fit the model to the training part by EM.

    Raises:
        ValueError: all values are equal (implicit feedback), so there is nothing to factorize.
    """
    options = options or FactorOptions()
    users = _training_users(dataset, options.max_users)
    every = np.concatenate([values for _, values in users])
    if every.size == 0 or np.ptp(every) == 0:
        raise ValueError(
            f"{dataset.root}: all training values are equal: item factors need ratings or two labels; "
            "drop `factors` from data.item_vectors"
        )
    scale, mean = float(every.std()), float(every.mean())
    rng = np.random.default_rng(options.seed)
    v_0 = np.zeros(options.factors + 1)
    v_0[0] = MEAN_LOADING * scale
    # Small random loadings break the symmetry between the factors; the user-mean factor starts at its prior.
    loadings = np.tile(v_0, (dataset.num_items, 1))
    loadings[:, 1:] = rng.normal(scale=0.1 * scale, size=(dataset.num_items, options.factors))
    model = ItemFactors(loadings, np.zeros(dataset.num_items), mean, options.noise * scale**2)
    for _ in tqdm(range(options.iterations), desc="item factors", delay=5):
        model = _em_step(model, users, v_0, options)
    return model


def _em_step(
    model: ItemFactors, users: list[tuple[Ints, AnyFloats]], v_0: AnyFloats, options: FactorOptions
) -> ItemFactors:
    """One EM step.

    E: the Gaussian posterior of every user's z. M: the ridge solution of every item's loading from the expected
    moments sum(E[z z']) and sum(value * E[z]), and every item's shrunk bias.
    """
    items, width = model.loadings.shape
    second = np.zeros((items, width, width))
    first, residual, count = np.zeros((items, width)), np.zeros(items), np.zeros(items)
    eye = np.eye(width)
    for rated, values in users:
        v = model.loadings[rated]
        covariance = np.linalg.inv(v.T @ v / model.noise + eye)
        centred = values - model.mean - model.bias[rated]
        z = covariance @ (v.T @ centred) / model.noise
        # E[z z'] = covariance + mean mean'. np.add.at, because a user may have rated an item more than once.
        np.add.at(second, rated, covariance + np.outer(z, z))
        np.add.at(first, rated, np.outer(centred, z))
        np.add.at(residual, rated, values - model.mean - v @ z)
        np.add.at(count, rated, 1.0)
    # The prior's precision is per unit of squared factor, as the second moments are.
    weighted = (first + options.prior * v_0)[..., None]
    loadings: AnyFloats = np.linalg.solve(second + options.prior * eye, weighted)[..., 0]
    return ItemFactors(loadings, residual / (count + options.bias_shrinkage), model.mean, model.noise)


def _training_users(dataset: Dataset, max_users: int) -> list[tuple[Ints, AnyFloats]]:
    """(items, values) of each training user, without events that have no value."""
    users: list[tuple[Ints, AnyFloats]] = []
    for group in dataset.row_groups("train"):
        for events in dataset.sequences([group], ["item_ids", "labels", "actions"]).pieces():
            values = event_values(events.labels, events.actions, dataset.action_values)
            known = ~np.isnan(values)
            users.append((events.item_ids[known], values[known]))
            if len(users) == max_users:
                return users
    return users
