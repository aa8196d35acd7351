"""Columns of events: cutting, joining, unknown values; the decoder against Arrow's own lists."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from hllm_torchrec.data.events import EVENT_COLUMNS, SEQUENCE_SCHEMA, Events, Piece, decode_sequences
from tests.helpers import fixtures

ROWS = [
    {
        "user_id": 3,
        "target_start": 1,
        "item_ids": [5, 6],
        "timestamps": [10, 11],
        "labels": [None, 1],
        "actions": [0, 2],
    },
    {"user_id": 9, "target_start": 0, "item_ids": [], "timestamps": [], "labels": [], "actions": []},
    {"user_id": 4, "target_start": 0, "item_ids": [7], "timestamps": [12], "labels": [0], "actions": [1]},
]


def same(one: Events, other: Events) -> bool:
    pairs = zip(one.columns.values(), other.columns.values(), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def test_what_is_not_given_is_unknown() -> None:
    events = Events.at([4, 5], item_ids=[1, 2])
    assert events.timestamps.tolist() == [4, 5] and events.item_ids.tolist() == [1, 2]
    assert np.isnan(events.labels).all() and events.actions.tolist() == [0, 0]
    assert [column.dtype for column in events.columns.values()] == [column.dtype for column in EVENT_COLUMNS]
    with pytest.raises(TypeError, match="unexpected keyword argument 'itemids'"):
        Events.at([4], itemids=[1])


def test_cut_and_joined_again_events_are_what_they_were() -> None:
    piece = max(fixtures.pieces("test"), key=len)
    assert same(Events.concat([piece[:3], piece[3:3], piece[3:]]), piece)
    assert same(piece[np.arange(len(piece))], piece) and len(piece[piece.timestamps < 0]) == 0


def test_a_cut_of_a_cut_is_the_cut_of_both() -> None:
    piece = max(fixtures.pieces("test"), key=len)
    once, twice = piece.cut(3, 9, 6), piece.cut(1, 10, 4).cut(2, 8, 5)
    assert same(once, twice) and (twice.offset, twice.first_target) == (once.offset, once.first_target) == (3, 3)
    assert once.user_id == piece.user_id


def test_sequences_are_decoded_row_by_row() -> None:
    table = pa.Table.from_pylist(ROWS, SEQUENCE_SCHEMA).select(list(ROWS[0]))
    found = decode_sequences([table.slice(0, 1), table.slice(1)])
    assert found.user_ids.tolist() == [3, 9, 4] and found.target_start.tolist() == [1, 0, 0]
    assert found.offsets.tolist() == [0, 2, 2, 3] and found.lengths.tolist() == [2, 0, 1]
    for row, piece in zip(ROWS, found.pieces(), strict=True):
        labels = [np.nan if label is None else label for label in row["labels"]]
        expected = Events.at(row["timestamps"], item_ids=row["item_ids"], labels=labels, actions=row["actions"])
        assert isinstance(piece, Piece) and same(piece, expected)
        assert (piece.user_id, piece.first_target) == (row["user_id"], row["target_start"])


def test_columns_that_are_not_read_are_unknown() -> None:
    table = pa.Table.from_pylist(ROWS, SEQUENCE_SCHEMA).select(["labels"])
    found = decode_sequences([table])
    np.testing.assert_array_equal(found.labels, np.array([np.nan, 1, 0], np.float32))
    assert found.item_ids.tolist() == [0, 0, 0] and found.user_ids.tolist() == [0, 0, 0]
    assert found.item_ids.strides == (0,)  # no memory for what was not asked for


def test_no_rows_are_decoded_as_none() -> None:
    found = decode_sequences([])
    assert len(found) == found.user_ids.size == 0 and found.offsets.tolist() == [0]
    assert [column.dtype for column in found.columns.values()] == [column.dtype for column in EVENT_COLUMNS]


def test_every_column_of_events_is_written_to_sequences() -> None:
    assert SEQUENCE_SCHEMA.names[2:] == [field.name for field in dataclasses.fields(Events) if field.metadata]
