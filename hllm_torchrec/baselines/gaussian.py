"""Linear-Gaussian factor baseline: fitted item factors, and the user's posterior at each exposure in closed form.

The item side is fitted to the training part (`hllm_torchrec.data.item_factors`); the user's factors z are the
closed-form posterior given all events that the exposure may see (of any part: prequential, as in `bias`). The score is
the expected value (rating) of the item; the probability of a positive label is

    P(value > t) = Phi((E[value] - t) / s),   t half way between the largest value with label 0 and the
                                              smallest with label 1, s^2 the model's noise

The hybrid model can use the same item vectors (`data.item_vectors: [factors]`); this baseline measures their value
without the model.

Legend: X exposures, T events.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.histories import Histories, score_by_group
from hllm_torchrec.data.item_factors import FactorOptions, ItemFactors, event_values, fit_item_factors
from hllm_torchrec.data.predictions import PredictionColumns

Doubles = NDArray[np.floating[Any]]


def run_gaussian(
    dataset: Dataset, options: FactorOptions, splits: tuple[str, ...], feedback_delay: int = 0
) -> dict[str, PredictionColumns]:
    """Return this rank's predictions of each split. Collective.

    Raises:
        ValueError: a split is empty, or all training values are equal.
    """
    model, threshold = fit_item_factors(dataset, options), positive_threshold(dataset)
    cold = dataset.training_item_counts() == 0

    def score_histories(histories: Histories) -> tuple[Doubles, Doubles]:
        values = event_values(histories.labels, histories.actions, dataset.action_values)
        expected = score(histories, values, model)
        deviations = torch.from_numpy((expected - threshold) / np.sqrt(model.noise))
        return expected, torch.special.ndtr(deviations).numpy()

    return {split: score_by_group(dataset, split, cold, score_histories, feedback_delay) for split in splits}


def positive_threshold(dataset: Dataset) -> float:
    """Value above which an event is positive, estimated from the training part."""
    events = dataset.sequences(dataset.row_groups("train"), ["labels", "actions"])
    values = event_values(events.labels, events.actions, dataset.action_values)
    highest_negative = np.fmax.reduce(values[events.labels == 0], initial=-np.inf)  # fmax and fmin ignore NaN
    return float(highest_negative + np.fmin.reduce(values[events.labels == 1], initial=np.inf)) / 2


def score(histories: Histories, values: Doubles, model: ItemFactors) -> Doubles:
    """Expected values of all exposures [X]; `values` [T]: values of the events, NaN if unknown."""
    exposures = histories.exposures
    expected = np.empty(exposures.size)
    # Exposures with the same user and number of visible events share a posterior, which is computed once.
    moment = np.stack([histories.row_of_event[exposures], histories.seen[exposures]])
    moments, which = np.unique(moment, axis=1, return_inverse=True)
    order = np.argsort(which.reshape(-1), kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(which.reshape(-1)))[:-1])
    for (row, seen), members in zip(moments.T, groups, strict=True):
        start = histories.offsets[row]
        history = np.arange(start, start + seen)
        history = history[~np.isnan(values[history])]
        z = model.posterior_mean(histories.item_ids[history], values[history])
        expected[members] = model.predict(z, histories.item_ids[exposures[members]])
    return expected
