import math
import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hllm_torchrec.metrics import bootstrap
from hllm_torchrec.metrics.auc import delong_interval
from hllm_torchrec.metrics.bootstrap import percentile_interval, user_bootstrap


def example(rows: int = 300, users: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = random.random(rows) < 0.4
    return labels, np.round(random.normal(size=rows) + labels, 1), random.integers(0, users, rows)


def test_each_draw_is_the_auc_of_the_rows_of_the_drawn_users() -> None:
    labels, scores, users = example()
    draws = user_bootstrap(labels, {"model": scores}, users, draws=50, seed=7)["model"]
    random = np.random.default_rng(7)
    for draw in draws:
        drawn = random.integers(20, size=20)
        rows = np.concatenate([np.flatnonzero(users == user) for user in drawn])
        assert draw == pytest.approx(roc_auc_score(labels[rows], scores[rows]), abs=1e-12)


def test_models_share_their_draws() -> None:
    labels, scores, users = example()
    draws = user_bootstrap(labels, {"a": scores, "b": 2 * scores + 1, "c": -scores}, users, draws=30)
    np.testing.assert_array_equal(draws["a"], draws["b"])
    np.testing.assert_allclose(draws["a"], 1 - draws["c"], atol=1e-12)


def test_draws_depend_on_the_seed_and_not_on_how_many_are_made_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels, scores, users = example()
    whole = user_bootstrap(labels, {"a": scores}, users, draws=40, seed=3)["a"]
    monkeypatch.setattr(bootstrap, "CHUNK_VALUES", 7 * len(labels))
    np.testing.assert_array_equal(user_bootstrap(labels, {"a": scores}, users, draws=40, seed=3)["a"], whole)
    assert not np.array_equal(user_bootstrap(labels, {"a": scores}, users, draws=40, seed=4)["a"], whole)


def test_with_a_row_a_user_the_spread_is_delongs() -> None:
    labels, scores, _ = example(rows=600)
    draws = user_bootstrap(labels, {"a": scores}, np.arange(600), draws=2000)["a"]
    assert draws.std() == pytest.approx(delong_interval(labels, scores).standard_error, rel=0.06)


def test_rows_that_resemble_each_other_widen_the_interval() -> None:
    labels, scores, _ = example(rows=200)
    copies = 10
    repeated = np.repeat(labels, copies), np.repeat(scores, copies)
    draws = user_bootstrap(repeated[0], {"a": repeated[1]}, np.repeat(np.arange(200), copies), draws=1000)["a"]
    single = delong_interval(labels, scores).standard_error
    assert draws.std() == pytest.approx(single, rel=0.1)
    assert delong_interval(*repeated).standard_error < single / 3


def test_draws_of_one_class_are_nan_and_left_out_of_the_interval() -> None:
    draws = user_bootstrap([0, 1, 1], {"a": [0.1, 0.2, 0.3]}, [1, 2, 3], draws=200)["a"]
    assert 0 < np.isnan(draws).sum() < 200
    assert percentile_interval(draws) == (1.0, 1.0)
    assert all(math.isnan(bound) for bound in percentile_interval(np.full(5, math.nan)))


def test_percentile_interval_is_the_central_share() -> None:
    assert percentile_interval(np.arange(101.0), confidence=0.9) == pytest.approx((5, 95))


@pytest.mark.parametrize(("draws", "rows"), [(0, 2), (10, 0)])
def test_draws_and_rows_are_needed(draws: int, rows: int) -> None:
    with pytest.raises(ValueError, match=f"{draws} draws of {rows} rows; at least one of each is needed"):
        user_bootstrap([0, 1][:rows], {"a": [0.1, 0.2][:rows]}, [1, 2][:rows], draws=draws)


def test_a_thousand_draws_of_ten_thousand_rows_take_seconds() -> None:
    labels, scores, users = example(rows=10_000, users=166)
    start = time.perf_counter()
    user_bootstrap(labels, {"a": scores, "b": -scores}, users, draws=1000)
    assert time.perf_counter() - start < 10
