"""The process around a command: exit codes, signals, one line for an error, UTF-8 whatever the locale says.

Exit codes: 0 done, 2 wrong input (one line, no traceback), 143 cancelled, else a fault.
"""

import codecs
import errno
import io
import locale
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from zhllama.errors import EXIT_CANCELLED, EXIT_DONE, EXIT_FAULT, EXIT_INPUT, InputError, StorageFault
from zhllama.mounted_secrets import take_secrets
from zhllama.secret_text import mask
from zhllama.stage.log import leave_last_line, set_up_logging
from zhllama.stage.tls import trust_site
from zhllama.terminal import VisibleText, say

_MENDS = {
    errno.ENOSPC: "no space left; free some, or point --store, TMPDIR or ZHLLAMA_CACHE elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some, or point --store, TMPDIR or ZHLLAMA_CACHE elsewhere",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "permission denied; choose another place or mend its rights",
}


def guarded(work: Callable[[], None]) -> NoReturn:
    """Runs a program's body and ends the process with the contract's exit code and one line for an error."""
    _speak_utf8()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        set_up_logging()
        take_secrets()
        trust_site()
        _compile_at_home()
        work()
    except InputError as error:
        end(EXIT_INPUT, f"error: {error}")
    except StorageFault as error:
        end(EXIT_FAULT, f"fault: {error}")
    except (KeyboardInterrupt, _Terminated):
        end(EXIT_CANCELLED, "cancelled")
    except BrokenPipeError:
        # whoever read our output (`| head`) has gone; what Python would still flush to it must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:  # noqa: BLE001 - the end of the program: reported whole, exit code 1
        cause: BaseException | None = error
        # libraries wrap the disk's errors in their own
        while cause and (line := _mend(cause)) is None:
            cause = cause.__cause__
        if cause is None:
            _fault()
        end(EXIT_INPUT, f"error: {line}")
    sys.exit(EXIT_DONE)


def _mend(error: BaseException) -> str | None:
    """What the user can do, in one line; None for a fault."""
    if isinstance(error, OSError) and error.errno in _MENDS:
        return f"{error.filename or 'a file'}: {_MENDS[error.errno]}"
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):
        return f"TMPDIR: {error.strerror}: none of them can be written; free some space, or point TMPDIR elsewhere"
    return None


def _speak_utf8() -> None:
    """Text is UTF-8 here, and in the programs started from here. Where the locale says otherwise Python begins again in
    its UTF-8 mode, since libraries open files without an encoding (20 ms, before anything is read)."""
    other = not sys.flags.utf8_mode and codecs.lookup(locale.getencoding()).name != "utf-8"
    # set and yet without effect (python -E): not again
    if other and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # closed by who started us: the next file that is opened would take its number, and what is printed
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8"))
    # PYTHONIOENCODING speaks of these alone
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a file's name may be no UTF-8
            errors = "surrogateescape" if stream is sys.stdin else "backslashreplace"
            stream.reconfigure(encoding="utf-8", errors=errors)
    if type(sys.stdout) is io.TextIOWrapper:
        sys.stdout = VisibleText(sys.stdout.detach(), encoding="utf-8", errors="backslashreplace")
        vars(sys)["__stdout__"] = sys.stdout


def _compile_at_home() -> None:
    """torch, when it is imported, makes a folder in TMPDIR of a name that everybody knows, leaves it there, fails where
    another user has made a file of that name, and would run what lies in it. So: in this user's own caches."""
    with suppress(OSError, RuntimeError):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "torch" / "inductor"))


@contextmanager
def bounded(seconds: float, said: str) -> Iterator[None]:
    """InputError with what is `said` for work that takes longer, in the main thread alone: others hear no signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> NoReturn:
        raise InputError(said)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _fault() -> NoReturn:
    say(mask(traceback.format_exc()), sys.stderr)
    kind, error, _ = sys.exc_info()
    end(EXIT_FAULT, f"fault: {kind.__name__ if kind else ''}: {error}")


class _Terminated(SystemExit):
    """SIGTERM came. A SystemExit, so that what is open is given up on the way out."""


def _terminated(signum: int, frame: object) -> NoReturn:
    # a second SIGTERM must not cut short what the first one has begun to clear away
    signal.signal(signal.SIGTERM, lambda *_: None)
    raise _Terminated(EXIT_CANCELLED)


# A forked child (a library's worker) has nothing of ours to clear away, and an exception would come at a place that may
# swallow it: who then waits for the child waits forever. So SIGTERM ends it at once. The signal is held back while the
# child is made, so that one that comes early is not lost.
_masks = threading.local()


def _after_fork(in_child: bool = False) -> None:
    if in_child and signal.getsignal(signal.SIGTERM) is _terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


os.register_at_fork(
    before=lambda: vars(_masks).update(before=signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})),
    after_in_parent=_after_fork,
    after_in_child=lambda: _after_fork(in_child=True),
)


def end(code: int, line: str) -> NoReturn:
    """Prints the last line, leaves it where Kubernetes shows it, and exits."""
    leave_last_line(line)
    sys.exit(code)
