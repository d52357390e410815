"""The API's description (OpenAPI 3.1), made of the table that requests are held against."""

from collections.abc import Mapping
from typing import Any

from components.serve import fields
from components.serve.fields import Schema
from components.serve.requests import Limits

_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def described(limits: Limits) -> dict[str, Any]:
    """Of a server with these limits."""
    error = {"description": "an error, as OpenAI has them", "content": {"application/json": {"schema": _ERROR}}}
    refused = dict.fromkeys(("400", "401", "403", "404", "413", "415", "502", "503", "504"), error)

    def operation(table: Mapping[str, Schema], required: list[str], stream: bool = False) -> dict[str, Any]:
        known = {**table, **limits.takes, **fields.NOTHING} if stream else {**table}
        known |= {other: known[name] for other, name in fields.OTHER_NAMES.items() if name in known}
        # null is as if it were not said, whatever it is called
        nothing = {"type": "null"}
        properties: dict[str, Any] = {
            name: one if name in required else {"anyOf": [one, nothing]}
            for name, one in known.items() if name not in limits.refuses
        }  # fmt: skip
        properties["model"] = {"enum": [limits.name]}
        body = {"type": "object", "required": required, "properties": properties, "additionalProperties": nothing}
        kinds: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if stream:
            kinds["text/event-stream"] = {}
        return {
            "post": {
                "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
                "responses": {"200": {"description": "the answer", "content": kinds}, **refused},
            }
        }

    def read(kind: str, **more: Any) -> dict[str, Any]:
        answer = {"description": "as the path says", "content": {kind: {}}}
        return {"get": {"responses": {"200": answer, "503": answer, **dict.fromkeys(("401", "403"), error)}, **more}}

    return {
        "openapi": "3.1.0",
        "info": {"title": "zhllama", "version": "1"},
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}],
        "paths": {
            "/v1/chat/completions": operation(fields.CHAT, ["model", "messages"], stream=True),
            "/v1/completions": operation(fields.COMPLETION, ["model", "prompt"], stream=True),
            "/tokenize": operation(fields.TOKENIZE, ["model"]),
            "/detokenize": operation(fields.DETOKENIZE, ["model", "tokens"]),
            "/v1/models": read("application/json"),
            "/health": read("application/json", security=[]),
            "/metrics": read("text/plain", security=[]),
        },
    }
