"""The Gaussian baseline: every exposure against the formula written out, and nothing of its own second."""

import numpy as np
import pytest

from hllm_torchrec.baselines.gaussian import positive_threshold, run_gaussian, score
from hllm_torchrec.data.histories import read_histories
from hllm_torchrec.data.item_factors import FactorOptions, ItemFactors, event_values, fit_item_factors
from tests.helpers.fixtures import dataset, pieces

QUICK = FactorOptions(factors=2, iterations=2)


def fitted() -> ItemFactors:
    return fit_item_factors(dataset(), QUICK)


def scored(values_change: float = 0.0) -> dict[tuple[int, int], float]:
    """(user, position) -> score on the test part, with `values_change` added to events of each exposure's second."""
    histories = read_histories(dataset(), dataset().row_groups("test"))
    values = event_values(histories.labels, histories.actions, dataset().action_values)
    if values_change:
        values[histories.exposures] += values_change
    rows = histories.row_of_event[histories.exposures]
    keys = zip(histories.user_ids[rows], histories.position[histories.exposures], strict=True)
    return dict(zip(keys, score(histories, values, fitted()), strict=True))


def test_every_score_is_the_expected_value_given_strictly_earlier_seconds() -> None:
    model, found = fitted(), scored()
    checked = 0
    for piece in pieces("test"):
        values = event_values(piece.labels, piece.actions, dataset().action_values)
        for target in range(piece.first_target, piece.item_ids.size):
            if np.isnan(piece.labels[target]):
                continue
            earlier = (piece.timestamps < piece.timestamps[target]) & ~np.isnan(values)
            z = model.posterior_mean(piece.item_ids[earlier], values[earlier])
            expected = model.predict(z, piece.item_ids[target : target + 1])[0]
            assert found[piece.user_id, target] == pytest.approx(expected)
            checked += 1
    assert checked == len(found) > 10


def test_a_users_first_second_does_not_see_its_own_ratings() -> None:
    plain, changed = scored(), scored(values_change=1.0)
    first_seconds = [
        (piece.user_id, i)
        for piece in pieces("test")
        for i in range(piece.first_target, piece.item_ids.size)
        if piece.timestamps[i] == piece.timestamps[0] and (piece.user_id, i) in plain
    ]
    assert all(plain[key] == changed[key] for key in first_seconds)
    assert plain != changed  # later seconds do see them


def test_probabilities_are_ordered_like_scores_and_the_threshold_lies_between_the_labels() -> None:
    columns = run_gaussian(dataset(), QUICK, ("test",))["test"]
    order = np.argsort(columns["score"], kind="stable")
    assert (np.diff(columns["probability"][order]) >= 0).all()
    assert ((columns["probability"] > 0) & (columns["probability"] < 1)).all()
    assert 1 <= positive_threshold(dataset()) <= 5
