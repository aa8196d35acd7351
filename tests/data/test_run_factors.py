"""Item factors of a run: the vectors of the fit stay, and new items get the closed-form solution."""

from pathlib import Path

import numpy as np
import pytest

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.item_factors import FactorOptions, event_values, fit_item_factors
from hllm_torchrec.data.run_factors import RunFactors
from tests.helpers import fixtures
from tests.helpers.growing_shop import NEW_ITEMS, append_day, prepare_shop

OPTIONS = FactorOptions(factors=2, iterations=4)


def test_they_are_those_of_the_fit_and_come_back_from_the_file(tmp_path: Path) -> None:
    factors = RunFactors.fit(fixtures.dataset(), OPTIONS)
    np.testing.assert_array_equal(factors.vectors(), fit_item_factors(fixtures.dataset(), OPTIONS).vectors())
    assert RunFactors.load(tmp_path / "run") is None
    factors.save(tmp_path / "run")
    again = RunFactors.load(tmp_path / "run")
    assert again is not None and again.fingerprint == factors.fingerprint
    np.testing.assert_array_equal(again.vectors(), factors.vectors())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["factors.npz"]
    assert factors.fold_in(fixtures.dataset()) is factors


def naive_fold_in(factors: RunFactors, dataset: Dataset, item: int) -> np.ndarray:
    """Ridge solution of one item's (loading, bias), from the posterior of each user who met it, one after the other."""
    known, prior_mean = len(factors.model.bias), factors.prior_mean
    left = np.diag([*[factors.prior] * len(prior_mean), factors.bias_shrinkage])
    right = np.array([*(factors.prior * prior_mean), 0.0])
    for group in dataset.row_groups("train"):
        for events in dataset.sequences([group]).pieces():
            values = event_values(events.labels, events.actions, dataset.action_values)
            rated = [(i, v) for i, v in zip(events.item_ids, values, strict=True) if not np.isnan(v)]
            precision, weighted = np.eye(len(prior_mean)), np.zeros(len(prior_mean))
            for i, value in rated:
                if i < known:
                    loading = factors.model.loadings[i]
                    precision = precision + np.outer(loading, loading) / factors.model.noise
                    residual = value - factors.model.mean - factors.model.bias[i]
                    weighted = weighted + loading * residual / factors.model.noise
            covariance = np.linalg.inv(precision)
            z = np.append(covariance @ weighted, 1.0)
            moment = np.outer(z, z)
            moment[:-1, :-1] += covariance
            for i, value in rated:
                if i == item:
                    left, right = left + moment, right + z * (value - factors.model.mean)
    return np.linalg.solve(left, right)


def test_new_items_get_the_ridge_solution_given_the_users(tmp_path: Path) -> None:
    prepare_shop(tmp_path, "leave_one_out")  # all but a user's last two events are in train, also of an appended day
    factors = RunFactors.fit(Dataset.open(tmp_path / "data"), OPTIONS)
    append_day(tmp_path)
    later = Dataset.open(tmp_path / "data")
    assert later.training_item_counts()[41:].tolist() == [2, 2, 0, 0]
    folded = factors.fold_in(later)
    assert len(folded.model.bias) == later.num_items == 41 + NEW_ITEMS
    np.testing.assert_array_equal(folded.vectors()[:41], factors.vectors())
    for item in range(41, 41 + NEW_ITEMS):
        expected = naive_fold_in(factors, later, item)
        np.testing.assert_allclose([*folded.model.loadings[item], folded.model.bias[item]], expected, atol=1e-12)


def test_items_that_nobody_met_have_the_prior(tmp_path: Path) -> None:
    factors = RunFactors.fit(fixtures.dataset(), OPTIONS)
    shorter = RunFactors(
        type(factors.model)(
            factors.model.loadings[:-2], factors.model.bias[:-2], factors.model.mean, factors.model.noise
        ),
        factors.center,
        factors.spread,
        factors.prior_mean,
        factors.prior,
        factors.bias_shrinkage,
    )
    folded = shorter.fold_in(fixtures.dataset())  # the shop's last items are never seen
    np.testing.assert_allclose(folded.model.loadings[-2:], np.tile(factors.prior_mean, (2, 1)))
    assert not folded.model.bias[-2:].any()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "factors.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"factors\.npz cannot be read .*; restore it from a copy of the run"):
        RunFactors.load(tmp_path)
