"""Timestamps as features: equality with datetime, and the range."""

import datetime

import numpy as np
import pytest
import torch

from hllm_torchrec.modules.features.timestamps import (
    END_OF_TABLES,
    TABLE_SIZES,
    TIME_FEATURES,
    TimestampMLP,
    split_timestamps,
)


def by_datetime(timestamps: torch.Tensor) -> torch.Tensor:
    rows = []
    for seconds in timestamps.tolist():
        t = datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC)
        rows.append([t.year, t.month, t.day, t.hour, t.minute, t.second])
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 6)


def by_numpy(timestamps: torch.Tensor) -> torch.Tensor:
    """The same through numpy's calendar, fast enough for a million."""
    t = timestamps.numpy().astype("datetime64[s]")
    year, month, day = (t.astype(f"datetime64[{unit}]") for unit in "YMD")
    columns = [year.astype(int) + 1970, (month - year).astype(int) + 1, (day - month).astype(int) + 1]
    second = (t - day).astype(int)
    columns += [second // 3600, second // 60 % 60, second % 60]
    return torch.from_numpy(np.stack(columns, axis=-1))


def test_a_million_random_seconds_equal_the_calendar() -> None:
    generator = torch.Generator().manual_seed(0)
    timestamps = torch.randint(0, END_OF_TABLES, (1_000_000,), generator=generator)
    parts = split_timestamps(timestamps)
    assert torch.equal(parts, by_numpy(timestamps))
    assert torch.equal(parts[:20_000], by_datetime(timestamps[:20_000]))
    assert (parts >= 0).all() and (parts < torch.tensor(TABLE_SIZES)).all()


def test_first_and_last_second_of_every_day_equal_datetime() -> None:
    midnights = torch.arange(0, END_OF_TABLES, 86_400)
    timestamps = torch.cat((midnights, midnights + 86_399))
    assert torch.equal(split_timestamps(timestamps), by_datetime(timestamps))


def test_every_second_of_a_leap_day_equals_datetime() -> None:
    start = int(datetime.datetime(2000, 2, 29, tzinfo=datetime.UTC).timestamp())
    timestamps = torch.arange(start, start + 86_400)
    assert torch.equal(split_timestamps(timestamps), by_datetime(timestamps))


@pytest.mark.parametrize("depth", range(1, 7))
def test_a_depth_gives_the_first_components(depth: int) -> None:
    timestamps = torch.tensor([0, 951_782_400, END_OF_TABLES - 1])
    parts = split_timestamps(timestamps, depth)
    assert parts.dtype == torch.int64
    assert torch.equal(parts, by_datetime(timestamps)[:, :depth])


def test_no_timestamps_give_no_rows() -> None:
    assert split_timestamps(torch.zeros(0, dtype=torch.int64)).shape == (0, 6)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1_700_000_000_000, r"\(milliseconds\? divide by 1000\)"),
        (1_700_000_000_000_000, r"\(microseconds\? divide by 1000000\)"),
        (1_700_000_000_000_000_000, r"\(nanoseconds\? divide by 1000000000\)"),
        (END_OF_TABLES, "1970 UTC$"),
        (-1, "1970 UTC$"),
        (5_000_000_000, "1970 UTC$"),
    ],
)
def test_the_first_row_outside_the_tables_is_named(value: int, hint: str) -> None:
    with pytest.raises(ValueError, match=f"timestamp {value} in row 1 is outside 1970-2099.*{hint}"):
        split_timestamps(torch.tensor([3, value, 4, value + 1]))


@pytest.mark.parametrize("depth", [0, 7])
def test_a_depth_outside_the_tables_is_an_error(depth: int) -> None:
    with pytest.raises(ValueError, match=f"timestamp depth is {depth}: must be 1"):
        split_timestamps(torch.tensor([0]), depth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"dtype {dtype}: must be torch.int64"):
        split_timestamps(torch.tensor([0], dtype=dtype))


def test_the_merge_maps_the_concatenated_vectors_to_the_width() -> None:
    merge = TimestampMLP(time_dim=4, width=7, depth=3)
    x = torch.randn(5, 12, requires_grad=True)
    y = merge(x)
    assert y.shape == (5, 7)
    weight, bias, last_weight, last_bias = merge.parameters()
    torch.testing.assert_close(y, torch.nn.functional.silu(x @ weight.T + bias) @ last_weight.T + last_bias)
    y.sum().backward()
    assert x.grad is not None and x.grad.abs().min() > 0
    assert merge(torch.zeros(0, 12)).shape == (0, 7)


def test_every_feature_has_a_table() -> None:
    assert len(TIME_FEATURES) == len(TABLE_SIZES) == 6
