"""Offsets and length buckets against plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hllm_torchrec.modules.jagged import (
    Bucket,
    length_buckets,
    lengths_from_offsets,
    offsets_from_lengths,
    position_in_sequence,
    sequence_of_position,
)

LENGTHS = [[3, 0, 2], [], [0], [0, 0, 4], [1]]


def offsets_of(lengths: list[int]) -> Tensor:
    return offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_are_int64_and_give_the_lengths_back(lengths: list[int], dtype: torch.dtype) -> None:
    offsets = offsets_from_lengths(torch.tensor(lengths, dtype=dtype))
    assert offsets.dtype == torch.int64
    assert offsets.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert lengths_from_offsets(offsets).tolist() == lengths


@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_position_knows_its_sequence_and_its_place_in_it(lengths: list[int]) -> None:
    offsets, total = offsets_of(lengths), sum(lengths)
    expected = [(b, i) for b, length in enumerate(lengths) for i in range(length)]
    assert sequence_of_position(offsets, total).tolist() == [b for b, _ in expected]
    assert position_in_sequence(offsets, total).tolist() == [i for _, i in expected]


def cells(bucket: Bucket) -> Tensor:
    return torch.ones_like(bucket.rows, dtype=torch.bool) if bucket.valid is None else bucket.valid


@given(st.lists(st.integers(0, 90), max_size=40), st.sampled_from([1, 64, 2**22]))
def test_buckets_hold_every_position_once_and_in_order(lengths: list[int], most_scores: int) -> None:
    offsets = offsets_of(lengths)
    found: dict[int, list[int]] = {}
    for bucket in length_buckets(offsets, most_scores=most_scores):
        for sequence, rows, valid in zip(bucket.sequences.tolist(), bucket.rows, cells(bucket)):
            assert sequence not in found
            found[sequence] = rows[valid].tolist()
            inside = range(int(offsets[sequence]), int(offsets[sequence + 1]))
            assert set(rows.tolist()) == set(inside), "padding repeats a row of the same sequence"
    expected = {b: list(range(int(offsets[b]), int(offsets[b + 1]))) for b, n in enumerate(lengths) if n}
    assert found == expected


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_padding_and_scores_stay_within_their_limits(lengths: list[int]) -> None:
    for bucket in length_buckets(offsets_of(lengths), waste=0.2, floor=8, most_scores=50_000):
        b, longest = bucket.rows.shape
        shortest = int(cells(bucket).sum(1).min())
        assert longest <= 8 or shortest >= longest * (1 - 2 * 0.2)
        assert b == 1 or b * longest**2 <= 50_000
        assert (bucket.valid is None) == (shortest == longest), "a mask only where something is padded"


def test_short_sequences_share_a_bucket_and_longer_ones_do_not() -> None:
    assert [b.sequences.tolist() for b in length_buckets(offsets_of([1, 16, 4]), floor=16)] == [[1, 2, 0]]
    assert [b.sequences.tolist() for b in length_buckets(offsets_of([1, 17, 4]), floor=16)] == [[1], [2, 0]]


def test_no_sequences_or_only_empty_ones_make_no_bucket() -> None:
    assert length_buckets(offsets_of([])) == []
    assert length_buckets(offsets_of([0, 0])) == []
