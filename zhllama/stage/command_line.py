"""`python -m components.<stage> --option value`: the options as a dataclass, through tyro.

KFP passes every parameter as text: `true` / `false` for booleans and an empty string for an absent value, which here
means "the default".
"""

import dataclasses
import io
import json
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from zhllama.errors import InputError
from zhllama.stage.options import _REF, _SEVERAL, Config
from zhllama.stage.program import _Terminated


# --- the command line -------------------------------------------------------------------------------------------------
def parse(kind: type[Config], arguments: Sequence[str]) -> Config:
    """The options as a dataclass. InputError for an unknown option or a value that does not fit."""
    import tyro

    bridged = _bridge(kind, _with_machine(kind, list(arguments)))
    prog = f"python -m {program(kind)}"
    config = (tyro.conf.FlagConversionOff,)
    if "--help" in bridged or "-h" in bridged:
        return tyro.cli(kind, prog=prog, args=bridged, config=config)
    said = io.StringIO()
    try:
        with _wide_terminal(), redirect_stderr(said), redirect_stdout(said):
            return tyro.cli(kind, prog=prog, args=bridged, config=config, use_underscores=False)
    except _Terminated:
        raise
    except SystemExit as error:
        raise InputError(f"{program(kind)}: {_tyros_complaint(said.getvalue())}; see --help") from error


def program(kind: type) -> str:
    """Whose options they are: what the class says (others check a training's options for it), or its own stage."""
    return str(getattr(kind, "PROGRAM", ".".join(kind.__module__.split(".")[:2])))


@contextmanager
def _wide_terminal() -> Iterator[None]:
    """tyro folds its messages at the terminal's width, in the middle of a path if need be."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "2000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _tyros_complaint(said: str) -> str:
    """What is wrong, in one line. tyro writes a title, a rule, what is wrong, a rule, and the help of the option."""
    sections = re.split(r"^[ ]*-{4,}[ ]*$", said, flags=re.MULTILINE)
    text = " ".join(sections[min(1, len(sections) - 1)].split())
    return text.removesuffix(".") or "the options do not parse"


MACHINE = "--machine"
"""Of a class with that field: options as one JSON object. A pipeline's step is told a job's machine so."""


def _with_machine(kind: type, arguments: list[str]) -> list[str]:
    """The arguments with what `--machine` says put before them, but for options that are there by themselves."""
    if MACHINE[2:] not in {field.name for field in dataclasses.fields(kind)}:
        return arguments
    rest, told, at = [], "", 0
    while at < len(arguments):
        word = arguments[at]
        name, equals, value = word.partition("=")
        at += 1
        if name != MACHINE:
            rest.append(word)
        elif equals:
            told = value
        else:
            told = arguments[at] if at < len(arguments) else ""
            at += 1
    try:
        machine = json.loads(told or "{}")
    except ValueError as error:
        raise InputError(f'{program(kind)}: {MACHINE} {told}: not JSON ({error}); write {{"memory": "8Gi"}}') from error
    if not isinstance(machine, dict):
        raise InputError(f'{program(kind)}: {MACHINE} {told}: write options by name, as {{"memory": "8Gi"}}')
    given = {word.partition("=")[0].replace("_", "-") for word in rest if word.startswith("--")}
    options = {f"--{name.replace('_', '-')}": value for name, value in machine.items()}
    return [*(f"{name}={_as_text(value)}" for name, value in options.items() if name not in given), *rest]


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _bridge(kind: type, arguments: list[str]) -> list[str]:
    """KFP's texts as tyro wants them: empty values dropped, true/false as True/False, unknown options refused.

    A text may begin with `--` (a prompt may): only an option's name is never taken for a value. An option of several
    references may be repeated; one of a single reference may not, since all but the last would be lost unseen.
    """
    hints = typing.get_type_hints(kind)
    marked = typing.get_type_hints(kind, include_extras=True)
    fields = {f"--{field.name.replace('_', '-')}": field.name for field in dataclasses.fields(kind)}
    known = {option: hints[name] for option, name in fields.items()}
    place_of: dict[str, int] = {}

    def option(word: str) -> str:
        return word.partition("=")[0].replace("_", "-")

    bridged: list[str] = []
    at = 0
    while at < len(arguments):
        word = arguments[at]
        at += 1
        if not word.startswith("--") or word == "--help":
            bridged.append(word)
            continue
        name = option(word)
        _, has_value, value = word.partition("=")
        if name not in known:
            raise InputError(f"{program(kind)}: there is no option {name}{nearest(name, known)}; see --help")
        if not has_value:
            following = arguments[at] if at < len(arguments) else None
            flag = _is_bool(known[name])
            if following is None or option(following) in known or (flag and following.startswith("--")):
                if not flag:
                    raise InputError(f"{program(kind)}: the option {name} needs a value; see --help")
                value = "true"
            else:
                value = following
                at += 1
        if value == "":
            continue
        if _is_bool(known[name]) and value.lower() in ("true", "false"):
            value = value.capitalize()
        marks = getattr(marked[fields[name]], "__metadata__", ())
        if _REF in marks and name in place_of:
            if _SEVERAL not in marks:
                raise InputError(f"{program(kind)}: the option {name} is there twice, and takes one reference")
            bridged[place_of[name]] += f",{value}"
            continue
        place_of[name] = len(bridged)
        bridged.append(f"{name}={value}")
    return bridged


def _is_bool(hint: Any) -> bool:
    return hint is bool or (isinstance(hint, types.UnionType) and bool in typing.get_args(hint))


def nearest(word: str, choices: typing.Iterable[str]) -> str:
    """` (did you mean x?)`, or nothing when no choice is near."""
    import difflib

    found = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {found[0]}?)" if found else ""
