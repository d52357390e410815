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
        own = {name: schema for name, schema in limits.takes.items() if stream}
        known = {name: one for name, one in ({**table, **own}).items() if name not in limits.refuses}
        # null is as if it were not said
        properties = {
            name: one if name in required else {"anyOf": [one, {"type": "null"}]} for name, one in known.items()
        }
        properties["model"] = {"enum": [limits.name]}
        body = {"type": "object", "required": required, "properties": properties, "additionalProperties": False}
        kinds: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if stream:
            kinds["text/event-stream"] = {}
        return {
            "post": {
                "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
                "responses": {"200": {"description": "the answer", "content": kinds}, **refused},
            }
        }

    def read(kind: str) -> dict[str, Any]:
        return {
            "get": {
                "responses": {
                    "200": {"description": "as it says", "content": {kind: {}}},
                    "503": {"description": "not ready"},
                }
            }
        }

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
            "/health": {"get": {**read("application/json")["get"], "security": []}},
            "/metrics": {"get": {**read("text/plain")["get"], "security": []}},
        },
    }
