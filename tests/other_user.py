"""Another user of this machine, without rights: what it does, and what it found."""

import encodings.idna  # noqa: F401 - what a name needs that is looked up; the other user may not read our Python
import os
import pickle
import traceback
from collections.abc import Callable
from typing import TypeVar

import pytest

STRANGER = 65534
Found = TypeVar("Found")

root_alone = pytest.mark.skipif(os.geteuid() != 0, reason="NOT CHECKED: only root can act as another user")


def as_stranger(attack: Callable[[], Found]) -> Found:
    """What the attack returns, made in a process of another user (of our own where root does not run the tests)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(STRANGER)
                os.setuid(STRANGER)
            found: object = attack()
        except BaseException:  # noqa: BLE001 - told to the parent
            found = AssertionError(traceback.format_exc())
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(found, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pickle.load(pipe)
    os.waitpid(child, 0)
    if isinstance(said, AssertionError):
        raise said
    return said  # type: ignore[no-any-return]
