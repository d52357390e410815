"""The benchmarks' own instruments: what they say of a program is what it did."""

import time

import pytest

from tests.bench.measure import Table, measured, run


def spend(megabytes: int, seconds: float) -> dict[str, float]:
    held = bytearray(megabytes * 2**20)
    until = time.process_time() + seconds
    while time.process_time() < until:
        held[0] ^= 1
    return {"held": len(held)}


def test_memory_time_and_the_answer_are_the_programs() -> None:
    small, large = measured(spend, 1, 0.3), measured(spend, 200, 0.3)
    assert large.peak_mb - small.peak_mb == pytest.approx(199, abs=20)
    assert large.result == {"held": 200 * 2**20}
    assert large.cpu >= 0.3


def test_a_program_that_fails_is_no_result() -> None:
    with pytest.raises(RuntimeError, match=r"ended with 1.*no such"):
        run(["python3", "-c", "raise SystemExit('no such thing')"])


def test_a_table_is_markdown() -> None:
    assert str(Table("T", ("a", "b"), [("1", "2")])) == "### T\n\n| a | b |\n|---|---|\n| 1 | 2 |"
