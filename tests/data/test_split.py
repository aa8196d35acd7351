import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hllm_torchrec.data.split import Split, find_cut, select_kth


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
