"""Moments of users to seconds and back."""

import pytest

from hllm_torchrec.common.seconds import second_of, text_of


@pytest.mark.parametrize(
    ("text", "second"),
    [
        ("2023-11-22", 1_700_611_200),
        ("20231122", 1_700_611_200),
        ("2023-11-22T18:00", 1_700_676_000),
        ("2023-11-22T18:00:00Z", 1_700_676_000),
        ("2023-11-22T18:00+02:00", 1_700_668_800),
        (1_700_676_000, 1_700_676_000),
        ("1700676000", 1_700_676_000),
    ],
)
def test_a_date_without_zone_is_of_utc(text: str | int, second: int) -> None:
    assert second_of(text) == second == second_of(text_of(second))


@pytest.mark.parametrize("text", ["yesterday", "", "1.5", "-3", "2023-13-01"])
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a moment: write 2023-11-22"):
        second_of(text)
