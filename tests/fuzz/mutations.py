"""Changes of a file that keep its form, so that what is read after its syntax is reached: of a value in JSON or YAML,
of a safetensors header, of a record in a zip. Where the form is lost, bytes are changed.
"""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ",
    "a", "x" * 300, "../../x", "/etc/x", "\x1b[2J", "\ud800", "中", "1", "[[[", "(a+)+$",
    "{{$.inputs.parameters['x']}}",
    "{{$}}", [], {}, [[]], [None], [[[[[[]]]]]], {"": None}, {"a": {"a": {"a": {}}}}, [1, "a", {}], ["a"] * 50,
)  # fmt: skip
Bytes = Callable[[bytes], bytes]
"""Changes bytes."""


def changed(content: bytes, form: str, chance: random.Random, of_bytes: Bytes) -> bytes:
    """A file after one or several changes; `of_bytes` makes those that know of no form."""
    if form != "bytes" and chance.random() < 0.85:
        try:
            return _FORMS[form](content, chance, of_bytes)
        except Exception:  # noqa: BLE001 - it has lost its form
            return of_bytes(content)
    return of_bytes(content)


def _value(value: Any, chance: random.Random) -> Any:
    """After some changes, in its place."""
    for _ in range(chance.choice((1, 1, 2))):
        places = list(_places(value))
        if not places:
            return deepcopy(chance.choice(ODD))
        holder, key = chance.choice(places)
        other, of_other = chance.choice(places)
        match chance.randrange(7):
            case 0 | 1:
                holder[key] = deepcopy(chance.choice(ODD))
            case 2:
                del holder[key]
            case 3:
                holder[key] = deepcopy(other[of_other])
            case 4 if isinstance(holder, dict):
                new = of_other if isinstance(of_other, str) and chance.random() < 0.5 else chance.choice(("", "x", "*"))
                holder[new] = holder.pop(key)
            case 5:
                holder[key] = [holder[key]] if chance.random() < 0.5 else {"a": holder[key]}
            case _ if type(holder[key]) is int:
                holder[key] += chance.choice((-1, 1, 7, 2**32))
            case _ if isinstance(holder[key], str):
                text, at = holder[key], chance.randrange(len(holder[key]) + 1)
                holder[key] = text[:at] + str(chance.choice(ODD))[:40] + text[at + chance.randrange(3) :]
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    left, seen = [value], set()
    while left:
        holder = left.pop()
        # YAML's may hold itself
        if isinstance(holder, dict | list) and id(holder) not in seen:
            seen.add(id(holder))
            for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
                yield holder, key
                left.append(holder[key])


def _json(content: bytes, chance: random.Random, of_bytes: Bytes) -> bytes:
    return json.dumps(_value(json.loads(content), chance)).encode()


def _yaml(content: bytes, chance: random.Random, of_bytes: Bytes) -> bytes:
    import yaml

    documents = list(yaml.load_all(content, yaml.CSafeLoader))
    if chance.random() < 0.1:
        # a tag, an anchor or a merge where a value stands
        odd = ("!!int", "!!float x", "!!bool x", "!!timestamp x", "!!binary é", "!!set {a, b}", "&a [*a]", "{<<: [a]}")
        lines = content.decode().splitlines()
        at = chance.choice([number for number, line in enumerate(lines) if ": " in line])
        lines[at] = f"{lines[at].split(': ')[0]}: {chance.choice((*odd, '2001-99-99', '0x', '1:99:99'))}"
        return "\n".join(lines).encode()
    at = chance.randrange(len(documents))
    documents[at] = _value(documents[at], chance)
    return bytes(yaml.dump_all(documents, Dumper=yaml.CSafeDumper, encoding="utf-8"))


def _safetensors(content: bytes, chance: random.Random, of_bytes: Bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + length], content[8 + length :]
    header = _json(header, chance, of_bytes) if chance.random() < 0.9 else of_bytes(header)
    return struct.pack("<Q", len(header)) + header + rest


def _zip(content: bytes, chance: random.Random, of_bytes: Bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    # the pickle above all
    at = 0 if chance.random() < 0.8 else chance.randrange(len(records))
    name, record = records[at]
    records[at] = name, of_bytes(record)
    if chance.random() < 0.1:
        del records[chance.randrange(len(records))]
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED if chance.random() < 0.95 else zipfile.ZIP_DEFLATED) as archive:
        for name, record in records:
            archive.writestr(zipfile.ZipInfo(name), record)
    return made.getvalue()


def _lines(content: bytes, chance: random.Random, of_bytes: Bytes) -> bytes:
    lines = content.splitlines()
    at = chance.randrange(len(lines))
    lines[at] = _json(lines[at], chance, of_bytes)
    return b"".join(line + b"\n" for line in lines)


_FORMS = {"json": _json, "lines": _lines, "yaml": _yaml, "safetensors": _safetensors, "zip": _zip}
