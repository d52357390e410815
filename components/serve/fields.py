"""What a request may say, in one table: each field with its bounds, as JSON Schema; what is not in it is refused.

Requests are held against it before any work is done for them, and /openapi.json is made of it. The bounds are far above
what a conversation needs, and below what would keep the server or an engine busy for everybody else.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from zhllama.artifacts.json_file import value_of

Schema = Mapping[str, Any]
"""JSON Schema, as far as `fits` knows it. `description`: what a value must be, the end of the line that refuses it."""

LONGEST_TEXT = 65_536
"""Characters of a grammar, a schema, a pattern."""
MOST_MESSAGES = 2_000
MOST_STOPS, LONGEST_STOP = 16, 256
DEEPEST = 32
"""Objects and lists in one another, of a value that an engine is sent."""


def number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high, "description": f"a number between {low} and {high}"}


def whole(low: int, high: int) -> Schema:
    return {
        "type": "integer",
        "minimum": low,
        "maximum": high,
        "description": f"a whole number between {low} and {high}",
    }


def text(longest: int, shortest: int = 0) -> Schema:
    said = f"a text of at most {longest:,} characters" + (" that is not an empty text" if shortest else "")
    return {"type": "string", "minLength": shortest, "maxLength": longest, "description": said}


def several(items: Schema, most: int, name: str) -> Schema:
    return {"type": "array", "maxItems": most, "items": items, "description": f"a list of at most {most:,} {name}"}


def only(value: Any, why: str) -> Schema:
    """What may be said, and says nothing."""
    return {"enum": value, "description": why}


FLAG: Schema = {"type": "boolean", "description": "true or false"}
ANY: Schema = {"description": "anything"}
OBJECT: Schema = {
    "type": "object",
    "description": f"an object, of {LONGEST_TEXT:,} characters and {DEEPEST} levels at most, what it repeats counted",
}
JSON_TEXT = text(LONGEST_TEXT)
"""An OBJECT as a text, with its bounds."""
IDS = several(whole(0, 2**31), 4_096, "ids")
WORDS = several(text(LONGEST_TEXT), 1_024, "texts")

MODEL: Schema = {"type": "string", "description": "the name of a model"}
_ANSWERED: dict[str, Schema] = {
    "model": MODEL,
    "stream": FLAG,
    "max_tokens": whole(1, 10**9),
    "min_tokens": whole(0, 10**9),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": whole(-1, 10**9),
    "min_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0.01, 100),
    "seed": whole(-(2**63), 2**63 - 1),
    "stop": {
        "anyOf": [
            text(LONGEST_STOP, shortest=1),
            several(text(LONGEST_STOP, shortest=1), MOST_STOPS, "texts"),
        ],
        "description": f"a text or a list of at most {MOST_STOPS} texts, each of at most {LONGEST_STOP} "
        "characters and none an empty text",
    },
    "logit_bias": {
        "type": "object", "maxProperties": 1_024, "additionalProperties": number(-(10**6), 10**6),
        "description": 'ids with a number each, at most 1,024: {"42": -5}',
    },
    "n": only([1], "1: this server gives one answer to a request"),
    "response_format": OBJECT,
}  # fmt: skip
CHAT: dict[str, Schema] = {
    **_ANSWERED,
    "messages": {
        "type": "array", "minItems": 1, "maxItems": MOST_MESSAGES,
        "items": {
            "type": "object", "required": ["role", "content"],
            "properties": {
                "role": {"enum": ["system", "developer", "user", "assistant"]},
                "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {
                    "type": "object", "required": ["type", "text"],
                    "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
                }}]},
            },
        },
        "description": f"a list with at least one message and at most {MOST_MESSAGES:,}",
    },
    "max_completion_tokens": whole(1, 10**9),
    "logprobs": FLAG,
    "top_logprobs": whole(0, 20),
}  # fmt: skip
COMPLETION: dict[str, Schema] = {
    **_ANSWERED,
    "prompt": {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1}],
        "description": "one text",
    },
    "logprobs": whole(0, 20),
    "echo": FLAG,
    "suffix": text(LONGEST_TEXT),
    "best_of": only([1], "1: this server gives one answer to a request"),
}
TOKENIZE: dict[str, Schema] = {
    "model": MODEL,
    "prompt": {"type": "string", "description": "a text"},
    "messages": CHAT["messages"],
    "add_special_tokens": FLAG,
    "add_generation_prompt": only([True], "true: ids are those that an answer follows"),
}
DETOKENIZE: dict[str, Schema] = {"model": MODEL, "tokens": several(whole(0, 2**31), 2**17, "ids")}

_TEXT_ALONE = "empty: this model answers with text alone"
NOTHING: dict[str, Schema] = {
    "tools": only([[]], _TEXT_ALONE),
    "functions": only([[]], _TEXT_ALONE),
    "audio": only([{}], _TEXT_ALONE),
    "modalities": only([[], ["text"]], '["text"]: this model answers with text alone'),
    **dict.fromkeys(("tool_choice", "parallel_tool_calls", "function_call"), ANY),
    # what OpenAI's clients say to its servers about the request, not about the answer; not every engine takes them
    **dict.fromkeys(
        ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
         "prompt_cache_retention", "prediction", "stream_options"), ANY
    ),
}  # fmt: skip
"""Fields that change nothing in an answer, and are not passed on."""

OF_MESSAGES = ("role", "content", "name", "refusal", "annotations", "reasoning", "reasoning_content", "id", "type")
"""Fields of a message; the last ones come back with an answer, which a client sends again as history."""

OTHER_NAMES = {"repeat_penalty": "repetition_penalty"}
"""What an engine calls it → what it is called here."""

OF_LLAMA_CPP: dict[str, Schema] = {
    "mirostat_mode": whole(0, 2),
    "mirostat_tau": number(0, 10),
    "mirostat_eta": number(0.001, 1),
    "grammar": text(LONGEST_TEXT),
    "logit_bias_type": only(["input_ids", "tokens"], '"input_ids" or "tokens"'),
}
OF_VLLM: dict[str, Schema] = {
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids"), IDS),
    **dict.fromkeys(
        ("ignore_eos", "use_beam_search", "include_stop_str_in_output", "skip_special_tokens",
         "spaces_between_special_tokens", "return_token_ids"), FLAG
    ),
    "bad_words": WORDS,
    "length_penalty": number(-100, 100),
    "truncate_prompt_tokens": whole(-1, 10**9),
    "prompt_logprobs": whole(0, 20),
    "priority": whole(-(2**31), 2**31),
    **dict.fromkeys(("guided_regex", "guided_grammar"), text(LONGEST_TEXT)),
    "guided_choice": WORDS,
    "guided_json": {
        "anyOf": [JSON_TEXT, OBJECT],
        "description": f"a schema, as an object or its text, {OBJECT['description'].partition(', ')[2]}",
    },
    **dict.fromkeys(("structured_outputs", "chat_template_kwargs"), OBJECT),
}  # fmt: skip

_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict,
}  # fmt: skip


def fits(value: Any, schema: Schema) -> bool:
    """Whether a value is what a schema of this table says. A whole number is an int: 1.0 is none."""
    kind = schema.get("type")
    if kind and (not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if kind in ("integer", "number"):
        return bool(schema["minimum"] <= value <= schema["maximum"])
    if kind == "string":
        size = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        return size and (schema is not JSON_TEXT or _is_small(value))
    if kind == "array":
        size = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return size and all(fits(one, schema["items"]) for one in value)
    if kind == "object":
        if len(value) > schema.get("maxProperties", len(value)) or not value.keys() >= set(schema.get("required", ())):
            return False
        known, others = schema.get("properties", {}), schema.get("additionalProperties", ANY)
        return all(fits(one, known.get(name, others)) for name, one in value.items()) and (
            schema is not OBJECT or _is_small(value)
        )
    return True


_REPEAT = ("minLength", "maxLength", "minItems", "maxItems")


def _is_small(value: Any) -> bool:
    """Whether a value of no fixed form (a JSON schema, say) may be handed on, counted as it is walked."""
    left: float = LONGEST_TEXT
    level = [value]
    for _ in range(DEEPEST):
        found: list[Any] = []
        for one in level:
            left -= len(one) if isinstance(one, str | list | dict) else 1
            if left < 0:
                return False
            if isinstance(one, dict):
                left -= sum(map(len, one))
                # engines write a repetition out
                left -= sum(most for name in _REPEAT if isinstance(most := one.get(name), int | float) and most > 0)
                found += one.values()
            elif isinstance(one, list):
                found += one
            elif isinstance(one, str) and one.lstrip()[:1] in ("{", "["):
                # engines take a schema as its text too
                with suppress(ValueError):
                    found.append(value_of(one))
        level = found
    return not level
