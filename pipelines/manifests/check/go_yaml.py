"""YAML as sigs.k8s.io/yaml reads it, which the API server and kubectl use: go-yaml's scalars, then JSON.

Unquoted `y`, `no` and `on` are booleans, `1e3`, `0089` and `1_000` numbers; dates, `1:30` and `=` are text. PyYAML's
own resolver says otherwise, so its nodes are taken without it.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

Place = tuple[str | int, ...]
_DEEPEST = 500
_MOST_NODES = 1_000_000
_PLAIN = "plain"
_TAG = "tag:yaml.org,2002:"
_MERGE = "<<"
_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
    **{sign + word: math.inf for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
}
_INTEGER = re.compile(r"([+-]?)(?:0[xX]([0-9a-fA-F]+)|0[bB]([01]+)|0[oO]?([0-7]+)|([1-9][0-9]*|0))")
_PAIR = re.compile(r"(?<!\\)((?:\\\\)*)(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})")
"""Two escapes of JSON that stand for one character: YAML has them not."""
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class NoYaml(Exception):
    """What is wrong, and in which line."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def compose(text: str) -> Iterator[Any]:
    """The node of each document. NoYaml for what is none."""
    import yaml

    base: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)

    class Loader(base):
        def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
            if kind is yaml.ScalarNode:
                return _PLAIN if implicit[0] else f"{_TAG}str"
            return f"{_TAG}{'seq' if kind is yaml.SequenceNode else 'map'}"

    if text.lstrip().startswith("{"):
        text = _PAIR.sub(lambda found: found[1] + json.loads(f'"{found[2]}"'), text)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=base):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise NoYaml(f"nested deeper than {_DEEPEST} levels", line)
        yield from yaml.compose_all(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise NoYaml(problem, mark.line + 1 if mark else 1) from error


def value(node: Any, note_line: Callable[[Place, int], Any]) -> Any:
    """The JSON value of a node. NoYaml for what JSON cannot say, and for anchors that hold themselves."""
    left = _MOST_NODES

    def made(node: Any, place: Place, around: tuple[int, ...]) -> Any:
        nonlocal left
        left -= 1
        line = node.start_mark.line + 1
        if id(node) in around:
            raise NoYaml("an anchor holds itself", line)
        if left < 0:
            raise NoYaml("its aliases make more of it than can be read", line)
        note_line(place, line)
        around = (*around, id(node))
        if node.id == "sequence":
            return [made(inner, (*place, index), around) for index, inner in enumerate(node.value)]
        if node.id == "scalar":
            return scalar(node)
        found: dict[str, Any] = {}
        for key_node, inner in node.value:
            if _merges(key_node):
                for merged in inner.value if inner.id == "sequence" else [inner]:
                    if merged.id != "mapping":
                        raise NoYaml("a merge takes mappings", line)
                    for key, more in made(merged, (*place, _MERGE), around).items():
                        found.setdefault(key, more)
                continue
            key = key_text(key_node)
            note_line((*place, key), key_node.start_mark.line + 1)
            found[key] = made(inner, (*place, key), around)
        return found

    return made(node, (), ())


def repeated(node: Any, place: Place = (), seen: set[int] | None = None) -> Iterator[tuple[Place, int]]:
    """The places of keys that a mapping holds already, and their lines."""
    seen = set() if seen is None else seen
    if node.id == "scalar" or id(node) in seen:
        return
    seen.add(id(node))
    if node.id == "sequence":
        for index, inner in enumerate(node.value):
            yield from repeated(inner, (*place, index), seen)
        return
    keys: set[str] = set()
    for key_node, inner in node.value:
        key = _MERGE if _merges(key_node) else key_text(key_node)
        if key in keys and key != _MERGE:
            yield (*place, key), key_node.start_mark.line + 1
        keys.add(key)
        yield from repeated(inner, (*place, key), seen)


def _merges(key: Any) -> bool:
    return key.id == "scalar" and key.value == _MERGE and key.tag in (_PLAIN, f"{_TAG}merge")


def key_text(node: Any) -> str:
    """A key of JSON."""
    line = node.start_mark.line + 1
    if node.id != "scalar":
        raise NoYaml("a key is no text", line)
    key = scalar(node)
    if key is None:
        raise NoYaml("a key is null", line)
    return str(key).lower() if isinstance(key, bool) else str(key)


def scalar(node: Any) -> Any:
    line = node.start_mark.line + 1
    tag = node.tag.removeprefix(_TAG)
    if tag == "binary":
        try:
            return base64.b64decode(node.value, validate=True).decode("utf-8", "replace")
        except (binascii.Error, ValueError) as error:
            raise NoYaml("!!binary is not base64", line) from error
    if tag in (_PLAIN, "int", "float", "bool", "null"):
        found = plain(node.value)
        if isinstance(found, float) and not math.isfinite(found):
            raise NoYaml(f"JSON has no {node.value}", line)
        kinds = {"int": int, "float": (int, float), "bool": bool, "null": type(None)}
        if tag != _PLAIN and not isinstance(found, kinds[tag]):  # type: ignore[arg-type]
            raise NoYaml(f"{node.value!r} is no !!{tag}", line)
        return found
    return node.value.encode("utf-8", "replace").decode("utf-8")


def quoted(text: str) -> str:
    """The YAML that PyYAML wrote, with quotes around those of its texts that are something else here: a label `y`, a
    commit `12e4567`."""
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    resolve = yaml.resolver.Resolver().resolve
    found: list[tuple[Any, Any]] = []
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and event.value:
            is_text = resolve(yaml.ScalarNode, event.value, (True, False)) == f"{_TAG}str"
            if is_text and not isinstance(plain(event.value), str):
                found.append((event.start_mark, event.end_mark))
    for start, end in reversed(found):
        text = f"{text[: start.index]}'{text[start.index : end.index]}'{text[end.index :]}"
    return text


def plain(text: str) -> Any:
    """What an unquoted scalar is: a text, a number, a boolean or nothing."""
    if text in _WORDS:
        return _WORDS[text]
    if not text[0].isascii() or text[0] not in "+-.0123456789":
        return text
    digits = text.replace("_", "")
    if len(digits) < 100 and (found := _INTEGER.fullmatch(digits)):
        sign, *bases = found.groups()
        number = next(int(part, base) for part, base in zip(bases, (16, 2, 8, 10), strict=True) if part)
        if number < 2**64:
            return -number if sign == "-" else number
    if not _FLOAT.fullmatch(digits):
        return text
    found_float = float(digits)
    if math.isinf(found_float):
        return text
    # JSON's writer in Go says 1e3 as 1000
    return int(found_float) if found_float.is_integer() and abs(found_float) < 1e21 else found_float
