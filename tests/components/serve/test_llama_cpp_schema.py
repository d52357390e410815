"""What llama-cpp-python's grammars hold an answer to, and what is refused by its name."""

from typing import Any

import pytest

from components.serve.llama_cpp_schema import unread

PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        PERSON,
        {**PERSON, "title": "Person", "description": "…", "$schema": "https://json-schema.org/draft/2020-12/schema"},
        {"$defs": {"person": PERSON}, "type": "object", "properties": {"who": {"$ref": "#/$defs/person"}}},
        {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}], "default": None, "title": "Name"},
        {"type": ["integer", "null"]},
        {"type": "string", "enum": ["好", "坏"]},
        {"const": 1},
        {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 3},
        {"prefixItems": [{"type": "integer"}, {"type": "string"}]},
        {"type": "object", "additionalProperties": {"type": "number"}},
        {"type": "object", "properties": {"a": {}}, "additionalProperties": False},
        {"type": "object", "properties": {"minimum": {"type": "integer"}, "$ref": {"type": "null"}}},
        {"type": "string", "format": "date-time"},
        {"type": "string", "pattern": r"^(a|b)[^|$]{2}\$$"},
    ],
    ids=str,
)  # fmt: skip
def test_what_it_holds_an_answer_to(schema: dict[str, Any]) -> None:
    assert unread(schema) == ""


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "integer", "minimum": 1}, "minimum"),
        ({"type": "integer", "multipleOf": 7}, "multipleOf"),
        ({"type": "array", "items": {}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "minItems": 1}, "minItems"),
        ({"prefixItems": [{}], "maxItems": 1}, "maxItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"allOf": [PERSON]}, "allOf"),
        ({"if": PERSON, "then": {}}, "if"),
        ({**PERSON, "patternProperties": {}}, "patternProperties"),
        ({**PERSON, "required": ["age"]}, "required"),
        ({"type": "object", "required": ["age"]}, "required"),
        ({"type": "object", "minProperties": 1}, "minProperties"),
        ({"$ref": "#/$defs/a", "maxLength": 3}, "maxLength"),
        ({"anyOf": [PERSON], "type": "object"}, "type"),
        ({"anyOf": [PERSON], "oneOf": [PERSON]}, "anyOf"),
        ({"type": ["string", "null"], "maxLength": 3}, "maxLength"),
        ({"type": "string", "format": "email"}, "format"),
        ({"type": "string", "format": "date", "maxLength": 3}, "maxLength"),
        ({"maxLength": 3}, "maxLength"),
        ({"type": "string", "pattern": "^a$", "maxLength": 3}, "maxLength"),
        ({"type": "string", "pattern": "a"}, "the pattern 'a'"),
        ({"type": "string", "pattern": "^a|b$"}, "the pattern '^a|b$'"),
        ({"type": "string", "pattern": "^((a$"}, "the pattern '^((a$'"),
        ({"type": "string", "pattern": "^)($"}, "the pattern '^)($'"),
        ({"anyOf": [{"properties": {f"{at}": {} for at in range(100)}}] * 3}, "more than 256 properties"),
        ({"type": "string", "pattern": "^a$b$"}, "the pattern '^a$b$'"),
        ({"type": "string", "pattern": "^a+?$"}, "the pattern '^a+?$'"),
        ({"type": "string", "pattern": "^(?=a)$"}, "the pattern '^(?=a)$'"),
        ({"properties": {"a": {"items": {"minimum": 1}}}}, "minimum"),
        ({"$defs": {"a": {"minimum": 1}}}, "minimum"),
        ({"properties": {"a": True}}, "True"),
        (True, "True"),
        ([], "[]"),
    ],
    ids=lambda given: str(given)[:50],
)  # fmt: skip
def test_any_other_word_is_named(schema: Any, word: str) -> None:
    assert unread(schema) == word
