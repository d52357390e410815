"""What form an answer shall have: one way to say it for all engines, each form followed or refused.

Engines answer in free words, or in any JSON, where they do not know a field: vLLM 0.32 ignores the guided_* of its
past and llama.cpp's `schema` beside json_object, llama.cpp a response_format of a completion.
"""

from collections.abc import Mapping
from typing import Any

GUIDED = ("guided_json", "guided_regex", "guided_grammar", "guided_choice")
"""vLLM's names of before, each with what follows the _ inside structured_outputs now."""
FORMS = ("response_format", "grammar", "structured_outputs", *GUIDED)
_OF_OPENAI = ("name", "description", "schema", "strict")
_ANY_JSON = {"type": "json_object"}


def said_once(body: dict[str, Any], more: bool) -> str:
    """Why a request's form cannot be followed, or empty; what it says is in OpenAI's words then. more: whether the
    engine has kinds beside OpenAI's."""
    if body.get("response_format") == {"type": "text"}:
        del body["response_format"]
    given = [name for name in FORMS if name in body]
    if len(given) > 1:
        return f"{given[0]} and {given[1]} both say what form the answer has; give one of them"
    form = body.get("response_format")
    if form is None:
        return ""
    kind = form.get("type")
    if kind == "json_object" and isinstance(form.get("schema"), Mapping) and len(form) == 2:
        body["response_format"] = in_openais_words(form["schema"])
    elif kind == "json_schema":
        said = form.get("json_schema")
        if not isinstance(said, Mapping) or len(form) > 2 or not isinstance(said.get("schema"), Mapping):
            return 'response_format must be {"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}'
        if others := [name for name in said if name not in _OF_OPENAI]:
            return f"response_format.json_schema.{others[0][:64]} is nothing that this server knows; leave it out"
    elif form != _ANY_JSON and not (more and isinstance(kind, str) and kind not in ("text", "json_object")):
        return 'response_format must be {"type": "text"}, {"type": "json_object"}, or json_schema with a schema'
    return ""


def in_openais_words(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}


def in_llama_cpps_words(body: dict[str, Any]) -> None:
    form = body.get("response_format", {})
    if form.get("type") == "json_schema":
        body["response_format"] = {**_ANY_JSON, "schema": form["json_schema"]["schema"]}


def in_vllms_words(body: dict[str, Any]) -> None:
    for name in GUIDED:
        if name in body:
            body["structured_outputs"] = {name.partition("_")[2]: body.pop(name)}
