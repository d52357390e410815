"""What a person sees of a run: one table that is drawn again on a terminal, a line for each change elsewhere."""

import io
import re
from pathlib import Path

import pytest

from pipelines.local.plan import State
from pipelines.local.run_table import Row, RunTable, duration, last_lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-tests")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    (tmp_path / "train.txt").write_text("step 1\n\nstep 2, loss 3.14, key sk-secret-of-the-tests\n")
    return [Row(name, tmp_path / f"{name}.txt") for name in ("fetch", "convert", "train", "evaluate")]


def change_all(table: RunTable, rows: list[Row]) -> None:
    fetch, convert, train, _ = rows
    table.change(fetch, State.RUNNING)
    table.change(fetch, State.DONE, "4 files, 19.0 MB")
    table.change(convert, State.UNCHANGED, "9 M parameters")
    table.change(train, State.RUNNING)


def test_a_terminal_shows_stage_state_time_and_key_figure_and_what_a_running_step_says(rows: list[Row]) -> None:
    stream = Terminal()
    with RunTable(rows, stream) as table:
        change_all(table, rows)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    frame = text[text.rindex("stage ") :].splitlines()
    shown = {line.split()[0]: line.split(maxsplit=1)[1].rstrip() for line in frame if line.strip()}
    assert list(shown) == ["stage", "fetch", "convert", "train", "evaluate"]
    assert re.fullmatch(r"done +[\d.]+ s +4 files, 19\.0 MB", shown["fetch"])
    assert re.fullmatch(r"unchanged +9 M parameters", shown["convert"])
    assert re.fullmatch(r"running +([\d.]+ s +)?step 2, loss 3\.14, key \*\*\*", shown["train"])
    assert shown["evaluate"] == "waiting"


def test_elsewhere_each_change_is_a_line(rows: list[Row]) -> None:
    stream = io.StringIO()
    with RunTable(rows, stream) as table:
        change_all(table, rows)
        table.change(rows[2], State.FAILED, "the text is empty")
        table.change(Row("not shown", Path("none")), State.FAILED)
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in stream.getvalue().splitlines()]
    assert lines[0] == "fetch    started"
    assert re.fullmatch(r"fetch    done in [\d.]+ s: 4 files, 19\.0 MB", lines[1])
    assert lines[2:] == [
        "convert  unchanged: 9 M parameters",
        "train    started",
        "train    failed: the text is empty",
    ]


def test_the_last_lines_of_a_log_are_no_empty_ones_and_hold_no_secret(rows: list[Row]) -> None:
    assert last_lines(rows[2].log, 2) == ["step 1", "step 2, loss 3.14, key ***"]
    assert last_lines(rows[0].log, 2) == []


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.44, "0.4 s"), (12.4, "12 s"), (185, "3 min 05 s"), (7805, "2 h 10 min")]
)
def test_a_duration_reads_as_one_says_it(seconds: float, said: str) -> None:
    assert duration(seconds) == said
