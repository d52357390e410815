"""What is printed and logged: text of others with its control characters shown, never carried out.

A name in somebody's manifest, a server's answer or a model's may hold escapes that clear a terminal, take away a line
or write it backwards. They are shown as `\\u001b`, which JSON reads as the same character. Standard output does it for
all that is written to it; our own colours go past it by `console()`, whose texts are looked at before they get any.
"""

import io
import re
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# C0 without tab and line feed (a carriage return before one is harmless), C1, what turns the direction of writing, line
# and paragraph separators
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]|\r(?!\n)")


def visible(text: str) -> str:
    """The text with each control character as `\\u` and its number; tabs and line feeds stay."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line that others had a hand in, in one write: `print` takes two, and a thread's line comes between."""
    file = file or sys.stdout
    file.write(visible(text) + "\n")
    file.flush()


class VisibleText(io.TextIOWrapper):
    """A stream to which control characters come visible. `styled`: the same without that, for who writes colours."""

    def __init__(self, buffer: Any, **settings: Any) -> None:
        super().__init__(buffer, **settings, write_through=True)
        self.styled = io.TextIOWrapper(buffer, **settings, write_through=True)

    def write(self, text: str, /) -> int:
        super().write(visible(text))
        return len(text)


def styled(stream: TextIO) -> TextIO:
    """The stream itself, for a library that writes colours of its own."""
    return stream.styled if isinstance(stream, VisibleText) else stream


def console(file: TextIO | None = None, **settings: Any) -> "Console":
    """Rich's console, on standard output. Texts are what they are: `[/x]` in a name is no markup."""
    return _kind()(file=styled(file or sys.stdout), markup=False, emoji=False, **settings)


@cache
def _kind() -> Any:
    from rich.console import Console
    from rich.segment import Segment

    class VisibleConsole(Console):
        def render(self, *given: Any, **more: Any) -> Any:
            for text, style, control in super().render(*given, **more):
                yield Segment(text if control else visible(text), style, control)

    return VisibleConsole
