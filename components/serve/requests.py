"""What a request may say, checked before an engine sees it: wrong ones get OpenAI's 4xx body, and the engine none.

Engines differ in what they do with a wrong one: transformers' server answers 500 to a message without a role, and says
nothing of a prompt that is longer than the model's positions. They differ in names too: top_k is transformers' only
inside a JSON text, repetition_penalty is llama.cpp's repeat_penalty, and a name that one does not know it refuses, or
takes and does nothing with. Here all have the same names (OpenAI's and vLLM's), each honoured or refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from zhllama.errors import InputError
from zhllama.inference.sampling import Sampling
from zhllama.tokenizer.chat import Chat, Message

LONGEST_BODY = 4 * 2**20
"""Bytes: some hundred times what a context of 4,096 tokens takes."""

KNOWN = (
    "model", "messages", "prompt", "stream", "stop", "logprobs", "top_logprobs", "logit_bias", "response_format",
    "best_of", "echo", "suffix",
)  # fmt: skip
"""Fields that some engine honours, beside the numbers below."""
HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options")
"""Fields of OpenAI's clients that change nothing in an answer; not every engine takes them, so none is passed on."""


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
    takes: tuple[str, ...] = ()
    """Fields that this engine alone has."""

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """ApiError 400 for a conversation that the model's chat template refuses."""
        try:
            return self.chat.ids(messages)
        except InputError as error:
            raise ApiError(400, str(error), "messages") from error

    def text_ids(self, body: Mapping[str, Any]) -> list[int]:
        """Of `prompt`, with BOS unless `add_special_tokens` is false; a special token in it is that token."""
        begin = [self.chat.encoder.bos] if body.get("add_special_tokens", True) else []
        return [*begin, *self.chat.encode(body["prompt"])]


def parse_json(content: bytes) -> dict[str, Any]:
    """The body as an object; ApiError 400 for anything else."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        # JSON has no NaN; Python's reader has
        body = json.loads(content, parse_constant=refuse)
        # a lone surrogate is no text that could be sent on
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a {type(body).__name__}; a JSON object is needed")
    return body


def chat(body: Mapping[str, Any], limits: Limits) -> Validated:
    """A request to /v1/chat/completions."""
    messages = checked_messages(body)
    return _asked({**body, "messages": messages}, limits.chat_ids(messages), limits)


def completion(body: Mapping[str, Any], limits: Limits) -> Validated:
    """A request to /v1/completions: the model reads the prompt as it is."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    if not isinstance(prompt, str):
        raise ApiError(400, "prompt must be one text", "prompt")
    body = {**body, "prompt": prompt}
    return _asked(body, limits.text_ids({"prompt": prompt}), limits)


def tokenized(body: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """The answer to /tokenize, which is vLLM's: {"tokens", "count", "max_model_len"} of `prompt` or of `messages`."""
    check_model(body, limits)
    if "messages" in body:
        ids = limits.chat_ids(checked_messages(body))
    elif isinstance(body.get("prompt"), str):
        ids = limits.text_ids(body)
    else:
        raise ApiError(400, "give prompt, a text, or messages", "prompt")
    return {"tokens": ids, "count": len(ids), "max_model_len": limits.positions}


def detokenized(body: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """The answer to /detokenize, which is vLLM's: {"prompt"} of `tokens`."""
    check_model(body, limits)
    tokens = body.get("tokens")
    if not isinstance(tokens, list) or not all(type(index) is int for index in tokens):
        raise ApiError(400, "tokens must be a list of ids", "tokens")
    try:
        return {"prompt": limits.chat.decode(tokens)}
    except InputError as error:
        raise ApiError(400, str(error), "tokens") from error


def checked_messages(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages, each {"role", "content"} with its text in one piece. ApiError 400 names the one that is wrong."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message", "messages")
    found: list[dict[str, str]] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{where} must be an object with role and content", "messages")
        role = "system" if message.get("role") == "developer" else message.get("role")
        if role not in ("system", "user", "assistant"):
            raise ApiError(400, f"{where}.role must be system, user or assistant, not {role!r}", "messages")
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
        said = f"the model {name!r} does not exist; this server has {limits.name!r}"
        raise ApiError(404, said, "model", "model_not_found")


_NUMBERS = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "max_tokens": (1, 10**9),
    "max_completion_tokens": (1, 10**9),
    "seed": (-(2**63), 2**63 - 1),
    "top_k": (-1, 10**9),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "min_tokens": (0, 10**9),
}
_WHOLE = ("max_tokens", "max_completion_tokens", "seed", "top_k", "min_tokens")
_OTHER_NAMES = {"repeat_penalty": "repetition_penalty"}
"""What an engine calls it → what it is called here."""


def _asked(body: dict[str, Any], ids: list[int], limits: Limits) -> Validated:
    """ApiError for a value out of range, or a field that cannot be honoured; what says nothing is taken out."""
    check_model(body, limits)
    for other, name in _OTHER_NAMES.items():
        if body.get(other) is not None and body.get(name) is not None:
            raise ApiError(400, f"{other} and {name} are one; give one of them", name)
    body = {
        _OTHER_NAMES.get(name, name): value
        for name, value in body.items() if value is not None and name not in HARMLESS
    }  # fmt: skip
    for name, (lowest, highest) in _NUMBERS.items():
        value = body.get(name)
        if value is None:
            continue
        whole = name in _WHOLE
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ApiError(400, f"{name} must be a {'whole ' if whole else ''}number", name)
        if not lowest <= value <= highest:
            raise ApiError(400, f"{name} is {value}; it must be between {lowest} and {highest}", name)
    if not isinstance(body.get("stream", False), bool):
        raise ApiError(400, "stream must be true or false", "stream")
    stop = body.get("stop", [])
    if not isinstance(stop, str) and not (isinstance(stop, list) and all(isinstance(one, str) for one in stop)):
        raise ApiError(400, "stop must be a text or a list of texts", "stop")
    if "" in (stop if isinstance(stop, list) else [stop]):
        raise ApiError(400, "stop must not be an empty text", "stop")
    _check_bias(body.get("logit_bias", {}), limits.chat.encoder.size)
    if body.pop("n", 1) != 1:
        raise ApiError(400, "n: this server gives one answer to a request", "n")
    for name in ("tools", "functions", "audio"):
        if body.pop(name, None):
            raise ApiError(400, f"{name}: this model answers with text alone", name)
    for name in ("tool_choice", "parallel_tool_calls", "function_call", "modalities"):
        body.pop(name, None)
    if body.get("response_format") == {"type": "text"}:
        del body["response_format"]
    for name in limits.refuses:
        if body.pop(name, None):
            raise ApiError(400, f"{name} is not something that this engine can do", name)
    for name in body:
        if name not in (*KNOWN, *_NUMBERS, *limits.takes):
            raise ApiError(400, f"{name} is nothing that this server knows; leave it out", name)
    if body.get("top_k") == -1:
        # vLLM's word for all; 0 is everybody's
        body["top_k"] = 0
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


def _check_bias(given: Any, pieces: int) -> None:
    """ApiError 400 unless it is {id as text: number}."""
    if isinstance(given, dict) and all(
        index.isascii() and index.isdigit() and int(index[:10]) < pieces
        and isinstance(bias, int | float) and not isinstance(bias, bool) and abs(bias) <= 10**6
        for index, bias in given.items()
    ):  # fmt: skip
        return
    raise ApiError(400, f'logit_bias must be ids below {pieces} with a number each: {{"42": -5}}', "logit_bias")
