"""Which JSON schemas llama-cpp-python's grammars hold an answer to; any other is refused by the name of what is not.

Known of llama-cpp-python 0.3: a schema that it cannot read is any JSON, what it does not know in one is as if it were
not there, a pattern's alternatives reach into the quotes around them, and a definition is a property's of its name.
"""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

READ = (
    "$ref (#/…), anyOf, oneOf, const, enum, type, properties, required, additionalProperties, items, prefixItems, "
    "minItems, maxItems, minLength, maxLength, pattern (^…$), and format: date, time, date-time, uuid"
)
MOST_PROPERTIES = 256
"""Of a schema's objects together: its grammar takes time with their cube, 22 s for 900."""
_SAYS_NOTHING = {
    "title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
    "$schema", "$id", "$comment", "$defs", "definitions",
}  # fmt: skip
_FORMATS = re.compile(r"date|time|date-time|uuid[1-5]?")
_ESCAPED = re.compile(r"\\.|\[\^?(?:[^\\\]]|\\.)*\]", re.DOTALL)
_UNKNOWN = re.compile(r"[\^$]|[*+?}][?+]|\(\?")


def unread(schema: Any) -> str:
    """The first of a schema's words that an answer would not be held to; empty where there is none."""
    parts, left = [schema], MOST_PROPERTIES
    while parts:
        one = parts.pop()
        if not isinstance(one, Mapping):
            return repr(one)[:64]
        known = _known(one)
        for word in one:
            if word not in known and word not in _SAYS_NOTHING:
                return str(word)[:64]
        if "pattern" in known and not _is_plain(one["pattern"]):
            return f"the pattern {one['pattern']!r}"[:200]
        left -= len(one.get("properties", ()))
        if left < 0:
            return f"more than {MOST_PROPERTIES} properties"
        parts += _parts(one)
    return ""


def _known(schema: Mapping[str, Any]) -> set[str]:
    """The words that are read of this one, in the order in which llama-cpp-python looks for them."""
    kind, properties = schema.get("type"), schema.get("properties")
    for word in ("$ref", "oneOf", "anyOf"):
        if word in schema:
            return {word}
    if isinstance(kind, list):
        return {"type"}
    for word in ("const", "enum"):
        if word in schema:
            return {"type", word}
    known = {"type"}
    if kind in (None, "object") and (properties is not None or schema.get("additionalProperties", True) is not True):
        known |= {"properties", "additionalProperties"}
        required = schema.get("required", [])
        if (
            isinstance(properties, Mapping)
            and isinstance(required, list)
            and all(one in properties for one in required)
        ):
            known |= {"required"}
    elif kind in (None, "array") and "items" in schema:
        known |= {"items", "minItems", "maxItems"}
    elif kind in (None, "array") and "prefixItems" in schema:
        known |= {"prefixItems"}
    elif kind in (None, "string") and "pattern" in schema:
        known |= {"pattern"}
    elif kind in (None, "string") and _FORMATS.fullmatch(str(schema.get("format"))):
        known |= {"format"}
    elif kind == "string":
        known |= {"minLength", "maxLength"}
    elif kind == "object":
        known |= {"additionalProperties"}
    return known


def _parts(schema: Mapping[str, Any]) -> Iterator[Any]:
    for word in ("$defs", "definitions", "properties"):
        yield from (schema.get(word) or {}).values()
    for word in ("oneOf", "anyOf", "prefixItems"):
        yield from schema.get(word) or ()
    for word in ("items", "additionalProperties"):
        if not isinstance(schema.get(word, True), bool):
            yield schema[word]


def _is_plain(pattern: Any) -> bool:
    """Whether it is ^…$ with nothing in it that becomes something else as a grammar."""
    if not isinstance(pattern, str) or not (pattern[:1] == "^" and pattern[-1:] == "$") or len(pattern) < 2:
        return False
    plain = _ESCAPED.sub("x", pattern[1:-1])
    depths = list(accumulate((sign == "(") - (sign == ")") for sign in plain))
    balanced = min(depths, default=0) == 0 == (depths or [0])[-1]
    return balanced and not _UNKNOWN.search(plain) and ("|", 0) not in zip(plain, depths)


def resolved(converter: Any, reference: str) -> str:
    """For its SchemaConverter: the rule of a definition, under a name that no property's rule has."""
    if reference not in converter._refs:
        raise ValueError(f"it does not find {reference}")
    name = f"--{list(converter._refs).index(reference)}"
    if reference not in converter._refs_being_resolved:
        converter._refs_being_resolved.add(reference)
        made = converter.visit(converter._refs[reference], name)
        if made != name:
            converter._add_rule(name, made)
    return name


def grammar_of(schema: Any) -> str:
    """ValueError, which says why, for a schema that an answer would not be held to."""
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        if wrong := unread(schema):
            raise ValueError(f"it does not know {wrong}")
        return str(json_schema_to_gbnf(json.dumps(schema)))
    except (AssertionError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)[:200]) from error
