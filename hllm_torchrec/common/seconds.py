"""Conversion between ISO dates or date-times, as users write them, and seconds since 1970 (UTC)."""

from datetime import UTC, datetime


def second_of(moment: str | int) -> int:
    """Convert a date, a date-time or a number to seconds since 1970 (UTC).

    A date such as "2023-11-22" gives its first second; a date-time such as "2023-11-22T18:00" is in UTC unless it has
    an offset; a whole number >= 0, as int or text, is returned unchanged, except that eight digits are a date
    (20231122).

    Raises:
        ValueError: `moment` is neither a date, a date-time nor a whole number >= 0.
    """
    text = str(moment).strip()
    if text.isdecimal() and len(text) != 8:  # eight digits are an ISO date without hyphens: 20231122
        return int(text)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a moment: write 2023-11-22, 2023-11-22T18:00 (UTC), or seconds") from None
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())


def text_of(second: int) -> str:
    """Format seconds since 1970 as a date-time in UTC: 2023-11-22T18:00:00Z."""
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
