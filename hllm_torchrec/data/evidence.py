"""Evidence: a few features per exposure that simple predictors compute from the events before it.

A user encoder would have to learn from gradients what these predictors compute in closed form. A linear layer on the
evidence features is already a strong ranking model; the network's output is added to its logit.

Groups of columns (`data.evidence` names them):

- factors: the expected value of the item for this user by the linear-Gaussian model (`item_factors`), given the user's
  visible events; and the item's bias in that model.
- items: mean value of the item's earlier events of all users minus the overall mean, shrunk; log of their number.
- users: mean residual of the user's visible events, and of the last ten of them, both shrunk; log of their number; log
  of the seconds since the last one. A residual is value - mean - item bias.
- neighbors: mean residual of the user's visible events, weighted by the similarity of their item's text embedding to
  the candidate's, minus the user's mean residual; one column for each of two sharpnesses of the weights.
- tastes: expected value of the item for this user by a regression on factors, texts and item statistics (`tastes`).
- crosses: products of pairs of the CROSSED columns of the other groups, standardized before they are multiplied. With
  them a linear layer can weight one column by another, such as the user's mean by the number of the user's events.

Training, evaluation and serving call the same function, `Evidence.columns`, which uses only the user's events that the
exposure may see. The factors are fitted to the training part, so they would predict the training exposures too well.
Training exposures are therefore predicted by a fit without their user's fold (cross-fitting), all later exposures by
the fit of all users.

Legend: n events of one user, X exposures, N items, E width of text embeddings, J factors, F columns.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import MISSING, Field, dataclass, field, fields
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import AnyFloats, Doubles, Floats, Ints, save_arrays
from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.data.events import Events
from hllm_torchrec.data.item_factors import ItemFactors, event_values
from hllm_torchrec.data.item_statistics import ItemStatistics
from hllm_torchrec.data.run_arrays import hash_arrays, load_run_arrays
from hllm_torchrec.data.tastes import expected_residuals

GROUPS = {
    "factors": ("expected", "item_bias"),
    "items": ("item_mean", "item_count"),
    "users": ("user_mean", "user_recent", "user_count", "log_gap"),
    "neighbors": ("neighbors_wide", "neighbors_sharp"),
    "tastes": ("taste",),
}
"""Columns of each group that `data.evidence` may name, except CROSSES."""
CROSSES = "crosses"
"""Group of the products of columns of the other groups; its columns come last."""
CROSSED = (
    "expected",
    "item_mean",
    "item_count",
    "user_mean",
    "user_recent",
    "user_count",
    "log_gap",
    "neighbors_sharp",
)
LARGEST_FACTOR = 4.0
"""Columns are clipped to this absolute value, in standard deviations, before they are multiplied."""
TEXT_GROUPS = ("neighbors", "tastes")
"""Groups that use text embeddings; "tastes" also works without them."""
FILE = "evidence.npz"
"""Name of the file in a run directory."""
FOLDS = 5
SHRINKAGE, RECENT_SHRINKAGE = 5.0, 3.0
"""Number of pseudo-events with residual 0 in the means over all events, and over the last RECENT events."""
RECENT = 10
SHARPNESS = (5.0, 10.0)
"""Weight of a neighbor: exp(sharpness * cosine)."""
TYPICAL_COSINE = 0.2
"""Cosine of the SHRINKAGE pseudo-events that shrink the neighbors' mean."""
_EXPOSURES_AT_ONCE = 1024


