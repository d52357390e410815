"""Child processes that never outlive their purpose: own process groups, ended whole, and gone when we are.

Three nets, since each has a hole: a stop sends SIGTERM to the group and, after a while, SIGKILL; on Linux a child ends
with its parent, `kill -9` included; and what runs is written down, so that the next run ends what an earlier one left.
"""

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from zhllama.artifacts.json_file import object_of
from zhllama.errors import InputError
from zhllama.storage.private import open_lock, write_private

PATIENCE = 15.0
"""Seconds that an earlier run's processes have after SIGTERM."""
BUSY = "another run is using this folder; wait for it, or choose another"


class Busy(InputError):
    """Another command has the folder."""


def _fields(pid: str) -> list[str]:
    """The kernel's figures on a process, from its state on; empty when there is none (or no /proc to ask)."""
    try:
        # the name in parentheses, before them, may hold spaces
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except OSError:
        return []


def started_at(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty when it does not run."""
    fields = _fields(str(pid))
    return fields[19] if fields and fields[0] != "Z" else ""


def group_runs(group: int) -> bool:
    """Whether a process group has a member that runs."""
    every = (_fields(path.name) for path in Path("/proc").glob("[0-9]*"))
    return any(fields and fields[2] == str(group) and fields[0] != "Z" for fields in every)


def send(group: int, number: int) -> None:
    """A signal to a process group; gone is fine."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


class Ledger:
    """The process groups that run now, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._running: dict[str, str] = {}

    def add(self, pid: int) -> None:
        self._running[str(pid)] = started_at(pid)
        self._write()

    def remove(self, pid: int) -> None:
        self._running.pop(str(pid), None)
        self._write()

    def send(self, number: int) -> None:
        """A signal to all of them."""
        for pid in self._running:
            send(int(pid), number)

    def _write(self) -> None:
        write_private(self._path, json.dumps(self._running).encode())

    def end_leftovers(self) -> None:
        """Ends what an earlier run that was killed left running."""
        try:
            listed = {str(int(pid)): begun for pid, begun in object_of(self._path.read_bytes()).items()}
        except (FileNotFoundError, ValueError):
            return
        # a group keeps its number while it has members: one without its leader is still ours
        left = [pid for pid in map(int, listed) if started_at(pid) in ("", listed[str(pid)]) and group_runs(pid)]
        for pid in left:
            send(pid, signal.SIGTERM)
            # a stopped one (Ctrl-Z) would not hear it
            send(pid, signal.SIGCONT)
        deadline = time.monotonic() + PATIENCE
        while any(group_runs(pid) for pid in left) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            send(pid, signal.SIGKILL)
        self._path.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path, busy: str = BUSY) -> Iterator[Ledger]:
    """Two in one folder would write over each other: the second is refused, and what a killed one left is ended."""
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context(open_lock(folder / ".lock")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            ledger = Ledger(folder / "running.json")
            ledger.end_leftovers()
        except BlockingIOError as error:
            raise Busy(f"--work {folder}: {busy}") from error
        except OSError as error:
            raise InputError(f"--work {folder}: {error.strerror}; choose another folder") from error
        yield ledger
