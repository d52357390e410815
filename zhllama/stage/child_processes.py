"""Child processes that end with their parent, however it ends: Linux's parent-death signal covers `kill -9` too."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """For `preexec_fn`, or by a child itself: a signal when the parent's (starting) thread ends, however it ends."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, int(number))
