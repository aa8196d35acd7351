"""Numeric features against loops over the events of strictly earlier seconds."""

import math

import numpy as np
import pytest

from hllm_torchrec.data.numeric_features import NUMERIC_FEATURES, SHRINKAGE, numeric_columns

NAN = math.nan
TIMES = [10, 10, 12, 12, 12, 40, 90_000, 90_000]
LABELS = [1.0, NAN, 0.0, 1.0, 1.0, NAN, 0.0, 1.0]


def naive(name: str, times: list[int], labels: list[float], target: int) -> float:
    earlier = [i for i in range(len(times)) if times[i] < times[target]]
    if name == "history_length":
        return math.log(1 + len(earlier)) / 4
    if name == "log_gap":
        return math.log(1 + times[target] - max(times[i] for i in earlier)) / 8 if earlier else 0.0
    known = [labels[i] for i in earlier if not math.isnan(labels[i])]
    share = (sum(known) + 0.5 * SHRINKAGE) / (len(known) + SHRINKAGE)
    return 2 * (share - 0.5)


def columns(times: list[int], labels: list[float], targets: list[int]) -> np.ndarray:
    names = tuple(NUMERIC_FEATURES)
    return numeric_columns(names, np.array(times), np.array(labels, np.float32), np.array(targets, np.int64))


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_every_feature_equals_a_loop_over_strictly_earlier_seconds(seed: int | None) -> None:
    times, labels = TIMES, LABELS
    if seed is not None:
        rng = np.random.default_rng(seed)
        times = np.sort(rng.integers(0, 40, 60)).tolist()
        labels = rng.choice([0.0, 1.0, NAN], 60).tolist()
    targets = list(range(0, len(times), 2)) + [len(times) - 1]
    found = columns(times, labels, targets)
    assert found.dtype == np.float32
    for column, name in enumerate(NUMERIC_FEATURES):
        expected = [naive(name, times, labels, target) for target in targets]
        np.testing.assert_allclose(found[:, column], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_nothing_of_the_same_second_or_later_matters() -> None:
    target = 3
    before = columns(TIMES, LABELS, [target])
    changed = [label if time < TIMES[target] else 1 - label for time, label in zip(TIMES, LABELS)]
    later = [time + 7 * (time > TIMES[target]) for time in TIMES]
    np.testing.assert_array_equal(columns(later, changed, [target]), before)
    assert not np.array_equal(columns(TIMES, [0.0, *LABELS[1:]], [target]), before), "earlier ones do"


def test_an_exposure_without_history_has_zeros() -> None:
    assert not columns(TIMES, LABELS, [0, 1]).any()


def test_no_names_or_no_exposures_give_empty_columns() -> None:
    times, labels = np.array(TIMES), np.array(LABELS, np.float32)
    assert numeric_columns((), times, labels, np.array([0, 1])).shape == (2, 0)
    none = numeric_columns(tuple(NUMERIC_FEATURES), times, labels, np.empty(0, np.int64))
    assert none.shape == (0, 3) and none.dtype == np.float32
    assert columns([], [], []).shape == (0, 3)
