import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hllm_torchrec.data.split import Split, assign_splits, cuts_of, find_cut, select_kth


@given(st.lists(st.integers(0, 2**48 - 1) | st.integers(0, 3), min_size=1), st.data())
def test_the_kth_smallest_key_equals_sorting(keys, data):
    k = data.draw(st.integers(0, len(keys) - 1))
    pieces = np.array_split(np.array(keys, np.int64), 3)
    assert select_kth(lambda: iter(pieces), k) == sorted(keys)[k]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**32)), min_size=1, unique_by=lambda pair: pair[1]))
def test_a_cut_has_exactly_its_position_of_events_before_it(pairs):
    times, orders = np.array(pairs, np.int64).T
    for position in range(len(pairs)):
        cut = find_cut(lambda: iter([(times[::2], orders[::2]), (times[1::2], orders[1::2])]), position)
        assert sorted(pairs)[position] == (cut.timestamp, cut.order)


@pytest.mark.parametrize("fractions", [(0.8, 0.3, 0.1), (1.2, -0.1, -0.1), (0.9, 0.1)])
def test_fractions_must_be_three_shares_of_one(fractions):
    with pytest.raises(ValueError, match=r"must be three shares \(train, valid, test\)"):
        Split("time", fractions)


def test_a_split_by_date_cuts_before_the_first_event_of_its_seconds():
    split = Split("date", train_until=5, valid_until=8)
    times, orders = np.array([4, 5, 5, 7, 8, 9]), np.array([3, 0, 9, 2, 0, 1])
    parts = assign_splits(split, cuts_of(split, 6, lambda: iter([(times, orders)])), times, orders, np.array([6]))
    assert parts.tolist() == [0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("rule", "dates", "message"),
    [
        ("date", (None, 8), r"train until none, valid until 1970-01-01T00:00:08Z: give both \(--train-until"),
        ("date", (8, 8), "the second later"),
        ("time", (5, 8), "split.rule='time' with dates: --train-until and --valid-until belong to --split date"),
    ],
)
def test_dates_come_in_pairs_and_with_their_rule(rule, dates, message):
    with pytest.raises(ValueError, match=message):
        Split(rule, train_until=dates[0], valid_until=dates[1])
