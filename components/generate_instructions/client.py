"""One request to the server and what came of it; whether to ask again is for others to decide.

Answers are streamed, so that a proxy does not take a slow one for a dead one, and so that what came before a connection
broke, which was paid for, is kept; one JSON body in place of a stream is read as well. Which of the optional fields
(JSON schema, temperature, stream, max_tokens or max_completion_tokens) a server takes is found out without paying
twice: the first request goes alone, a server refuses with 400 or 422, which is never billed, a field that it does not
know, and is asked again without it. The answer that comes is used, and what was learnt is kept in the journal.
"""

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from components.generate_instructions.catalogue import SCHEMA, Request
from components.generate_instructions.limits import retry_after
from components.generate_instructions.options import GenerateInstructions
from components.generate_instructions.parse import CUT_OFF, objects_in
from zhllama.errors import InputError

log = logging.getLogger("generate_instructions")

LONGEST_ANSWER = 4 * 2**20
"""Characters; a server that sends more than that is not answering."""


@dataclass(frozen=True)
class Dialect:
    """What the server understands. structure: "schema", "json" or "none"; limit: the field that bounds an answer."""

    structure: str = "schema"
    limit: str = "max_tokens"
    temperature: bool = True
    stream: bool = True

    def weaker(self, complaint: str) -> "Dialect | None":
        """What to try after a refusal with this text; None when there is nothing left to leave out."""
        complaint = complaint.lower()
        if "max_completion_tokens" in complaint and self.limit == "max_tokens":
            return replace(self, limit="max_completion_tokens")
        if "temperature" in complaint and self.temperature:
            return replace(self, temperature=False)
        if "stream" in complaint and self.stream:
            return replace(self, stream=False)
        steps = {"schema": "json", "json": "none"}
        return replace(self, structure=steps[self.structure]) if self.structure in steps else None


@dataclass(frozen=True)
class Answer:
    """What the model wrote, how it ended, and the tokens that the server counted (None: it did not say)."""

    content: str
    finish: str
    prompt_tokens: int | None
    answer_tokens: int | None
    model: str


class Refused(Exception):
    """The server does not take this request (400, 413, 422, …): nothing is billed, and waiting mends nothing."""


@dataclass
class Failed(Exception):
    """What may pass. wait: seconds that the server asks for. may_be_billed: it may have worked on it all the same.

    throttled: too many requests, which says nothing against the server or the request.
    """

    reason: str
    may_be_billed: bool
    wait: float | None = None
    throttled: bool = False


class UnexpectedResponse(Exception):
    """200, but not what a chat completions API says."""


def key_of(file: str) -> str:
    """The API key: of the mounted file, else of OPENAI_API_KEY, else "none" (servers of one's own want no key, but the
    client insists on one). A key from a file is put into the environment of this process, whose values no log shows.
    """
    if file:
        try:
            key = Path(file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--api-key-file {file}: cannot be read ({error}); mount the secret there") from error
        if not key or not key.isprintable() or not key.isascii():
            raise InputError(f"--api-key-file {file}: holds no key; it must be one line of text")
        os.environ["OPENAI_API_KEY"] = key
    return os.environ.get("OPENAI_API_KEY") or "none"


class Api:
    """The server at one address; `client` is to be closed."""

    def __init__(self, config: GenerateInstructions) -> None:
        import openai

        self.config = config
        self.client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=key_of(config.api_key_file),
            timeout=openai.Timeout(config.timeout, connect=min(config.timeout, 20.0)),
            max_retries=0,
        )

    def body(self, request: Request, dialect: Dialect, stream: bool) -> dict[str, Any]:
        """The request as the chat completions API wants it."""
        config = self.config
        body: dict[str, Any] = {"model": config.model, "messages": request.messages}
        body[dialect.limit] = config.answer_tokens
        if dialect.temperature:
            body["temperature"] = config.temperature
        if dialect.structure == "schema":
            body["response_format"] = {"type": "json_schema", "json_schema": SCHEMA}
        elif dialect.structure == "json":
            body["response_format"] = {"type": "json_object"}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    async def ask(self, request: Request, dialect: Dialect) -> Answer:
        """One answer. Raises Refused, Failed, UnexpectedResponse, or InputError for what ends the run (key, model)."""
        create = self.client.chat.completions.with_streaming_response.create
        body, parts = self.body(request, dialect, dialect.stream), _Parts()
        try:
            async with asyncio.timeout(self.config.timeout), create(**body) as response:
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    async for chunk in await response.parse():
                        parts.add(chunk)
                    return parts.answer()
                read = bytearray()
                async for piece in response.iter_bytes():
                    read += piece
                    if len(read) > LONGEST_ANSWER:
                        raise UnexpectedResponse("an answer without end")
                return completed(json.loads(read))
        except Exception as error:
            failure = self.told_apart(error)
            if isinstance(failure, Failed) and failure.may_be_billed:
                return parts.rest_of(failure.reason)
            raise failure from error

    def told_apart(self, error: Exception) -> Exception:
        """What an exception of the client means: one of ours, or itself where it means nothing known."""
        import httpx2
        import openai

        if isinstance(error, TimeoutError):
            return Failed(f"no answer within {self.config.timeout:g} s", may_be_billed=True)
        if isinstance(error, openai.APIConnectionError):
            # a connection that was never made has cost nothing
            unmade = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")
            reason = "no connection" if unmade else "connection lost"
            return Failed("time-out" if isinstance(error, openai.APITimeoutError) else reason, may_be_billed=not unmade)
        if isinstance(error, httpx2.HTTPError):
            # in the middle of a body that is read as bytes
            return Failed("connection lost", may_be_billed=True)
        if isinstance(error, openai.APIStatusError):
            return self._status(error)
        if isinstance(error, openai.APIError):
            return Failed(f"an error in the stream: {str(error.message)[:80]}", may_be_billed=True)
        if isinstance(error, openai.OpenAIError | ValueError | AttributeError | TypeError | KeyError):
            return UnexpectedResponse(str(error))
        return error

    def _status(self, error: Any) -> Exception:
        where = f"generate_instructions: {self.config.base_url}"
        code, said = error.status_code, whole_text(str(error.message)[:300])
        if code in (401, 403):
            return InputError(
                f"{where} refuses the key ({code}); set OPENAI_API_KEY, or the file of --api-key-file, to one that may "
                f"use {self.config.model}"
            )
        if code == 402 or (code == 429 and "insufficient_quota" in f"{error.code} {error.type} {said}"):
            return InputError(f"{where}: the account has no credit left ({code}: {said}); top it up and run this again")
        if code == 404:
            return InputError(f"{where}: not found (404: {said}); check --model and --base-url")
        if code in (408, 409, 425, 429) or code >= 500:
            return Failed(f"status {code}", False, retry_after(error.response.headers), throttled=code == 429)
        return Refused(f"{code}: {said}")


