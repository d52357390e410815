"""`python -m components.<stage> --option value`: the options as a dataclass, through tyro.

KFP passes every parameter as text: `true` / `false` for booleans, and "" for an absent value: here, the default.
"""

import io
import json
import os
import re
import sys
import typing
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from zhllama.artifacts.json_file import value_of
from zhllama.errors import InputError
from zhllama.stage.options import REF, SEVERAL, Config, marks_of, option_of
from zhllama.stage.program import _Terminated
from zhllama.terminal import styled

MACHINE = "--machine"
"""Of a class with that field: options as one JSON object. A pipeline's step is told a job's machine so."""


def parse(kind: type[Config], arguments: Sequence[str]) -> Config:
    """The options as a dataclass. InputError for an unknown option or a value that does not fit."""
    import tyro

    bridged = _bridge(kind, arguments)
    if MACHINE[2:] in marks_of(kind):
        bridged = _with_machine(kind, arguments, bridged)
    prog = f"python -m {program(kind)}"
    config = (tyro.conf.FlagConversionOff,)
    if "--help" in bridged or "-h" in bridged:
        with redirect_stdout(styled(sys.stdout)):
            return tyro.cli(kind, prog=prog, args=bridged, config=config)
    said = io.StringIO()
    try:
        with _wide_terminal(), redirect_stderr(said), redirect_stdout(said):
            return tyro.cli(kind, prog=prog, args=bridged, config=config, use_underscores=False)
    except _Terminated:
        raise
    except SystemExit as error:
        # tyro writes a title, a rule, what is wrong, a rule, and the help of the option
        sections = re.split(r"^[ ]*-{4,}[ ]*$", said.getvalue(), flags=re.MULTILINE)
        complaint = " ".join(sections[min(1, len(sections) - 1)].split()).removesuffix(".")
        raise InputError(f"{program(kind)}: {complaint or 'the options do not parse'}; see --help") from error


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
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _with_machine(kind: type, arguments: Sequence[str], bridged: list[str]) -> list[str]:
    """The bridged options with what `--machine` says put before them, but for those that are there by themselves."""
    told = [word for word in bridged if word.startswith(f"{MACHINE}=")]
    text = told[-1].removeprefix(f"{MACHINE}=") if told else "{}"
    try:
        machine = value_of(text)
    except ValueError as error:
        raise InputError(f'{program(kind)}: {MACHINE} {text}: not JSON ({error}); write {{"memory": "8Gi"}}') from error
    if not isinstance(machine, dict):
        raise InputError(f'{program(kind)}: {MACHINE} {text}: write options by name, as {{"memory": "8Gi"}}')
    # one that is given empty is given, too: it has its default
    given = {_option(word) for word in arguments}
    texts = {
        option_of(name): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in machine.items()
    }
    more = _bridge(kind, [f"{name}={text}" for name, text in texts.items() if name not in given])
    return [*more, *(word for word in bridged if word not in told)]


def _option(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def _bridge(kind: type, arguments: Sequence[str]) -> list[str]:
    """KFP's texts as tyro wants them: empty values dropped, true/false as True/False, unknown options refused. Only an
    option's name is never a value: a prompt may begin with `--`. Of references only an option of several may be
    repeated: of one, all but the last would be lost unseen."""
    hints = typing.get_type_hints(kind)
    marks = {option_of(name): of_field for name, of_field in marks_of(kind).items()}
    flags = {option_of(name) for name in marks_of(kind) if bool in (hints[name], *typing.get_args(hints[name]))}
    place_of: dict[str, int] = {}
    bridged: list[str] = []
    words = deque(arguments)
    while words:
        word = words.popleft()
        if not word.startswith("--") or word == "--help":
            bridged.append(word)
            continue
        name = _option(word)
        _, has_value, value = word.partition("=")
        if name not in marks:
            raise InputError(f"{program(kind)}: there is no option {name}{nearest(name, marks)}; see --help")
        if not has_value:
            alone = not words or _option(words[0]) in marks or (name in flags and words[0].startswith("--"))
            if alone and name not in flags:
                raise InputError(f"{program(kind)}: the option {name} needs a value; see --help")
            value = "true" if alone else words.popleft()
        if value == "":
            continue
        if name in flags and value.lower() in ("true", "false"):
            value = value.capitalize()
        if REF in marks[name] and name in place_of:
            if SEVERAL not in marks[name]:
                raise InputError(f"{program(kind)}: the option {name} is there twice, and takes one reference")
            bridged[place_of[name]] += f",{value}"
            continue
        place_of[name] = len(bridged)
        bridged.append(f"{name}={value}")
    return bridged


def nearest(word: str, choices: typing.Iterable[str]) -> str:
    """` (did you mean x?)`, or nothing when no choice is near."""
    import difflib

    found = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {found[0]}?)" if found else ""