@dataclass(frozen=True)
class EvidenceModel:
    """The fitted parameters of evidence; they belong to a run and do not change during it.

    loadings [FOLDS + 1, N, J], bias [FOLDS + 1, N], mean, noise [FOLDS + 1]: fits of the factors, fit k without the
    users of fold k, the last one with all users; fitted_until: last second of the fit's events; center, spread [F]:
    mean and standard deviation of each column over training exposures; weights [F], intercept: logistic regression
    of the labels on the columns; text_center [E]: mean text embedding, empty without texts; taste_text [E, P]:
    projection of unit embeddings to descriptors; taste_center, taste_spread [2]: mean and scale by which an item's
    shrunk mean value and log count become descriptors; all three are empty without tastes. All float64.
    """

    loadings: Doubles
    bias: Doubles
    mean: Doubles
    noise: Doubles
    fitted_until: int
    center: Doubles
    spread: Doubles
    weights: Doubles
    intercept: float
    text_center: Doubles
    taste_text: Doubles = field(default_factory=lambda: np.zeros(0))
    taste_center: Doubles = field(default_factory=lambda: np.zeros(0))
    taste_spread: Doubles = field(default_factory=lambda: np.zeros(0))

    def fit_without(self, fold: int | None) -> ItemFactors:
        """The factors fitted without the users of a fold, or to all users (None)."""
        k = FOLDS if fold is None else fold
        return ItemFactors(self.loadings[k], self.bias[k], float(self.mean[k]), float(self.noise[k]))

    @property
    def fingerprint(self) -> str:
        """Hash of all arrays."""
        return hash_arrays(vars(self).values())

    def save(self, folder: Path) -> None:
        """Write `evidence.npz` into a run directory."""
        save_arrays(folder / FILE, vars(self))

    @classmethod
    def load(cls, folder: Path) -> "EvidenceModel | None":
        """Read the file of a run directory; None if it has none.

        Raises:
            ValueError: the file is damaged.
        """

        def build(saved: Mapping[str, Any]) -> "EvidenceModel":
            # Runs of earlier versions have no tastes.
            arrays = {one.name: saved[one.name] for one in fields(cls) if one.name in saved or not _is_new(one)}
            numbers = {"fitted_until": int(arrays["fitted_until"]), "intercept": float(arrays["intercept"])}
            return cls(**(arrays | numbers))

        return load_run_arrays(folder / FILE, build)


def _is_new(one: Field[Any]) -> bool:
    """True for a field that files of earlier versions do not have."""
    return one.default_factory is not MISSING


def evidence_width(names: tuple[str, ...]) -> int:
    """Number of columns F of the groups `names`."""
    return len(column_names(names)) + len(crossed_pairs(names))


def column_names(names: tuple[str, ...]) -> list[str]:
    """Columns of the groups `names`, in order, without products."""
    return [column for name in names if name != CROSSES for column in GROUPS[name]]


def crossed_pairs(names: tuple[str, ...]) -> list[tuple[int, int]]:
    """Index pairs of the columns that are multiplied with each other, each pair once, squares included."""
    if CROSSES not in names:
        return []
    crossed = [number for number, column in enumerate(column_names(names)) if column in CROSSED]
    return list(combinations_with_replacement(crossed, 2))


def standardized(raw: Doubles, center: Doubles, spread: Doubles, names: tuple[str, ...]) -> Doubles:
    """[X, F] standardized columns of the groups `names`, then the products of pairs of them.

    raw: the columns without products; center, spread: of all columns, so that the products are standardized too; or
    only of the columns without products, so that the products are not standardized.
    """
    width, pairs = raw.shape[1], crossed_pairs(names)
    columns: Doubles = (raw - center[:width]) / spread[:width]
    if not pairs:
        return columns
    bounded = np.clip(columns, -LARGEST_FACTOR, LARGEST_FACTOR)
    first, second = np.array(pairs).T
    products = bounded[:, first] * bounded[:, second]
    if center.size > width:
        products = (products - center[width:]) / spread[width:]
    return np.concatenate([columns, products], axis=1)


def fold_of_users(user_ids: Ints) -> Ints:
    """Fold [n] of each user, a function of the user id only."""
    return (hash_columns(user_ids) % np.uint64(FOLDS)).astype(np.int64)


