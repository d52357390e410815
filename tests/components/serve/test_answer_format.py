"""What form an answer shall have is said once, and reaches each engine in its own words."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.serve import fields, requests
from components.serve.engines import Engine, llama_cpp_engine, vllm_engine
from components.serve.requests import ApiError, Limits
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.vocabulary import Encoder

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
OPENAIS = {"type": "json_schema", "json_schema": {"name": "schema", "schema": SCHEMA}}
LLAMA_CPPS = {"type": "json_object", "schema": SCHEMA}
VLLM, LLAMA_CPP = vllm_engine(Path(), "zhllama", 256), llama_cpp_engine(Path("m.gguf"), "zhllama", 256)


def heard(encoder: Encoder, engine: Engine, more: dict[str, Any]) -> dict[str, Any]:
    """What an engine is told of the form."""
    limits = Limits("zhllama", Chat(encoder), 256, engine.refuses, engine.takes)
    body = {"model": "zhllama", "messages": [{"role": "user", "content": "x"}], **more}
    told = engine.request(requests.chat(body, limits)[1])
    return {name: told[name] for name in (*fields.OF_VLLM, "response_format", "grammar") if name in told}


@pytest.mark.parametrize("form", [OPENAIS, LLAMA_CPPS])
def test_a_schema_reaches_every_engine_however_it_is_said(encoder: Encoder, form: dict[str, Any]) -> None:
    assert heard(encoder, VLLM, {"response_format": form}) == {"response_format": OPENAIS}
    assert heard(encoder, LLAMA_CPP, {"response_format": form}) == {"response_format": LLAMA_CPPS}


def test_any_json_and_any_text_are_what_they_were(encoder: Encoder) -> None:
    for engine in (VLLM, LLAMA_CPP):
        any_json = {"response_format": {"type": "json_object"}}
        assert heard(encoder, engine, any_json) == any_json
        assert heard(encoder, engine, {"response_format": {"type": "text"}}) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("json", SCHEMA),
        ("json", json.dumps(SCHEMA)),
        ("regex", "a+"),
        ("grammar", "root ::= x"),
        ("choice", ["a", "b"]),
    ],
)
def test_vllms_names_of_before_are_not_ignored(encoder: Encoder, name: str, value: Any) -> None:
    assert heard(encoder, VLLM, {f"guided_{name}": value}) == {"structured_outputs": {name: value}}
    with pytest.raises(ApiError, match=f"guided_{name} is nothing that this server knows"):
        heard(encoder, LLAMA_CPP, {f"guided_{name}": value})


@pytest.mark.parametrize(
    ("engine", "more"),
    [
        (VLLM, {"guided_json": SCHEMA, "response_format": OPENAIS}),
        (VLLM, {"guided_json": SCHEMA, "guided_regex": "a"}),
        (VLLM, {"guided_choice": ["a"], "structured_outputs": {"choice": ["b"]}}),
        (LLAMA_CPP, {"grammar": "root ::= x", "response_format": OPENAIS}),
    ],
)
def test_two_forms_for_one_answer_are_refused(encoder: Encoder, engine: Engine, more: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="both say what form the answer has"):
        heard(encoder, engine, more)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 10**9},
        {"type": "array", "items": {"maxItems": 1e9}},
        {"enum": list(range(100_000))},
        json.loads('{"x":' * 40 + "1" + "}" * 40),
    ],
    ids=["a repetition", "one inside", "long", "deep"],
)
@pytest.mark.parametrize("name", ["guided_json", "structured_outputs", "chat_template_kwargs"])
def test_a_schema_as_text_has_the_bounds_of_the_object(encoder: Encoder, name: str, schema: dict[str, Any]) -> None:
    for value in (schema, json.dumps(schema), f"\n {json.dumps(schema)}"):
        given = value if name == "guided_json" else {"json": value}
        with pytest.raises(ApiError, match=f"{name} must be .* 32 levels at most, what it repeats counted"):
            heard(encoder, VLLM, {name: given})
