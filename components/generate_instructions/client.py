"""One request to the server and what came of it; whether to ask again is for others to decide.

Answers are streamed, so that what came before a connection broke, which was paid for, is kept. Which of the optional
fields (JSON schema, temperature, stream, …) a server takes is found out without paying twice: the first request goes
alone, and a server that refuses it with 400 or 422, which is never billed, is asked again without the field.
"""

import asyncio
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

from components.generate_instructions.catalogue import SCHEMA, Request
from components.generate_instructions.harvest import CUT_OFF, objects_in
from components.generate_instructions.limits import retry_after
from components.generate_instructions.options import GenerateInstructions
from components.generate_instructions.server_errors import ServerError, error_in
from zhllama.artifacts.json_file import value_of
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
        plainer = {"schema": "json", "json": "none"}.get(self.structure)
        return replace(self, structure=plainer) if plainer else None


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
    """What may pass."""

    reason: str
    may_be_billed: bool
    wait: float | None = None
    """Seconds that the server asks for."""
    throttled: bool = False
    """Too many requests, which says nothing against the server or the request."""
    said: str = ""
    """The server's words."""

    def __str__(self) -> str:
        return self.reason + (f" ({self.said})" if self.said else "")


class UnexpectedResponse(Exception):
    """200, but not what a chat completions API says."""


class Api:
    """The server at one address; `client` is to be closed."""

    def __init__(self, config: GenerateInstructions) -> None:
        import openai

        from zhllama.bounded_answers import bounded, uncompressed

        self.config, self.where = config, f"generate_instructions: {config.base_url}"
        if file := config.api_key_file:
            try:
                key = Path(file).read_text("utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"--api-key-file {file}: cannot be read ({error}); mount the secret there") from error
            if not key or not key.isprintable() or not key.isascii():
                raise InputError(f"--api-key-file {file}: holds no key; it must be one line of text")
            # the values of this process's environment are what no log shows
            os.environ["OPENAI_API_KEY"] = key
        self.client = openai.AsyncOpenAI(
            base_url=config.base_url,
            # servers of one's own want no key, but the client insists on one
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=openai.Timeout(config.timeout, connect=min(config.timeout, 20.0)),
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(
                event_hooks={"request": [uncompressed], "response": [bounded]},
                timeout=openai.Timeout(config.timeout, connect=min(config.timeout, 20.0)),
            ),
        )

    def body(self, request: Request, dialect: Dialect, stream: bool) -> dict[str, Any]:
        """The request as the chat completions API wants it."""
        body = {"model": self.config.model, "messages": request.messages, dialect.limit: self.config.answer_tokens}
        forms = {"schema": {"type": "json_schema", "json_schema": SCHEMA}, "json": {"type": "json_object"}}
        body |= {"temperature": self.config.temperature} if dialect.temperature else {}
        body |= {"response_format": forms[dialect.structure]} if dialect.structure in forms else {}
        return body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})

    async def ask(self, request: Request, dialect: Dialect) -> Answer:
        """One answer. Raises Refused, Failed, UnexpectedResponse, or InputError for what ends the run (key, model)."""
        import openai

        create = self.client.chat.completions.with_streaming_response.create
        body, answer = self.body(request, dialect, dialect.stream), _Answer()
        headers: Mapping[str, str] = {}
        try:
            async with asyncio.timeout(self.config.timeout), create(**body) as response:
                headers = response.headers
                if headers.get("content-type", "").startswith("text/event-stream"):
                    async for chunk in await response.parse():
                        if isinstance(chunk, openai.BaseModel):
                            answer.add(chunk.model_dump(exclude_unset=True, warnings=False))
                    return answer.whole()
                read = bytearray()
                async for piece in response.iter_bytes():
                    read += piece
                    if len(read) > LONGEST_ANSWER:
                        raise UnexpectedResponse("an answer without end")
                return completed(value_of(bytes(read)))
        except Exception as error:
            failure = self.told_apart(error, headers)
            if isinstance(failure, Failed) and (failure.may_be_billed or answer.begun):
                return answer.rest(failure)
            raise failure from error

    def told_apart(self, error: Exception, headers: Mapping[str, str] = MappingProxyType({})) -> Exception:
        """What an exception of the client means: one of ours, or itself where it means nothing known. `headers`: of the
        answer in which it came."""
        import httpx2
        import openai

        from zhllama.bounded_answers import AnswerWithoutEnd

        for one in (error, error.__cause__):
            if isinstance(one, AnswerWithoutEnd):
                return UnexpectedResponse(str(one))
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
            kind, said = f"{error.code} {error.type}", whole_text(str(error.message)[:300])
            return self._status(error.status_code, said, kind, retry_after(error.response.headers))
        if isinstance(error, openai.APIError) and (inner := error_in({"error": error.body})) and inner.status:
            error = inner
        if isinstance(error, ServerError):
            wait = retry_after(headers) if error.wait is None else error.wait
            failure = self._status(error.status or 400, whole_text(error.said), error.kind, wait)
            return replace(failure, said=whole_text(error.said)) if isinstance(failure, Failed) else failure
        if isinstance(error, openai.APIError):
            said = error.body if isinstance(error.body, str) else error.message
            return Failed(f"an error in the stream: {str(said)[:80]}", may_be_billed=True)
        if isinstance(error, openai.OpenAIError | ValueError | AttributeError | TypeError | KeyError | RecursionError):
            return UnexpectedResponse(str(error))
        return error

    def _status(self, code: int, said: str, kind: str, wait: float | None) -> Exception:
        where = self.where
        if code in (401, 403):
            return InputError(
                f"{where} refuses the key ({code}); set OPENAI_API_KEY, or the file of --api-key-file, to one that may "
                f"use {self.config.model}"
            )
        if code == 402 or (code == 429 and "insufficient_quota" in f"{kind} {said}"):
            return InputError(f"{where}: the account has no credit left ({code}: {said}); top it up and run this again")
        if code == 404:
            return InputError(f"{where}: not found (404: {said}); check --model and --base-url")
        if code in (408, 409, 425, 429) or code >= 500:
            return Failed(f"status {code}", False, wait, throttled=code == 429)
        return Refused(f"{code}: {said}")