class Evidence:
    """Computes the columns of the groups `names`.

    Args:
        model: fitted to the run's training part.
        statistics: item statistics of all events of the dataset.
        action_values: `Dataset.action_values`.
        text: [N, E] text embeddings of all items for "neighbors" and "tastes", or None ("tastes" works without them).
        delay: seconds from an event until it may be seen (`data.feedback_delay`).
    """

    def __init__(
        self,
        names: tuple[str, ...],
        model: EvidenceModel,
        statistics: ItemStatistics,
        action_values: AnyFloats,
        text: Floats | None,
        delay: int = 0,
    ) -> None:
        self.names, self.model, self.statistics = names, model, statistics
        self.action_values, self.delay = action_values, delay
        self._text = None if text is None else unit_rows(text, model.text_center)

    def with_new_items(self, text: Floats | None) -> "Evidence":
        """A copy for the catalogue followed by new items with text embeddings `text` [n, E]."""
        found = copy(self)
        if text is not None and self._text is not None:
            found._text = np.concatenate([self._text, unit_rows(text, self.model.text_center)])
        return found

    @property
    def width(self) -> int:
        """Number of columns F."""
        return evidence_width(self.names)

    def columns(self, events: Events, seen: Ints, items: Ints, seconds: Ints, user: int, fitted: bool) -> Floats:
        """[X, F] float32 standardized columns of exposures of `items` [X] at `seconds` [X] to one user.

        events: the user's complete sequence; seen: [X] number of its events, from the first, that each exposure may
        see; fitted: True for exposures of the training part (those up to `fitted_until` are then predicted by the fit
        without the user's fold).
        """
        found = np.empty((items.size, self.width), np.float32)
        held_out = fitted & (seconds <= self.model.fitted_until)
        fold = int(fold_of_users(np.array([user]))[0])
        for chosen, without in ((held_out, fold), (~held_out, None)):
            if chosen.any():
                fit = self.model.fit_without(without)
                raw = self._raw(events, seen[chosen], items[chosen], seconds[chosen], fit)
                found[chosen] = standardized(raw, self.model.center, self.model.spread, self.names)
        return found

    def _raw(self, events: Events, seen: Ints, items: Ints, seconds: Ints, fit: ItemFactors) -> Doubles:
        """[X, F] columns before standardization."""
        values = event_values(events.labels, events.actions, self.action_values)
        known = ~np.isnan(values)
        rated = np.concatenate([[0], np.cumsum(known)])[seen]  # number of visible events with a value
        past, fitted_items = _Past(events.item_ids[known], values[known], rated, fit), _known(items, fit)
        groups = {
            "factors": lambda: past.expected(fitted_items),
            "items": lambda: self._of_items(items, seconds, fit.mean),
            "users": lambda: np.column_stack(
                [past.means(), np.log1p(seen), _log_gap(events.timestamps, seen, seconds)]
            ),
            "neighbors": lambda: past.neighbors(items, self._text),
            "tastes": lambda: self._tastes(events.timestamps[known], past, items, seconds),
        }
        return np.concatenate([groups[name]() for name in self.names if name != CROSSES], axis=1)

    def _of_items(self, items: Ints, seconds: Ints, mean: float) -> Doubles:
        count, total = self.statistics.before(items, seconds - self.delay)
        return np.stack([(total - count * mean) / (count + SHRINKAGE), np.log1p(count)], axis=1)

    def _tastes(self, timestamps: Ints, past: "_Past", items: Ints, seconds: Ints) -> Doubles:
        """[X, 1] expected value of the items by the user's tastes; timestamps: seconds of the events of `past`."""
        fit, known = past.fit, _known(items, past.fit)
        of_past = self._descriptors(past.items, timestamps, fit)
        asked = self._descriptors(items, seconds, fit)
        residual = expected_residuals(of_past, past.residuals, past.rated, asked, fit.noise)
        return (fit.mean + fit.bias[known] + residual)[:, None]

    def _descriptors(self, items: Ints, seconds: Ints, fit: ItemFactors) -> Doubles:
        """[n, J] descriptors of `items` [n] from the events before `seconds` [n]; see `tastes`."""
        statistics = (self._of_items(items, seconds, fit.mean) - self.model.taste_center) / self.model.taste_spread
        parts = [fit.loadings[_known(items, fit)], statistics]
        if self._text is not None:
            parts.append(self._text[items] @ self.model.taste_text)
        return np.concatenate(parts, axis=1)


