"""Item factors: the posterior against the textbook formula, the fit on data with a known answer, and bad input."""

import numpy as np
import pytest

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.item_factors import (
    FactorOptions,
    ItemFactors,
    event_values,
    fit_item_factors,
    item_vectors,
    number_of_vectors,
    scaled_values,
    value_scale,
)
from tests.helpers.fixtures import dataset as shop
from tests.helpers.growing_shop import NEW_ITEMS, append_day, prepare_shop

QUICK = FactorOptions(factors=2, iterations=3)


def some_factors() -> ItemFactors:
    rng = np.random.default_rng(0)
    return ItemFactors(rng.normal(size=(7, 3)), rng.normal(size=7), mean=3.5, noise=0.7)


def test_the_posterior_is_that_of_bayesian_linear_regression() -> None:
    model, items = some_factors(), np.array([1, 4, 4, 6])
    values = np.array([5.0, 1.0, 2.0, 4.0])
    v = model.loadings[items]
    # The same mean through the marginal of the observations instead of the precision of z.
    marginal = v @ v.T + model.noise * np.eye(4)
    expected = v.T @ np.linalg.solve(marginal, values - model.mean - model.bias[items])
    np.testing.assert_allclose(model.posterior_mean(items, values), expected)


def test_without_history_everyone_gets_mean_and_bias() -> None:
    model, nothing = some_factors(), np.empty(0, np.int64)
    z = model.posterior_mean(nothing, np.empty(0))
    np.testing.assert_array_equal(z, np.zeros(3))
    np.testing.assert_allclose(model.predict(z, np.array([2, 3])), model.mean + model.bias[[2, 3]])


def test_vectors_are_standardised_and_the_unknown_item_is_zero() -> None:
    vectors = some_factors().vectors()
    assert vectors.dtype == np.float32 and vectors.shape == (7, 4)
    np.testing.assert_array_equal(vectors[0], 0)
    np.testing.assert_allclose(vectors[1:].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(vectors[1:].std(0), 1, atol=1e-6)


def test_ratings_are_values_where_there_are_several_and_labels_elsewhere() -> None:
    labels, actions = np.array([1, 0, np.nan], np.float32), np.array([5, 1, 0])
    nothing = np.nan
    rated, bought = np.array([nothing, 1, 2, 3, 4, 5]), np.array([nothing, nothing, nothing, nothing, nothing, 1])
    np.testing.assert_array_equal(event_values(labels, actions, rated), [5, 1, nothing])
    np.testing.assert_array_equal(event_values(labels, actions, bought), [1, 0, nothing])  # one number is no scale
    np.testing.assert_array_equal(
        scaled_values(labels, actions, value_scale(rated)), np.array([1, -1, nothing], np.float32)
    )
    np.testing.assert_array_equal(
        scaled_values(labels, actions, value_scale(bought)), np.array([1, -1, nothing], np.float32)
    )


def test_the_same_seed_gives_the_same_factors_and_only_training_events_count() -> None:
    dataset = shop()
    first, again = fit_item_factors(dataset, QUICK), fit_item_factors(dataset, QUICK)
    np.testing.assert_array_equal(first.loadings, again.loadings)
    cold = dataset.training_item_counts() == 0
    np.testing.assert_array_equal(first.bias[cold], 0)
    assert np.isfinite(first.loadings).all()


def test_vectors_are_fitted_once_and_read_back(tmp_path, monkeypatch) -> None:
    dataset = Dataset(tmp_path, shop().manifest)
    monkeypatch.setattr("hllm_torchrec.data.item_factors.fit_item_factors", lambda _: fit_item_factors(shop(), QUICK))
    first = item_vectors(dataset, "factors")
    monkeypatch.setattr("hllm_torchrec.data.item_factors.fit_item_factors", None)  # a second fit would fail
    np.testing.assert_array_equal(item_vectors(dataset, "factors"), first)
    assert [path.name for path in (tmp_path / "vectors").iterdir()] == ["factors.npy"]


def test_missing_and_misshapen_vectors_are_errors(tmp_path) -> None:
    dataset = Dataset(tmp_path, shop().manifest)
    with pytest.raises(ValueError, match=r"data.item_vectors: 'images': no file .*images.npy; save a float32 array"):
        item_vectors(dataset, "images")
    (tmp_path / "vectors").mkdir()
    np.save(tmp_path / "vectors" / "images.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match=r"images.npy: shape \(3, 2\): must be \["):
        item_vectors(dataset, "images")


def test_items_that_came_by_appends_read_the_unknown_row_until_the_file_has_them(tmp_path, caplog) -> None:
    root = prepare_shop(tmp_path)
    before = Dataset.open(root)
    vectors = np.random.default_rng(0).normal(size=(before.num_items, 2)).astype(np.float32)
    (root / "vectors").mkdir()
    np.save(root / "vectors" / "mine.npy", vectors)
    assert np.array_equal(item_vectors(before, "mine"), vectors) and number_of_vectors(before, "mine") == len(vectors)
    after = append_day(tmp_path)
    found = item_vectors(after, "mine")
    assert np.array_equal(found[: len(vectors)], vectors) and len(found) == len(vectors) + NEW_ITEMS == after.num_items
    assert (found[len(vectors) :] == vectors[0]).all() and number_of_vectors(after, "mine") == len(vectors)
    assert f"mine.npy: the last {NEW_ITEMS} items have no row yet, and read row 0" in caplog.text
    longer = np.concatenate([vectors, np.ones((NEW_ITEMS, 2), np.float32)])
    np.save(root / "vectors" / "mine.npy", longer)
    assert np.array_equal(item_vectors(after, "mine"), longer)
    assert np.array_equal(item_vectors(Dataset.open(root, 1), "mine"), vectors)
    np.save(root / "vectors" / "mine.npy", np.concatenate([longer, longer]))
    with pytest.raises(ValueError, match=r"shape \(\d+, 2\): must be \["):
        item_vectors(after, "mine")
