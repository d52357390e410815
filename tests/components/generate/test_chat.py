"""The conversation, and how it behaves in a terminal (what the model sees of it: zhllama/tokenizer/test_chat.py)."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from components.generate.generate import PROMPT

# --- in a terminal ----------------------------------------------------------------------------------------------------


class Terminal:
    """A program in a terminal of its own: type into it, wait until it has written something."""

    def __init__(self, command: list[str]) -> None:
        self._own, other = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        self.program = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, start_new_session=True, env=environment, close_fds=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(other)
        self.seen = b""

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def read(self, done: Any, seconds: float = 60) -> str:
        """What was written since the last read, up to the moment that `done(text)` holds; fails after a minute."""
        found, until = b"", time.monotonic() + seconds
        while not done(found.decode(errors="ignore")):
            assert time.monotonic() < until, f"not seen; the terminal shows {found.decode(errors='replace')!r}"
            if select.select([self._own], [], [], 0.2)[0]:
                try:
                    found += os.read(self._own, 4096)
                except OSError:  # the program has closed the terminal
                    break
        return found.decode(errors="replace")

    def press(self, key: str, done: Any) -> str:
        """Presses a key, every two seconds again, until `done(what was written)` holds; a minute at most."""
        found = b""
        for _ in range(30):
            self.type(key)
            until = time.monotonic() + 2
            while time.monotonic() < until:
                if select.select([self._own], [], [], 0.1)[0]:
                    found += os.read(self._own, 4096)
                if done(found.decode(errors="ignore")):
                    return found.decode(errors="replace")
        raise AssertionError(f"not seen; the terminal shows {found.decode(errors='replace')!r}")


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def terminal(command: list[str]) -> Iterator[Terminal]:
    opened = Terminal(command)
    try:
        yield opened
    finally:
        opened.program.kill()
        opened.program.wait()


@pytest.fixture
def command(tiny_model: str) -> list[str]:
    return [sys.executable, "-m", "components.generate", "--model", tiny_model, "--interactive", "--do-sample", "false"]


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_ctrl_d_ends(command: list[str]) -> None:
    with terminal([*command, "--max-new-tokens", "1900"]) as chat:
        chat.read(lambda text: PROMPT in text)
        chat.type("\n")
        chat.read(lambda text: PROMPT in text)  # an empty line is ignored
        chat.type("你好\n")
        chat.read(lambda text: len(text) > 40)  # the answer has begun
        chat.type("\x03")
        answer = chat.read(lambda text: PROMPT in text)
        assert len(answer) < 4000  # 1,900 tokens would be more
        assert "Traceback" not in answer
        # readline misses a signal that comes between its showing the prompt and its wait for a key: pressed until heard
        assert "Ctrl-D ends" in chat.press("\x03", lambda text: PROMPT in text.partition("ends")[2])
        chat.type("\x04")
        assert chat.program.wait(120) == 0


@pytest.mark.slow
def test_a_conversation_through_a_pipe_answers_each_line(command: list[str]) -> None:
    asked = "你好\n\n   \n" + "长" * 2000 + "\n再见\n"
    given = asked.encode() + b"\xff\xfe\n"
    done = subprocess.run([*command, "--max-new-tokens", "6"], input=given, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # three answers (the last to bytes that are no text), and the refusal of the line that fills the context
    assert len(done.stdout.decode().rstrip("\n").split("\n")) >= 3
    assert b"2048 positions; shorten the prompt" in done.stderr
    assert b"Traceback" not in done.stderr
