"""Moments as users write them, an ISO date or date-time, to seconds UTC."""

from datetime import UTC, datetime


def second_of(moment: str | int) -> int:
    """Seconds UTC of "2023-11-22" (its first second), "2023-11-22T18:00", with an offset or in UTC, or of a number.

    Raises:
        ValueError: neither a date nor a whole number of seconds.
    """
    text = str(moment).strip()
    if text.isdecimal() and len(text) != 8:  # eight digits are the basic form of a date, 20231122
        return int(text)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a moment: write 2023-11-22, 2023-11-22T18:00 (UTC), or seconds") from None
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())


def text_of(second: int) -> str:
    """A second as a date-time of UTC: 2023-11-22T18:00:00Z."""
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
