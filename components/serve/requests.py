"""What a request may say, checked before an engine sees it: wrong ones get OpenAI's 4xx body, and the engine none.

Engines differ in what they do with a wrong one: transformers' server answers 500 to a message without a role, and says
nothing of a prompt that is longer than the model's positions. They differ in names too: top_k is transformers' only
inside a JSON text, repetition_penalty is llama.cpp's repeat_penalty, and a name that one does not know it refuses, or
takes and does nothing with. Here all have the same names (OpenAI's and vLLM's), each honoured or refused.
"""

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

from components.serve import answer_format, fields
from components.serve.fields import Schema
from zhllama.artifacts.json_file import STRICT, value_of
from zhllama.errors import InputError
from zhllama.inference.sampling import Sampling
from zhllama.tokenizer.chat import Chat, Message

LONGEST_BODY = 4 * 2**20
"""Bytes: some hundred times what a context of 4,096 tokens takes."""
LEAST_TEMPERATURE = 0.001
"""Below it a logit divided by it may be infinite, which ends a GPU's context for everybody: 0, greedy, is the same."""


class ApiError(Exception):
    """An answer that is an error: its status and OpenAI's body."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


Validated = tuple[list[int], dict[str, Any]]
"""A request that is in order: its prompt's ids, and what the engine is sent."""


@dataclass(frozen=True)
class Limits:
    """What requests are held against."""

    name: str
    """What the model is called."""
    chat: Chat
    """How it is asked."""
    positions: int
    """Of prompt and answer together."""
    refuses: tuple[str, ...] = ()
    """Fields that the engine cannot honour."""
    takes: Mapping[str, Schema] = field(default_factory=dict)
    """Fields that this engine alone has."""

    @cached_property
    def longest(self) -> int:
        """Characters that the context holds at most, were each token the longest piece."""
        return self.positions * max(map(len, self.chat.encoder.pieces))

    def check_length(self, characters: int, name: str) -> None:
        """ApiError 400 for a text that is too long to be worth its encoding."""
        if characters > self.longest:
            said = (
                f"this model's context is {self.positions} tokens, and {characters:,} characters are more; shorten it"
            )
            raise ApiError(400, said, name, "context_length_exceeded")

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """ApiError 400 for a conversation that is too long, or that the model's chat template refuses."""
        self.check_length(sum(len(message["content"]) for message in messages), "messages")
        try:
            return self.chat.ids(messages)
        except InputError as error:
            raise ApiError(400, str(error), "messages") from error

    def text_ids(self, body: Mapping[str, Any]) -> list[int]:
        """Of `prompt`, with BOS unless `add_special_tokens` is false; a special token in it is that token."""
        self.check_length(len(body["prompt"]), "prompt")
        begin = self.chat.encoder.begin if body.get("add_special_tokens", True) else []
        return [*begin, *self.chat.encode(body["prompt"])]


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(digits: str) -> float:
    return value if math.isfinite(value := float(digits)) else _no_number(digits[:40])


# JSON has no NaN and no infinity; Python's reader has. And of a key that is there twice, which would count?
_DECODER = json.JSONDecoder(
    object_pairs_hook=STRICT.object_pairs_hook, parse_constant=_no_number, parse_float=_finite
)  # fmt: skip


def parse_json(content: bytes) -> dict[str, Any]:
    """The body as an object; ApiError 400 for anything else."""
    try:
        body = value_of(content, _DECODER)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a {type(body).__name__}; a JSON object is needed")
    return body


def chat(body: Mapping[str, Any], limits: Limits) -> Validated:
    """A request to /v1/chat/completions."""
    checked = checked_fields(body, fields.CHAT, limits)
    checked["messages"] = messages = checked_messages(body)
    return _asked(checked, limits.chat_ids(messages), limits)


def completion(body: Mapping[str, Any], limits: Limits) -> Validated:
    """A request to /v1/completions: the model reads the prompt as it is."""
    checked = checked_fields(body, fields.COMPLETION, limits)
    prompt = checked.get("prompt")
    if isinstance(prompt, list):
        (prompt,) = prompt
    if prompt is None:
        raise ApiError(400, "prompt must be one text", "prompt")
    checked["prompt"] = prompt
    return _asked(checked, limits.text_ids({"prompt": prompt}), limits)