def completed(value: Any) -> Answer:
    """A completion in one JSON body. ServerError for an error in its place, and what reading another shape raises."""
    if error := error_in(value):
        raise error
    (choice,), answer = value["choices"][:1], _Answer()
    ended = choice.get("finish_reason") or "stop"
    answer.add({**value, "choices": [{"delta": dict(choice["message"]), "finish_reason": ended}]})
    return answer.whole()


class _Answer:
    """An answer as it comes."""

    def __init__(self) -> None:
        self._content = StringIO()
        self._finish = self._model = ""
        self._usage: Any = None
        self._seen = False

    def add(self, chunk: Mapping[str, Any]) -> None:
        """A chunk of a stream; also chunks that lack what they should have, since proxies send such."""
        if error := error_in(chunk):
            raise error
        self._seen = True
        self._usage = chunk.get("usage") or self._usage
        self._model = str(chunk.get("model") or self._model)
        for choice in (chunk.get("choices") or [])[:1]:
            said = choice.get("delta")
            text = said.get("content") or said.get("refusal") if isinstance(said, Mapping) else ""
            self._content.write(_text_of(text))
            self._finish = choice.get("finish_reason") or self._finish
        if self._content.tell() > LONGEST_ANSWER:
            raise UnexpectedResponse("an answer without end")

    def whole(self) -> Answer:
        """Failed or UnexpectedResponse when it is not."""
        if not self._seen:
            raise UnexpectedResponse("a stream without an event")
        if not self._finish:
            # a stream that just stops was cut, whatever closed it
            return self.rest(Failed("the stream broke off", may_be_billed=True))
        content = whole_text(self._content.getvalue())
        counted = self._usage if isinstance(self._usage, Mapping) else {}
        prompt, answer = counted.get("prompt_tokens"), counted.get("completion_tokens")
        # a text that was made of no tokens: the server does not count
        if type(prompt) is not int or type(answer) is not int or prompt <= 0 or answer < 0 or (content and not answer):
            prompt = answer = None
        return Answer(content, self._finish, prompt, answer, self._model)

    @property
    def begun(self) -> bool:
        """Whether some of the text came."""
        return self._content.tell() > 0

    def rest(self, failure: Failed) -> Answer:
        """What came before it broke, when that holds an object that is whole; else it fails."""
        content = whole_text(self._content.getvalue())
        if all(value is CUT_OFF for value in objects_in(content)):
            raise replace(failure, may_be_billed=True)
        log.info("an answer broke (%s): its whole items are kept", failure)
        return Answer(content, "broken", None, None, self._model)


def _text_of(content: Any) -> str:
    """A text, or those of a list of parts; parts of another type (thinking, images) are no answer."""
    if isinstance(content, list):
        return "".join(map(_text_of, content))
    if isinstance(content, Mapping):
        known = content.get("type", "text") in ("text", "output_text", "refusal")
        return _text_of(content.get("text") or content.get("value") or content.get("refusal")) if known else ""
    return content if isinstance(content, str) else ""


def whole_text(text: str) -> str:
    """The text with the two halves of a character put together, as JSON may send them, and � for a half alone."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
