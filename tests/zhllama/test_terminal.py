"""Control characters of others: never on the terminal or in the log, in whatever they come."""

import io
import json
import logging
import os
import pty
import subprocess
import sys
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from zhllama.errors import InputError, StorageFault
from zhllama.stage.log import OneLine
from zhllama.terminal import say, visible

HOSTILE = "a\x1b[2Jb\x9bc\rd\x07e\u202ef\u2066g\x7fh\u2028i[/j][red]k:bus:"
SHOWN = r"a\u001b[2Jb\u009bc\u000dd\u0007e\u202ef\u2066g\u007fh\u2028i[/j][red]k:bus:"
REORDERS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def raw_in(text: str) -> list[str]:
    """The control characters in it."""
    return [one for one in text if (unicodedata.category(one) == "Cc" and one not in "\t\n") or one in REORDERS]


@given(st.text())
def test_nothing_but_tabs_and_line_feeds_stays_a_control_character(text):
    shown = visible(text)
    assert [one for one in raw_in(shown) if one != "\r"] == []
    assert "\r" not in shown.replace("\r\n", "")
    assert visible(shown) == shown


@given(st.text())
def test_json_that_was_made_visible_says_the_same(text):
    assert json.loads(visible(json.dumps(text, ensure_ascii=False))) == text


def test_ordinary_text_stays_as_it_is():
    for text in ("中文，标点。\n\ttab", "한국어 हिन्दी עברית العربية", "é ￥ 👩‍👩‍👧 𠀀", "crlf\r\nline"):
        assert visible(text) == text


def test_an_error_is_one_line_without_them():
    for kind in (InputError, StorageFault):
        assert raw_in(str(kind(HOSTILE + "\nnext"))) == []
        assert "\n" not in str(kind(HOSTILE + "\nnext\u2029x"))


def test_a_log_line_is_one_line_without_them():
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s", (HOSTILE + "\nnext",), None)
    line = OneLine("%(message)s").format(record)
    assert raw_in(line) == []
    assert "\n" not in line


PROGRAM = (
    "import sys; from zhllama.stage.program import guarded; from zhllama import terminal\n"
    "from rich.text import Text; from rich.table import Table\n"
    "hostile = sys.argv[1]\n"
    "def work():\n"
    "    print(hostile)\n"
    "    table = Table(hostile); table.add_row(Text(hostile, style='bold red'))\n"
    "    terminal.console(width=200).print(table, Text(hostile, style='red'))\n"
    "    raise {}(hostile)\n"
    "guarded(work)"
)


def said_by(error: str, through_terminal: bool) -> str:
    command = [sys.executable, "-c", PROGRAM.format(error), HOSTILE]
    around = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "300"}
    if not through_terminal:
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=around)
        return ended.stdout.decode()
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=around) as one:
        os.close(theirs)
        said = b""
        while True:
            try:
                said += (piece := os.read(ours, 2**16))
            except OSError:  # nobody has it open any more
                break
            if not piece:
                break
        one.wait()
    os.close(ours)
    return said.decode()


def test_what_a_program_prints_has_none_of_them():
    said = said_by("ValueError", through_terminal=False)
    assert raw_in(said) == []
    assert SHOWN in said
    # printed, in the table's head and cell, in the text, in the traceback and in the last line
    assert said.count(SHOWN[:10]) >= 5


def test_on_a_terminal_our_colours_are_there_and_those_of_others_are_not():
    said = said_by("ValueError", through_terminal=True)
    assert "\x1b[1;31m" in said
    assert "\x1b[2J" not in said
    assert [one for one in raw_in(said) if one not in "\x1b\r"] == []
    assert SHOWN in said
    # printed, in the table's head and cell, in the text, in the traceback and in the last line
    assert said.count(SHOWN[:10]) >= 5


def test_a_line_is_one_write_so_that_another_threads_never_comes_into_it():
    class Writes(io.StringIO):
        def write(self, text: str, /) -> int:
            given.append(text)
            return len(text)

    given: list[str] = []
    say("step 1/2: loss 9.00", Writes())
    assert given == ["step 1/2: loss 9.00\n"]
