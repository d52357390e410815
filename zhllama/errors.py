"""The two ways a stage ends badly.

`InputError`: what the user gave is wrong; one line (what, where, how to mend it), exit code 2, no retry.
`StorageFault`: the world failed (a server, a network) after retries; one line, exit code 1, worth another attempt.
Everything else is a bug or a fault we did not foresee: a traceback and exit code 1.
"""

from zhllama.terminal import visible

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_INPUT = 2
EXIT_CANCELLED = 143


class _OneLine(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(visible(" ".join(message.split())))


class InputError(_OneLine):
    """The input is wrong. The text is one line: what is wrong, where, and how to mend it."""


class StorageFault(_OneLine):
    """A server or a network failed after the retries were used up."""


class Truncated(StorageFault):
    """A stored file has fewer bytes than were asked of it."""
