"""A deployed server, tried through its own API: it knows its model, encodes as in training, answers, asks for a key."""

import json
import logging
from collections.abc import Callable
from typing import Any

import httpx2

from components.serve.check import LINES, conversations
from zhllama.bounded_answers import whole
from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.api import short
from zhllama.retries import with_retries
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.vocabulary import Encoder

log = logging.getLogger("smoke")

REACHED_WITHIN = 120.0
"""Seconds in which a ready server must be reached: a Service's name may take a while to be known."""
ANSWER_SECONDS = 180.0


def try_out(
    address: str,
    name: str,
    api_key: str,
    encoder: Encoder,
    chat: Chat,
    context_length: int,
    there: Callable[[], bool] = lambda: True,
) -> list[dict[str, str]]:
    """What was asked and answered, as {"Input", "Output"}. `there`: whether it is worth another try to reach it.
    InputError when it is another model or tokenises otherwise, StorageFault when it does not answer as it should."""
    answered = []
    with _Tried(address, api_key) as tried:
        length = tried.served(name, there).get("max_model_len", context_length)
        if length < context_length:
            raise InputError(f"{address}: it answers up to {length} tokens, {context_length} were asked for")
        tried.check_key("/v1/models")
        for line in LINES:
            tried.encodes({"model": name, "prompt": line}, repr(line), [*encoder.begin, *encoder.encode(line)])
        for messages, ids in conversations(chat, address, "publish the model again"):
            line, asked = messages[-1]["content"], {"model": name, "messages": messages}
            tried.encodes({**asked, "add_generation_prompt": True}, f"the question {line!r}", ids)
            if len(messages) > 1:
                continue
            said = tried.answer("/v1/chat/completions", _said, {**asked, "max_tokens": 16, "temperature": 0})
            log.info("%s → %s", line, said)
            answered.append({"Input": line, "Output": said})
        # vLLM by itself asks for a key below /v1 alone
        tried.check_key("/tokenize")
    log.info("%s: serves %s, encodes as in training, answers, and asks for a key", address, name)
    return answered


def reach(address: str, name: str, api_key: str) -> None:
    """That the address leads to this model: the Service before the pods, say. As try_out."""
    with _Tried(address, api_key) as tried:
        tried.served(name)


class _Tried(httpx2.Client):
    """Requests with the key, and what is wrong with their answers in one line."""

    def __init__(self, address: str, api_key: str) -> None:
        super().__init__(base_url=address, timeout=ANSWER_SECONDS, trust_env=False)
        self._address = address
        self._key = {"Authorization": f"Bearer {api_key}", "Accept-Encoding": "identity"}

    def served(self, name: str, there: Callable[[], bool] = lambda: True) -> dict[str, Any]:
        """What the server says of the model: asked again until it is reached, for two minutes and as long as it is
        there."""
        served = with_retries(
            lambda: self.answer("/v1/models", lambda value: {model["id"]: model for model in value["data"]}),
            lambda error: isinstance(error, StorageFault), seconds=REACHED_WITHIN, goes_on=there,
        )  # fmt: skip
        if name not in served:
            raise InputError(
                f"{self._address}: it serves {', '.join(served) or 'nothing'}, not {name}; is it another server?"
            )
        return dict(served[name])

    def encodes(self, asked: dict[str, Any], what: str, wanted: list[int]) -> None:
        found = self.answer("/tokenize", lambda value: list(value["tokens"]), asked)
        if found != wanted:
            raise InputError(
                f"{self._address}: it encodes {what} as {found[:12]}…, training as {wanted[:12]}…; publish the model "
                "again (with tied scores, --scores zero, no served tokenizer can agree)"
            )

    def check_key(self, path: str) -> None:
        """InputError where the path is not refused to who gives no key."""
        where = f"{self._address}{path}"
        try:
            with self.stream("GET", path) as answer:
                refused = answer.status_code in (401, 403)
        except httpx2.HTTPError as error:
            raise StorageFault(f"{where}: {short(error)}") from error
        if not refused:
            raise InputError(f"{where}: it answers without an API key; check the secret of the API key")

    def answer(self, path: str, read: Callable[[Any], Any], asked: dict[str, Any] | None = None) -> Any:
        """What is read of the answer to a request, a GET where nothing is asked."""
        try:
            with self.stream("POST" if asked else "GET", path, json=asked, headers=self._key) as answer:
                if answer.status_code in (401, 403):
                    raise InputError(f"{self._address}{path}: it refuses the API key; is it the one in the secret?")
                return read(json.loads(whole(answer.raise_for_status(), ANSWER_SECONDS)))
        except (httpx2.HTTPError, ValueError, KeyError, TypeError, IndexError) as error:
            raise StorageFault(f"{self._address}{path}: {type(error).__name__}: {short(error)}") from error


def _said(value: Any) -> str:
    if not isinstance(said := value["choices"][0]["message"]["content"], str):
        raise ValueError("an answer without text")
    return said