def tokenized(body: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """The answer to /tokenize, which is vLLM's: {"tokens", "count", "max_model_len"} of `prompt` or of `messages`."""
    checked = checked_fields(body, fields.TOKENIZE, limits)
    if "messages" in checked:
        ids = limits.chat_ids(checked_messages(body))
    elif "prompt" in checked:
        ids = limits.text_ids(checked)
    else:
        raise ApiError(400, "give prompt, a text, or messages", "prompt")
    return {"tokens": ids, "count": len(ids), "max_model_len": limits.positions}


def detokenized(body: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """The answer to /detokenize, which is vLLM's: {"prompt"} of `tokens`."""
    tokens = checked_fields(body, fields.DETOKENIZE, limits).get("tokens")
    if tokens is None:
        raise ApiError(400, "tokens must be a list of ids", "tokens")
    try:
        return {"prompt": limits.chat.decode(tokens)}
    except InputError as error:
        raise ApiError(400, str(error), "tokens") from error


def checked_fields(body: Mapping[str, Any], table: Mapping[str, Schema], limits: Limits) -> dict[str, Any]:
    """What is said in a request, by its name here. ApiError for a field that is in no table, or out of its bounds."""
    check_model(body, limits)
    for other, name in fields.OTHER_NAMES.items():
        if body.get(other) is not None and body.get(name) is not None:
            raise ApiError(400, f"{other} and {name} are one; give one of them", name)
    known: dict[str, Schema] = {**table, **limits.takes, **fields.NOTHING} if "stream" in table else {**table}
    found: dict[str, Any] = {}
    for given, value in body.items():
        name = fields.OTHER_NAMES.get(given, given)
        schema = known.get(name)
        if value is None:
            continue
        if schema is None:
            raise ApiError(400, f"{given[:64]} is nothing that this server knows; leave it out", given[:64])
        # of messages checked_messages says which one is wrong
        if name != "messages" and not fields.fits(value, schema):
            raise ApiError(400, f"{name} must be {schema['description']}", name)
        if name not in fields.NOTHING:
            found[name] = float(value) if schema.get("type") == "number" else value
    return found


def checked_messages(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages, each {"role", "content"} with its text in one piece. ApiError 400 names the one that is wrong."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message", "messages")
    if len(messages) > fields.MOST_MESSAGES:
        said = f"{len(messages):,} messages are more than a conversation has: {fields.MOST_MESSAGES:,} at most"
        raise ApiError(400, said, "messages")
    found: list[dict[str, str]] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{where} must be an object with role and content", "messages")
        role = "system" if message.get("role") == "developer" else message.get("role")
        if role not in ("system", "user", "assistant"):
            raise ApiError(400, f"{where}.role must be system, user or assistant, not {reprlib.repr(role)}", "messages")
        if more := [name for name, value in message.items() if value and name not in fields.OF_MESSAGES]:
            raise ApiError(400, f"{where}.{more[0][:64]} is nothing that this server knows; leave it out", "messages")
        content = message.get("content")
        parts: list[Any] = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ApiError(400, f"{where}.content must be text; this model reads nothing else", "messages")
        found.append({"role": role, "content": "".join(part["text"] for part in parts)})
    if found[-1]["role"] != "user":
        raise ApiError(400, "the last message must be the user's", "messages")
    return found


def check_model(body: Mapping[str, Any], limits: Limits) -> None:
    name = body.get("model")
    if not isinstance(name, str):
        raise ApiError(400, "model must be the name of a model", "model")
    if name != limits.name:
        said = f"the model {reprlib.repr(name)} does not exist; this server has {limits.name!r}"
        raise ApiError(404, said, "model", "model_not_found")


def _asked(body: dict[str, Any], ids: list[int], limits: Limits) -> Validated:
    """ApiError for a field that cannot be honoured with this model and engine; what says nothing is taken out."""
    _check_bias(body.get("logit_bias", {}), limits.chat.encoder.size)
    for name in ("n", "best_of"):
        body.pop(name, None)
    if wrong := answer_format.said_once(body, "structured_outputs" in limits.takes):
        raise ApiError(400, wrong, next(name for name in answer_format.FORMS if name in body))
    for name in limits.refuses:
        if body.pop(name, None):
            raise ApiError(400, f"{name} is not something that this engine can do", name)
    if body.get("top_k") == -1:
        # vLLM's word for all; 0 is everybody's
        body["top_k"] = 0
    if body.get("temperature", 1) < LEAST_TEMPERATURE:
        body["temperature"] = 0.0
    room = limits.positions - len(ids)
    wanted = body.pop("max_completion_tokens", None) or body.get("max_tokens")
    if room < 1 or (wanted or 1) > room:
        asks = f"{len(ids)} in the prompt" + (f" and {wanted} for the answer" if wanted else "")
        said = f"this model's context is {limits.positions} tokens, and the request asks for more: {asks}; shorten it"
        raise ApiError(400, said, "prompt" if "prompt" in body else "messages", "context_length_exceeded")
    body["max_tokens"] = wanted or min(room, Sampling().max_new_tokens)
    if body.get("min_tokens", 0) > body["max_tokens"]:
        raise ApiError(400, f"min_tokens is more than the {body['max_tokens']} of the answer", "min_tokens")
    return ids, body


def _check_bias(given: Mapping[str, float], pieces: int) -> None:
    """ApiError 400 unless its names are ids."""
    for index in given:
        if not (index.isascii() and index.isdigit() and len(index) < 10 and int(index) < pieces):
            said = f'logit_bias must be ids below {pieces} with a number each: {{"42": -5}}'
            raise ApiError(400, said, "logit_bias")