def completed(value: Any) -> Answer:
    """A completion in one JSON body. Raises what reading another shape raises."""
    (choice,) = value["choices"][:1]
    said = choice["message"].get("content") or choice["message"].get("refusal")
    content = whole_text(said[:LONGEST_ANSWER]) if isinstance(said, str) else ""
    usage = usage_of(value.get("usage"), content)
    return Answer(content, choice.get("finish_reason") or "stop", *usage, str(value.get("model") or ""))


class _Parts:
    """A streamed answer as it comes."""

    def __init__(self) -> None:
        self._content = StringIO()
        self._finish = ""
        self._usage: Any = None
        self._model = ""
        self._seen = False

    def add(self, chunk: Any) -> None:
        """A chunk of a stream; also chunks that lack what they should have, since proxies send such."""
        self._seen = True
        self._usage = getattr(chunk, "usage", None) or self._usage
        self._model = getattr(chunk, "model", None) or self._model
        for choice in (getattr(chunk, "choices", None) or [])[:1]:
            said = getattr(choice, "delta", None)
            text = getattr(said, "content", None) or getattr(said, "refusal", None) or ""
            self._content.write(text if isinstance(text, str) else "")
            self._finish = choice.finish_reason or self._finish
        if self._content.tell() > LONGEST_ANSWER:
            raise UnexpectedResponse("an answer without end")

    def answer(self) -> Answer:
        if not self._seen:
            raise UnexpectedResponse("a stream without an event")
        if not self._finish:
            # a stream that just stops was cut, whatever closed it
            return self.rest_of("the stream broke off")
        content = whole_text(self._content.getvalue())
        return Answer(content, self._finish, *usage_of(self._usage, content), self._model)

    def rest_of(self, reason: str) -> Answer:
        """What came before it broke, when that holds an object that is whole; else Failed."""
        content = whole_text(self._content.getvalue())
        if all(value is CUT_OFF for value in objects_in(content)):
            raise Failed(reason, may_be_billed=True)
        log.info("an answer broke (%s): its whole items are kept", reason)
        return Answer(content, "broken", None, None, self._model)


def whole_text(text: str) -> str:
    """The text with the two halves of a character put together, as JSON may send them, and � for a half alone, which no
    file could hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def usage_of(usage: Any, content: str) -> tuple[int | None, int | None]:
    """The tokens that a server counted, for prompt and answer; (None, None) for counts that cannot be."""
    if not isinstance(usage, Mapping):
        usage = {name: getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
    prompt, answer = usage.get("prompt_tokens"), usage.get("completion_tokens")
    # a text that was made of no tokens: the server does not count
    if type(prompt) is not int or type(answer) is not int or prompt <= 0 or answer < 0 or (content and not answer):
        return None, None
    return prompt, answer
