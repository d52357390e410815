"""The server that people reach: routes, keys, checks, metrics and the chat page, in front of an engine on loopback.

Engines differ in what they check, count and say when they fail, and none of those for a laptop checks a key.
A request is refused by what its head says, before its body is read: by the key, or where there is none by the host
that it names and by the page that sent it. Only what OPEN and the page's PATHS name is answered without the key.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Set
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
import httpx2
import prometheus_client
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from components.serve import requests
from components.serve.engines import Engine
from components.serve.metrics import Metrics, Record
from components.serve.openapi import described
from components.serve.page import HEADERS, PATHS, page_routes
from components.serve.requests import ApiError, Limits, Validated
from components.serve.stop import Cut
from zhllama.artifacts.json_file import value_of
from zhllama.bounded_answers import bounded, uncompressed

log = logging.getLogger("serve")
Checked = TypeVar("Checked")
Given = TypeVar("Given")

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
OPEN = ("/health", "/metrics")
"""What asks for no key, beside the page's files: probes and Prometheus have none. It tells counts and times."""
ANSWER_SECONDS = 3600.0
"""Between two signs of an engine at a request; one that hangs as a whole is ended long before (engine_process.py)."""
HEALTH_SECONDS = 5.0
MOST_BODIES = 64 * 2**20
"""Bytes of bodies that are held at one time."""
CHECKED_AT_ONCE = 4


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gateway:
    """The application for one engine: `Gateway(...).app()` is ASGI."""

    def __init__(
        self,
        limits: Limits,
        engine: Engine,
        address: str,
        alive: Callable[[], bool],
        api_key: str = "",
        host: str = "127.0.0.1",
        socket: str | None = None,
    ) -> None:
        """address: the engine's; socket: its unix socket's path, where it listens on one. api_key: empty for none,
        which is for loopback alone. host: where this listens."""
        self.limits = limits
        self.metrics = Metrics(limits.name)
        self._engine = engine
        self._alive = alive
        self._api_key = api_key
        self.needs_key = bool(api_key)
        self._names = {*LOOPBACK_NAMES, host} if is_loopback(host) else None
        self._started = int(time.time())
        self._held = 0
        # how many there are, the connections of clients say; an engine that does not even accept is gone
        transport = httpx2.AsyncHTTPTransport(uds=socket, limits=httpx2.Limits(), trust_env=False)
        timeout = httpx2.Timeout(ANSWER_SECONDS, connect=10)
        bounds: Any = {"response": [bounded], "request": [uncompressed]}
        self._client = httpx2.AsyncClient(
            base_url=address, transport=transport, timeout=timeout, trust_env=False, event_hooks=bounds
        )
        # reading JSON and templates is Python's work: more at a time would only take memory
        self._checking = anyio.CapacityLimiter(CHECKED_AT_ONCE)

    def app(self, page: bool = False) -> ASGIApp:
        """The whole server. `page`: with the chat page at /."""
        routes: list[Any] = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._description),
            Route("/tokenize", partial(self._tokens, made=requests.tokenized), methods=["POST"]),
            Route("/detokenize", partial(self._tokens, made=requests.detokenized), methods=["POST"]),
            # a mount: what is not in it is this API's 404 or 405, and never the page's
            Mount(
                "/v1",
                routes=[
                    Route("/models", self._models),
                    Route("/models/{name}", self._models),
                    Route("/chat/completions", partial(self._answer, check=requests.chat), methods=["POST"]),
                    Route("/completions", partial(self._answer, check=requests.completion), methods=["POST"]),
                ],
            ),
        ]
        if page:
            routes += page_routes(self.limits, self.needs_key)
        errors: Any = {
            ApiError: _as_json,
            ClientDisconnect: _to_nobody,
            Exception: self._fault,
            404: _as_json,
            405: _as_json,
        }
        inner = Starlette(routes=routes, exception_handlers=errors)

        open_paths = {*OPEN, *(PATHS if page else ())}

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            async def with_policy(message: Message) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message).update(HEADERS)
                await send(message)

            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            elif scope["type"] != "http":
                raise NotImplementedError(f"{scope['type']} is not answered")
            elif refused := self._refusal(scope, open_paths):
                await _as_json(None, refused)(scope, receive, with_policy)
            else:
                await inner(scope, receive, with_policy)

        return guarded

    def _refusal(self, scope: Scope, open_paths: Set[str]) -> ApiError | None:
        """Who may ask: the key's holder; on loopback without a key, whoever is on this machine and no page of
        elsewhere."""
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in (b"host", b"origin", b"authorization", b"content-type") and name in headers:
                return ApiError(400, f"the header {name.decode()} is there twice")
            headers[name] = value
        host = headers.get(b"host", b"").decode("latin-1")
        if self._names is not None and _name_in(f"//{host}") not in self._names:
            return ApiError(403, "this server answers to the names of this machine alone")
        if b"origin" in headers and headers[b"origin"].decode("latin-1").partition("://")[2].lower() != host.lower():
            return ApiError(403, "this server does not answer to the pages of other sites")
        if self._api_key and not (scope["method"] in ("GET", "HEAD") and scope["path"] in open_paths):
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            # in a time that does not tell how much of it is right
            if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._api_key.encode()):
                return ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", None, "invalid_api_key")
        return None

    async def _health(self, request: Request) -> Response:
        status = "the engine has ended"
        if self._alive():
            try:
                answer = await self._client.get(self._engine.health, timeout=HEALTH_SECONDS)
                status = "ok" if answer.status_code == 200 else "the engine is not ready"
            except httpx2.HTTPError:
                status = "the engine does not answer"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def _metrics(self, request: Request) -> Response:
        self.metrics.engine.set(self._alive())
        text = prometheus_client.generate_latest(self.metrics.registry)
        if self._engine.metrics:
            try:
                text += (await self._client.get(self._engine.metrics, timeout=HEALTH_SECONDS)).content
            except httpx2.HTTPError as error:
                log.warning("the engine's metrics cannot be read: %s", error)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def _models(self, request: Request) -> Response:
        model = {
            "id": self.limits.name,
            "object": "model",
            "created": self._started,
            "owned_by": "zhllama",
            "max_model_len": self.limits.positions,
        }
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [model]})
        requests.check_model({"model": request.path_params["name"]}, self.limits)
        return JSONResponse(model)

    async def _tokens(self, request: Request, made: Callable[[Any, Limits], dict[str, Any]]) -> Response:
        return JSONResponse(await self._checked(request, made))

    async def _description(self, request: Request) -> Response:
        return JSONResponse(described(self.limits))

    async def _checked(self, request: Request, check: Callable[[Any, Limits], Checked]) -> Checked:
        """What a check makes of a request's body, in a thread: a chat template of somebody else's may take seconds.
        ApiError for a body that is too long, or of another type, which any page could send."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the request must be sent as Content-Type: application/json")
        too_long = ApiError(413, f"the body is longer than {requests.LONGEST_BODY:,} bytes")
        if int(request.headers.get("content-length", 0)) > requests.LONGEST_BODY:
            raise too_long
        content = bytearray()
        try:
            async for chunk in request.stream():
                content += chunk
                self._held += len(chunk)
                if len(content) > requests.LONGEST_BODY:
                    raise too_long
                if self._held > MOST_BODIES:
                    raise ApiError(503, "too many long requests at one time; try again")
            return await anyio.to_thread.run_sync(
                lambda: check(requests.parse_json(bytes(content)), self.limits), limiter=self._checking
            )
        finally:
            self._held -= len(content)

    async def _answer(self, request: Request, check: Callable[[Any, Limits], Validated]) -> Response:
        path, record = request.url.path, Record(self.metrics, request.url.path)
        with record.of_failures():
            asked = await self._checked(request, check)
            cut = Cut(asked[1].get("stop", ()) if self._engine.keeps_stop else ())
            if asked[1].get("stream"):
                upstream = await _unless_left(request, self._send(path, asked, record))
                return _Stream(self._passed_on(upstream, record, cut), upstream, record)
            value = await _unless_left(request, self._value(path, asked, record, cut))
        record.end(200)
        return JSONResponse(value)

    async def _value(self, path: str, asked: Validated, record: Record, cut: Cut) -> Any:
        upstream = await self._send(path, asked, record)
        try:
            value = value_of(await upstream.aread())
            cut.event(value)
            record.answer_tokens = int((value.get("usage") or {}).get("completion_tokens", 0))
        except (httpx2.HTTPError, ValueError, TypeError, AttributeError) as error:
            raise ApiError(502, "the engine broke off its answer") from error
        finally:
            await upstream.aclose()
        return value

    async def _send(self, path: str, asked: Validated, record: Record) -> httpx2.Response:
        """The engine's answer, its head read. ApiError when it has none, or refuses."""
        ids, body = asked
        record.prompt_tokens = len(ids)
        try:
            request = self._client.build_request("POST", path, json=self._engine.request(body))
            upstream = await self._client.send(request, stream=True)
        except httpx2.ConnectError as error:
            raise ApiError(503, "the engine does not answer") from error
        except httpx2.TimeoutException as error:
            raise ApiError(504, "the engine took too long") from error
        except httpx2.HTTPError as error:
            raise ApiError(502, "the engine ended before it answered") from error
        if upstream.status_code == 200:
            return upstream
        try:
            said = (await upstream.aread())[:2000].decode(errors="replace")
        except httpx2.HTTPError:
            said = ""
        finally:
            await upstream.aclose()
        log.warning("the engine answered %d: %s", upstream.status_code, said)
        if 400 <= upstream.status_code < 500:
            raise ApiError(400, f"the engine refused the request: {said}")
        raise ApiError(502, "the engine failed at this request")

    async def _passed_on(self, upstream: httpx2.Response, record: Record, cut: Cut) -> AsyncIterator[bytes]:
        async for event in self._events(upstream, record):
            cut.event(event)
            yield b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    async def _events(self, upstream: httpx2.Response, record: Record) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream; a failure becomes a last one, {"error": …}. Closing it stops the engine's work."""
        status, first = 499, True
        try:
            async for line in _lines(upstream):
                content = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or content == b"[DONE]":
                    continue
                event = value_of(content)
                if "error" in event:
                    raise ValueError(f"it said {event['error']}")
                if first:
                    self.metrics.first.observe(time.monotonic() - record.begin)
                    first = False
                if usage := event.get("usage"):
                    record.answer_tokens = int(usage.get("completion_tokens", 0))
                yield event
            status = 200
        except (httpx2.HTTPError, ValueError, TypeError, AttributeError) as error:
            status = 502
            log.warning("the engine broke off a stream: %s", error)
            yield ApiError(502, "the engine broke off its answer").body
        finally:
            await upstream.aclose()
            record.end(status)

    async def _fault(self, request: Request, error: Exception) -> Response:
        log.error("%r: %s: %s", request.url.path, type(error).__name__, error)
        return JSONResponse(ApiError(500, "a fault in this server; its log has it").body, 500)


