"""Timestamps as categorical features: Algorithm 1 of the HLLM paper, in integers.

The tables are TorchRec tables of the sizes in `TABLE_SIZES`. This module implements the steps before and after the
look-up: seconds -> table rows, and looked-up vectors -> one vector.

Legend: T packed events.
"""

import torch
from torch import Tensor, nn

TIME_FEATURES = ("time_year", "time_month", "time_day", "time_hour", "time_minute", "time_second")
"""Names of the features, coarse to fine; a depth of d uses the first d."""

TABLE_SIZES = (2100, 13, 32, 24, 60, 60)
"""Number of rows of each feature's table (Algorithm 1). The row index is the calendar value: year 2024 is row 2024."""

SECONDS_PER_DAY = 86_400
END_OF_TABLES = 4_102_444_800
"""2100-01-01 00:00:00 UTC in seconds: the first second whose year has no row."""

FINER_UNITS = (("milliseconds", 1_000), ("microseconds", 1_000_000), ("nanoseconds", 1_000_000_000))
"""Possible units of a timestamp that is too large, and the number of these units per second."""

PLAUSIBLE_SECONDS = 100_000_000
"""A second in 1973. An error suggests a finer unit only if the timestamp in that unit would be at least this."""


def split_timestamps(timestamps: Tensor, depth: int = 6) -> Tensor:
    """Split seconds since 1970 (UTC) into year, month, day, hour, minute, second.

    The paper's `datetime.fromtimestamp` loop uses the machine's time zone; this function uses UTC, so that all machines
    agree. Equal to `datetime` for every second of 1970-2099.

    Args:
        timestamps: int64 [T], seconds since 1970-01-01 00:00:00 UTC.
        depth: number of components, 1 (year) to 6 (second).

    Returns:
        int64 [T, depth], column i in [0, TABLE_SIZES[i]), on the device of `timestamps`.

    Raises:
        ValueError: a depth outside 1-6, a dtype other than int64, or a timestamp outside 1970-2099 (the first
            such row is named). The check waits for the device once.
    """
    if not 1 <= depth <= len(TABLE_SIZES):
        raise ValueError(f"timestamp depth is {depth}: must be 1 (year) to {len(TABLE_SIZES)} (second)")
    if timestamps.dtype != torch.int64:
        raise ValueError(
            f"timestamps have dtype {timestamps.dtype}: must be torch.int64 seconds "
            "(float32 cannot hold the seconds of this century)"
        )
    _check_range(timestamps)
    return calendar_fields(timestamps, depth)


def calendar_fields(timestamps: Tensor, depth: int) -> Tensor:
    """Same as `split_timestamps`, for any shape [...] -> [..., depth], without checks and without a device sync."""
    days = torch.div(timestamps, SECONDS_PER_DAY, rounding_mode="floor")
    second = timestamps - days * SECONDS_PER_DAY
    clock = (second // 3600, second // 60 % 60, second % 60)
    return torch.stack((*_civil_from_days(days), *clock)[:depth], dim=-1)


class TimestampMLP(nn.Module):
    """Merge the looked-up time vectors into one vector per event: `merge_time` of Algorithm 1.

    The paper writes `MLP(time_dim * time_num, user_dim)` without the number of layers; here it is Linear, SiLU, Linear
    with a hidden layer of the output's width.
    """

    def __init__(self, time_dim: int, width: int, depth: int = len(TABLE_SIZES)) -> None:
        """Build for `depth` time vectors of `time_dim` each and an output of `width`."""
        super().__init__()
        self.merge = nn.Sequential(nn.Linear(depth * time_dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time_vectors: Tensor) -> Tensor:
        """Map the concatenated vectors [T, depth * time_dim], coarse to fine, to [T, width]."""
        return self.merge(time_vectors)


def _civil_from_days(days: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn days since 1970-01-01 into (year, month, day) of the Gregorian calendar.

    Hinnant's `civil_from_days`: years start on 1 March, so that the leap day is the last day of a year, and are grouped
    in eras of 400 years (146,097 days).
    """
    shifted = days + 719_468  # days since 0000-03-01
    era = torch.div(shifted, 146_097, rounding_mode="floor")
    day_of_era = shifted - era * 146_097
    # Subtract the leap days so far (every 4th year, not every 100th, but every 400th): then each year has 365 days.
    year_of_era = (day_of_era - day_of_era // 1_460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    # From March on, every 5 months have 153 days (31, 30, 31, 30, 31), so a rounded linear function gives the month.
    month_from_march = (5 * day_of_year + 2) // 153
    day = day_of_year - (153 * month_from_march + 2) // 5 + 1
    month = (month_from_march + 2) % 12 + 1
    year = year_of_era + era * 400 + (month <= 2).long()
    return year, month, day


def _check_range(timestamps: Tensor) -> None:
    """Raise for the first timestamp before 1970 or after 2099."""
    outside = (timestamps < 0) | (timestamps >= END_OF_TABLES)
    if not outside.any():
        return
    row = int(outside.flatten().nonzero()[0])
    value = int(timestamps.flatten()[row])
    plausible = [unit for unit in FINER_UNITS if PLAUSIBLE_SECONDS <= value // unit[1] < END_OF_TABLES]
    hint = f" ({plausible[0][0]}? divide by {plausible[0][1]})" if plausible else ""
    raise ValueError(
        f"timestamp {value} in row {row} is outside 1970-2099, the range of the time tables: "
        f"timestamps are seconds since 1970 UTC{hint}"
    )
