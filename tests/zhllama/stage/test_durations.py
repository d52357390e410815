"""One grammar of durations, for every option that takes one."""

from datetime import timedelta

import pytest

from zhllama.errors import InputError
from zhllama.stage.durations import read_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("12h", 43_200), ("1.5d", 129_600), ("7d", 604_800), ("2w", 1_209_600), ("0m", 0)],
)
def test_a_duration_is_a_number_and_a_unit(text, seconds):
    assert read_duration(text, "--older-than") == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "7 days", "1h30m", "1e3s", "٣d", f"{10**12}w"])
def test_what_is_none_is_refused_with_how_to_write_it(text):
    with pytest.raises(InputError, match=r"^--older-than .*: write a number and a unit: 90s, 10m, 12h, 7d or 2w"):
        read_duration(text, "--older-than")
