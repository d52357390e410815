"""One setting, and the headings under which they stand."""

import dataclasses
import functools
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.sizes import Size
from zhllama.stage.options import Described, described

Value = str | float | int | bool | list[Any] | dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One name."""

    name: str
    group: str
    kind: type
    """Of the value: str, int, float, bool; dict and list are JSON."""
    note: str
    default: Callable[[Size], Value]
    """None: it says nothing, and what is more general counts."""
    compiled: bool
    choices: tuple[str, ...] = ()
    address: bool = False
    """Whether it is a reference to data (several, comma-separated)."""
    fields: tuple[tuple[str, ...], ...] = ()
    """Fields of the size that it stands over: (("lora", "steps"),)."""


class Group:
    """Settings under one heading."""

    def __init__(self, heading: str) -> None:
        self.heading = heading
        self.found: list[Setting] = []

    def parameter(self, name: str, option: tuple[type, str] | None = None, /, **told: Any) -> None:
        """What a run of the compiled pipeline may change."""
        self._add(name, option, compiled=False, **told)

    def compiled(self, name: str, option: tuple[type, str] | None = None, /, **told: Any) -> None:
        """What is decided when the pipeline is compiled."""
        self._add(name, option, compiled=True, **told)

    def _add(
        self,
        name: str,
        option: tuple[type, str] | None,
        *,
        compiled: bool,
        kind: Any = None,
        default: Any = dataclasses.MISSING,
        note: str = "",
        of: str = "",
        fields: tuple[tuple[str, ...], ...] = (),
        address: bool = False,
    ) -> None:
        one = described(option[0])[option[1]] if option else Described(kind, "", "")
        hint, stands, text = one.kind, one.default, one.note
        hint = kind or hint
        choices: tuple[str, ...] = ()
        if typing.get_origin(hint) is Literal:
            choices, hint = typing.get_args(hint), str
        reader: Callable[[Size], Value]
        if fields and default is dataclasses.MISSING:
            reader = functools.partial(_field, path=fields[0])
        elif callable(default):
            reader = default
        else:
            reader = functools.partial(_constant, value=stands if default is dataclasses.MISSING else default)
        text = note or text
        self.found.append(
            Setting(
                name=name,
                group=self.heading,
                kind=hint,
                note=f"{of}: {_within(text)}" if of else text,
                default=reader,
                compiled=compiled,
                choices=choices,
                address=address,
                fields=fields,
            )
        )


def _field(size: Size, path: tuple[str, ...]) -> Value:
    found: Any = size
    for name in path:
        found = getattr(found, name)
    return found


def _constant(size: Size, value: Value) -> Value:
    return value


def _within(sentence: str) -> str:
    """As it stands after a colon: its first letter small, unless a name or CPU begins it."""
    return sentence if sentence[1:2].isupper() else sentence[:1].lower() + sentence[1:]