class _Past:
    """One user's events that have a value; exposure x sees the first rated[x] of them."""

    def __init__(self, items: Ints, values: AnyFloats, rated: Ints, fit: ItemFactors) -> None:
        self.items, self.values, self.rated, self.fit = items, values, rated, fit
        self._fitted = _known(items, fit)
        self.residuals = values - fit.mean - fit.bias[self._fitted]
        self._sums = np.concatenate([[0.0], np.cumsum(self.residuals)])

    def expected(self, items: Ints) -> Doubles:
        """[X, 2]: expected value of each item for the user; the item's bias."""
        z = self.fit.running_posterior(self._fitted, self.values, self.rated)
        bias = self.fit.bias[items]
        return np.stack([self.fit.mean + bias + (self.fit.loadings[items] * z).sum(1), bias], axis=1)

    def means(self) -> Doubles:
        """[X, 2]: shrunk mean residual of all visible events, and of the last RECENT of them."""
        first = np.maximum(self.rated - RECENT, 0)
        recent = (self._sums[self.rated] - self._sums[first]) / (self.rated - first + RECENT_SHRINKAGE)
        return np.stack([self._user_mean, recent], axis=1)

    @property
    def _user_mean(self) -> Doubles:
        return self._sums[self.rated] / (self.rated + SHRINKAGE)

    def neighbors(self, items: Ints, text: Floats | None) -> Doubles:
        """[X, 2] similarity-weighted mean residuals minus the user's mean, one column per value of SHARPNESS."""
        assert text is not None
        found = np.zeros((items.size, len(SHARPNESS)))
        history, user_mean = text[self.items], self._user_mean
        for start in range(0, items.size, _EXPOSURES_AT_ONCE):
            some = slice(start, start + _EXPOSURES_AT_ONCE)
            cosine = text[items[some]] @ history.T
            visible = np.arange(self.items.size) < self.rated[some, None]
            for column, sharpness in enumerate(SHARPNESS):
                weight = np.exp(sharpness * cosine) * visible
                total = weight.sum(1)
                surplus = weight @ self.residuals - user_mean[some] * total
                found[some, column] = surplus / (total + SHRINKAGE * np.exp(sharpness * TYPICAL_COSINE))
        return found


def _known(items: Ints, fit: ItemFactors) -> Ints:
    """Replace items that were added after the fit by the unknown item 0 (mean loadings of the prior, bias 0)."""
    return np.where(items < fit.bias.size, items, 0)


def _log_gap(timestamps: Ints, seen: Ints, seconds: Ints) -> Doubles:
    """[X] log(1 + seconds since the last visible event); 0 without a visible event."""
    if timestamps.size == 0:
        return np.zeros(seen.size)
    last = timestamps[np.maximum(seen - 1, 0)]
    return np.log1p(np.where(seen > 0, np.maximum(seconds - last, 0), 0))


def unit_rows(embeddings: NDArray[np.floating], center: Doubles) -> Floats:
    """Embeddings [n, E] minus `center` [E], scaled to unit length."""
    centered = embeddings - center
    return (centered / np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-6)).astype(np.float32)


def run_evidence(names: tuple[str, ...], folder: Path) -> EvidenceModel | None:
    """The fitted evidence of the run in `folder`; None if `names` is empty.

    Raises:
        ValueError: the file is missing or damaged.
    """
    found = EvidenceModel.load(folder) if names else None
    if names and found is None:
        raise ValueError(f"{folder / FILE}: no such file, but data.evidence is {list(names)}: restore it from a copy")
    return found


def evidence_problems(names: tuple[str, ...]) -> list[str]:
    """Error messages for names in `data.evidence` that are not groups."""
    groups = [*GROUPS, CROSSES]
    if names == (CROSSES,):
        return [f"data.evidence: {CROSSES!r} multiplies columns of other groups: name {', '.join(GROUPS)} as well"]
    return [f"data.evidence: {name!r}: unknown; there are {', '.join(groups)}" for name in names if name not in groups]
