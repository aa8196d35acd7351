"""Evidence: a few features per exposure that simple predictors compute from the events before it.

A user encoder would have to learn from gradients what these predictors compute in closed form. A linear layer on the
evidence features is already a strong ranking model; the network's output is added to its logit.

The value of an event is its action's number (such as a rating) if actions have different numbers, else its label.
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

Training, evaluation and serving call the same functions, which use only the user's events that the exposure may see:
`Evidence.past` computes the part that depends only on the user's events, `Evidence.of_exposures` the rest. The factors
are fitted to the training part, so they would predict the training exposures too well. Training exposures are therefore
predicted by a fit without their user's fold (cross-fitting), all later exposures by the fit of all users.

Legend: n events of one user, X exposures, C different numbers of visible events, N items, E width of text embeddings, P
components of texts, J factors, D descriptors of an item (see `tastes`), F columns, M pairs of columns.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache, cached_property
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import AnyFloats, Doubles, Floats, Ints, save_arrays
from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.data.bad_rows import MAX_SECOND
from hllm_torchrec.data.events import Events
from hllm_torchrec.data.item_factors import ItemFactors, event_values
from hllm_torchrec.data.item_statistics import ItemStatistics
from hllm_torchrec.data.past_events import (
    SHRINKAGE,
    Exposures,
    PastEvents,
    columns_of_neighbors,
    columns_of_users,
    items_of_fit,
    last_seconds,
    mean_residuals,
)
from hllm_torchrec.data.run_arrays import hash_arrays, load_run_arrays
from hllm_torchrec.data.tastes import posterior_tastes

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
TEXT_GROUPS = frozenset({"neighbors", "tastes"})
"""Groups that use text embeddings; "tastes" also works without them."""
FILE = "evidence.npz"
"""Name of the file in a run directory."""
FOLDS = 5
_TEXTS_AT_ONCE = 1024


@dataclass(frozen=True)
class EvidenceModel:
    """The fitted parameters of evidence; they belong to a run and do not change during it.

    loadings [FOLDS + 1, N, J], bias [FOLDS + 1, N], mean, noise [FOLDS + 1]: fits of the factors, fit k without the
    users of fold k, the last one with all users; fitted_until: last second of the fit's events; center, spread [F]:
    mean and standard deviation of each column over training exposures; weights [F], intercept: logistic regression
    of the labels on the columns; text_center [E]: mean text embedding, empty without texts; taste_text [E, P]:
    projection of unit embeddings to descriptors, empty without texts; taste_center, taste_spread [2]: mean and scale by
    which an item's shrunk mean value and log count become descriptors; all three are empty without tastes. All arrays
    are float64.
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
        """Read `evidence.npz` from a run directory; None if there is no such file.

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
    return len(column_names(names)) + crossed_pairs(names)[0].size


def column_names(names: tuple[str, ...]) -> list[str]:
    """Columns of the groups `names`, in order, without products."""
    return [column for name in names if name != CROSSES for column in GROUPS[name]]


@cache
def crossed_pairs(names: tuple[str, ...]) -> tuple[Ints, Ints]:
    """Indices [M], [M] of the columns that are multiplied with each other, each pair once, squares included."""
    crossed = [number for number, column in enumerate(column_names(names)) if column in CROSSED]
    pairs = list(combinations_with_replacement(crossed, 2)) if CROSSES in names else []
    first, second = np.array(pairs, np.int64).reshape(-1, 2).T
    return first, second


def standardized(raw: Doubles, center: Doubles, spread: Doubles, names: tuple[str, ...]) -> Doubles:
    """[F, X] standardized columns of the groups `names`, then the products of pairs of them.

    raw: the columns without products; center, spread: of all columns, so that the products are standardized too; or
    only of the columns without products, so that the products are not standardized.
    """
    width, (first, second) = len(raw), crossed_pairs(names)
    found = np.empty((width + first.size, raw.shape[1]))
    columns, products = found[:width], found[width:]
    np.divide(raw - center[:width, None], spread[:width, None], out=columns)
    bounded = np.clip(columns, -LARGEST_FACTOR, LARGEST_FACTOR)
    np.multiply(bounded[first], bounded[second], out=products)
    if center.size > width:
        products -= center[width:, None]
        products /= spread[width:, None]
    return found


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
        self._components = self._components_of(self._text)

    def with_text(self, text: Floats) -> "Evidence":
        """A copy that reads the text embeddings [N, E]."""
        return Evidence(self.names, self.model, self.statistics, self.action_values, text, self.delay)

    def with_new_items(self, text: Floats | None) -> "Evidence":
        """A copy for the catalogue followed by new items with text embeddings `text` [n, E]."""
        found = copy(self)
        if text is not None and self._text is not None:
            found.__dict__.pop("_of_latest", None)  # computed again with the new items
            unit = unit_rows(text, self.model.text_center)
            found._text = np.concatenate([self._text, unit])
            if self._components is not None:
                found._components = np.concatenate([self._components, self._components_of(unit)])
        return found

    def _components_of(self, unit: Floats | None) -> Doubles | None:
        """[n, P] projections of unit text embeddings [n, E] for "tastes"; None without this group or texts."""
        if unit is None or "tastes" not in self.names or not self.model.taste_text.size:
            return None
        # In blocks, because the product converts the embeddings to float64.
        blocks = [unit[at : at + _TEXTS_AT_ONCE] @ self.model.taste_text for at in range(0, len(unit), _TEXTS_AT_ONCE)]
        return np.concatenate(blocks) if blocks else np.zeros((0, self.model.taste_text.shape[1]))

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
                counts, after = np.unique(seen[chosen], return_inverse=True)
                past = self.past(events, counts, without)
                asked = Exposures([past], [after.size], after, items[chosen], seconds[chosen])
                found[chosen] = self.of_exposures(asked, without)
        return found

    def past(self, events: Events, seen: Ints, without: int | None = None) -> PastEvents:
        """Summarize a user's first `seen[c]` events, for each of `seen` [C], as far as the columns need it.

        without: fold of users without which the factors were fitted; None: the fit of all users.
        """
        lacks_texts = self._text is None and self.model.text_center.size and not TEXT_GROUPS.isdisjoint(self.names)
        assert not lacks_texts, "the fit read texts, but none were given"
        fit, values = self.model.fit_without(without), event_values(events.labels, events.actions, self.action_values)
        known = ~np.isnan(values)
        rated = np.concatenate([[0], np.cumsum(known)])[seen]  # number of visible events with a value
        items, values = events.item_ids[known], values[known]
        fit_items = items_of_fit(items, fit)
        residuals = values - fit.mean - fit.bias[fit_items]
        factors: AnyFloats = np.empty((seen.size, 0))
        tastes: Doubles = np.empty((seen.size, 0))
        if "factors" in self.names:
            factors = fit.running_posterior(fit_items, values, rated)
        if "tastes" in self.names:
            described = np.ascontiguousarray(self._of_items(items, events.timestamps[known], fit)[:, :-4])
            tastes = posterior_tastes(described, residuals, rated, fit.noise)
        last, means = last_seconds(events.timestamps, seen), mean_residuals(residuals, rated)
        return PastEvents(items, residuals, rated, seen, last, means, factors, tastes)

    def of_exposures(self, asked: Exposures, without: int | None = None) -> Floats:
        """[X, F] float32 standardized columns of exposures of any number of users; without: as for `past`."""
        latest = without is None and asked.seconds.min(initial=MAX_SECOND) - self.delay > self.statistics.newest
        raw = self._raw(asked, self.model.fit_without(without), latest)
        columns_FX = standardized(raw, self.model.center, self.model.spread, self.names)
        return columns_FX.T.astype(np.float32, order="C")

    def _raw(self, asked: Exposures, fit: ItemFactors, latest: bool) -> Doubles:
        """Columns before standardization, without products. latest: whether `_of_latest` has the items' rows."""
        if latest:
            rows = self._of_latest[np.minimum(asked.items, len(self._of_latest) - 1)]
        else:
            rows = self._of_items(asked.items, asked.seconds, fit)
        described, (mean_value, count, bias, expected) = rows[:, :-4], rows[:, -4:].T
        loadings = described[:, : fit.loadings.shape[1]]
        groups: dict[str, Callable[[], Iterable[AnyFloats]]] = {
            "factors": lambda: (expected + (loadings * asked.of_past("factors")).sum(1), bias),
            "items": lambda: (mean_value, count),
            "users": lambda: columns_of_users(asked),
            "neighbors": lambda: columns_of_neighbors(asked, self._text),
            "tastes": lambda: (expected + (described * asked.of_past("tastes")).sum(1),),
        }
        raw = np.empty((len(column_names(self.names)), asked.items.size))
        for row, column in enumerate(column for name in self.names if name != CROSSES for column in groups[name]()):
            raw[row] = column
        return raw

    def _of_items(self, items: Ints, seconds: Ints, fit: ItemFactors) -> Doubles:
        """[n, D + 4]: what the columns need of `items` [n], from the events visible at `seconds` [n].

        Descriptors (see `tastes`), the two columns of the group "items", bias, and mean plus bias. Visible are the
        events before `seconds - delay`.
        """
        number, total = self.statistics.before(items, seconds - self.delay)
        statistics = np.stack([(total - number * fit.mean) / (number + SHRINKAGE), np.log1p(number)], axis=1)
        fit_items = items_of_fit(items, fit)
        bias, parts = fit.bias[fit_items][:, None], [fit.loadings[fit_items]]
        if "tastes" in self.names:
            parts.append((statistics - self.model.taste_center) / self.model.taste_spread)
        if self._components is not None:
            parts.append(self._components[items])
        return np.concatenate([*parts, statistics, bias, fit.mean + bias], axis=1)

    @cached_property
    def _of_latest(self) -> Doubles:
        """[N, D + 4] `_of_items` after all events, by the fit of all users: what requests need.

        Without texts, the last row is that of all items that have no events and came after the fit.
        """
        fit = self.model.fit_without(None)
        size = max(fit.bias.size, self.statistics.items) + 1 if self._text is None else len(self._text)
        return self._of_items(np.arange(size), np.full(size, MAX_SECOND), fit)


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
    """Error messages for unknown groups in `data.evidence`, and for "crosses" without another group."""
    groups = [*GROUPS, CROSSES]
    if names == (CROSSES,):
        return [f"data.evidence: {CROSSES!r} multiplies columns of other groups: name {', '.join(GROUPS)} as well"]
    return [f"data.evidence: {name!r}: unknown; there are {', '.join(groups)}" for name in names if name not in groups]