class _Stream(StreamingResponse):
    """Events of an engine. What is open for it ends with it, though its client may have left before the first."""

    def __init__(self, events: AsyncIterator[bytes], upstream: httpx2.Response, record: Record) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._open = upstream, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        upstream, record = self._open
        try:
            await super().__call__(scope, receive, send)
        finally:
            record.end(499)
            await upstream.aclose()


async def _unless_left(request: Request, work: Coroutine[Any, Any, Given]) -> Given:
    """What the work gives. It is cancelled when the client leaves, and with it the engine's."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asking, leaving = asyncio.create_task(work), asyncio.create_task(left())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            raise ClientDisconnect
        return asking.result()
    finally:
        asking.cancel()
        leaving.cancel()
        await asyncio.wait(tasks)


def _to_nobody(request: Any, error: Any) -> Response:
    return Response(status_code=499)


def _as_json(request: Any, error: Any) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, ApiError) and error.status == 401 else None
    if not isinstance(error, ApiError):
        path, headers = request.url.path, error.headers
        if error.status_code == 405:
            error = ApiError(405, f"{path} answers to {headers['Allow']}, not to {request.method}")
        else:
            error = ApiError(404, f"there is no {path} here")
    return JSONResponse(error.body, error.status, headers)


async def _lines(upstream: httpx2.Response) -> AsyncIterator[bytes]:
    """The lines of an event stream. Only a line feed ends one: answers hold other separators (U+2028, say)."""
    rest = b""
    async for chunk in upstream.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def _name_in(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
