"""Item factors of a run: fitted once, when its training starts, and saved with it.

A fit to different events gives different factors in a different order, so a model must keep the factors that it was
trained with. Items that were added later are folded in: their loading and bias are the closed-form ridge solution given
the users' posteriors, which are computed from the items of the fit only. A run that starts from another run uses that
run's factors, including those of new items.

Legend: N items, J factors including that of the user's mean (as in `item_factors`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import AnyFloats, Ints, save_arrays
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.item_factors import (
    MEAN_LOADING,
    FactorOptions,
    ItemFactors,
    event_values,
    fit_item_factors,
)
from hllm_torchrec.data.run_arrays import hash_arrays, load_run_arrays

FILE = "factors.npz"
"""Name of the file in a run directory."""


@dataclass(frozen=True)
class RunFactors:
    """Fitted factors, with the scaling of their vectors and the priors for folding in new items.

    center, spread: [J + 1], mean and standard deviation of (loadings, bias) over the items known at the fit;
    prior_mean: [J], v_0; prior, bias_shrinkage: as in `FactorOptions`.
    """

    model: ItemFactors
    center: AnyFloats
    spread: AnyFloats
    prior_mean: AnyFloats
    prior: float
    bias_shrinkage: float

    @classmethod
    def fit(cls, dataset: Dataset, options: FactorOptions | None = None) -> "RunFactors":
        """Fit to the training part. Raises ValueError like `fit_item_factors`."""
        options = options or FactorOptions()
        model = fit_item_factors(dataset, options)
        prior_mean = np.zeros(options.factors + 1)
        prior_mean[0] = MEAN_LOADING * np.sqrt(model.noise / options.noise)
        return cls(model, *model.scaling(), prior_mean, options.prior, options.bias_shrinkage)

    def vectors(self) -> NDArray[np.float32]:
        """[N, J + 1] float32: loadings and bias in the scaling of the fit; row 0 is 0."""
        return self.model.vectors((self.center, self.spread))

    @property
    def fingerprint(self) -> str:
        """Hash of loadings, biases and scaling."""
        return hash_arrays((self.model.loadings, self.model.bias, self.center, self.spread))

    def fold_in(self, dataset: Dataset) -> "RunFactors":
        """The factors of all items of a dataset, which has the items of the fit first and new items after them."""
        known, number = len(self.model.bias), dataset.num_items
        if number <= known:
            return self
        solved = self._solve_new(dataset, known, number)
        model = replace(
            self.model,
            loadings=np.concatenate([self.model.loadings, solved[:, :-1]]),
            bias=np.concatenate([self.model.bias, solved[:, -1]]),
        )
        return replace(self, model=model)

    def _solve_new(self, dataset: Dataset, known: int, number: int) -> AnyFloats:
        """[number - known, J + 1] loadings and biases of the new items; v_0 and 0 without training events."""
        width = len(self.prior_mean)
        second = np.zeros((number - known, width + 1, width + 1))
        first = np.zeros((number - known, width + 1))
        for items, values in _users_of_new_items(dataset, known):
            old = items < known
            v = self.model.loadings[items[old]]
            covariance = np.linalg.inv(v.T @ v / self.model.noise + np.eye(width))
            z = covariance @ (v.T @ (values[old] - self.model.mean - self.model.bias[items[old]])) / self.model.noise
            # Moments of (z, 1), the regressors of an item's loading and bias.
            moments = np.pad(covariance, (0, 1)) + np.outer([*z, 1.0], [*z, 1.0])
            rows, target = items[~old] - known, values[~old] - self.model.mean
            np.add.at(second, rows, moments)
            np.add.at(first, rows, np.outer(target, [*z, 1.0]))
        ridge = np.diag([*np.full(width, self.prior), self.bias_shrinkage])
        right = first + np.array([*(self.prior * self.prior_mean), 0.0])
        solved: AnyFloats = np.linalg.solve(second + ridge, right[..., None])[..., 0]
        return solved

    def save(self, folder: Path) -> None:
        """Write `factors.npz` into a run directory."""
        own: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "model"}
        save_arrays(folder / FILE, vars(self.model) | own)

    @classmethod
    def load(cls, folder: Path) -> "RunFactors | None":
        """Read the factors of a run directory; None if it has no `factors.npz`.

        Raises:
            ValueError: the file is damaged.
        """

        def build(saved: Mapping[str, Any]) -> "RunFactors":
            model = ItemFactors(saved["loadings"], saved["bias"], float(saved["mean"]), float(saved["noise"]))
            vectors = saved["center"], saved["spread"], saved["prior_mean"]
            return cls(model, *vectors, float(saved["prior"]), float(saved["bias_shrinkage"]))

        return load_run_arrays(folder / FILE, build)


def _users_of_new_items(dataset: Dataset, known: int) -> list[tuple[Ints, AnyFloats]]:
    """(items, values) of the events with a value, of each training user with an event of an item id >= `known`."""
    users = []
    for group in dataset.row_groups("train"):
        for events in dataset.sequences([group], ["item_ids", "labels", "actions"]).pieces():
            if events.item_ids.max(initial=0) >= known:
                values = event_values(events.labels, events.actions, dataset.action_values)
                rated = ~np.isnan(values)
                users.append((events.item_ids[rated], values[rated]))
    return users
