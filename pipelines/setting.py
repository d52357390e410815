"""One setting, and how settings are declared, heading by heading."""

import dataclasses
import operator
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.sizes import Size
from zhllama.stage.options import described

Value = str | float | int | bool | list[Any] | dict[str, Any] | None

KINDS = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "JSON", list: "JSON list"}


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
    fields: tuple[str, ...] = ()
    """Fields of the size that it stands over: ("lora.steps",)."""

    def described(self) -> tuple[str, str]:
        """For people: when it is said (compile, or run: each run may say it), and what kind of value it has."""
        return "compile" if self.compiled else "run", KINDS[self.kind]


class Settings(dict[str, Setting]):
    """By name, in the order in which they were declared."""

    _heading = ""

    def heading(self, text: str) -> None:
        """Those that follow stand under it."""
        self._heading = text

    def compiled(self, name: str, option: tuple[type, str] | None = None, /, **told: Any) -> None:
        """What is decided when the pipeline is compiled."""
        self._add(name, option, compiled=True, **told)

    def parameter(self, name: str, option: tuple[type, str] | None = None, /, **told: Any) -> None:
        """What a run of the compiled pipeline may change."""
        self._add(name, option, compiled=False, **told)

    def address(self, name: str, option: tuple[type, str] | None = None, /, note: str = "") -> None:
        """A parameter that is a reference to data."""
        self._add(name, option, compiled=False, address=True, default="", note=note)

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
        fields: tuple[str, ...] = (),
        address: bool = False,
    ) -> None:
        """`option`: whose type, default and text are the setting's where nothing else is told; without one the type
        follows from the default. `of`: what the text is said of."""
        if option:
            one = described(option[0])[option[1]]
            kind, note = kind or one.kind, note or one.note
            default = one.default if default is dataclasses.MISSING and not fields else default
        kind = kind or type(default)
        reader = default if callable(default) else lambda _: default
        if fields and default is dataclasses.MISSING:
            reader = operator.attrgetter(fields[0])
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        if of:
            # a sentence after a colon begins small, unless a name or CPU begins it
            note = f"{of}: {note if note[1:2].isupper() else note[:1].lower() + note[1:]}"
        self[name] = Setting(
            name=name, group=self._heading, kind=str if choices else kind, note=note, default=reader, compiled=compiled,
            choices=choices, address=address, fields=fields,
        )  # fmt: skip
