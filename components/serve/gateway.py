"""The server that people reach: routes, keys, checks, metrics and the chat page, in front of an engine on loopback.

Engines differ in what they check, count and say when they fail, and none of those for a laptop checks a key.
Without a key the server listens on loopback alone, and then refuses requests that name another host, and those that a
page of another site makes a browser send: a page that is merely open must not talk to the model.
"""

import hmac
import ipaddress
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx2
import prometheus_client
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from components.serve import requests
from components.serve.engines import Engine
from components.serve.page import HEADERS, page_routes
from components.serve.requests import ApiError, Limits, Validated
from components.serve.stop import Cut
from zhllama.artifacts.json_file import value_of

log = logging.getLogger("serve")

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Metrics:
    """What Prometheus reads. Of requests it holds counts and times, never texts."""

    def __init__(self, name: str) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        counter: Any = partial(prometheus_client.Counter, registry=self.registry)
        gauge: Any = partial(prometheus_client.Gauge, registry=self.registry)
        histogram: Any = partial(prometheus_client.Histogram, registry=self.registry, buckets=SECONDS)
        self.requests = counter("zhllama_requests", "Requests answered, by path and status.", ("path", "status"))
        self.running = gauge("zhllama_requests_running", "Requests being answered.")
        self.seconds = histogram("zhllama_request_seconds", "From request to last byte.", ("path",))
        self.first = histogram("zhllama_first_token_seconds", "From request to first text of a stream.")
        self.prompt_tokens = counter("zhllama_prompt_tokens", "Tokens of prompts.")
        self.answer_tokens = counter("zhllama_answer_tokens", "Tokens of answers.")
        self.engine = gauge("zhllama_engine_up", "1 while the engine runs.", ("model",)).labels(name)


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
    ) -> None:
        """address: the engine's. api_key: empty for none, which is for loopback alone. host: where this listens."""
        self.limits = limits
        self.metrics = Metrics(limits.name)
        self._engine = engine
        self._alive = alive
        self._api_key = api_key
        self.needs_key = bool(api_key)
        self._names = {*LOOPBACK_NAMES, host} if is_loopback(host) else None
        self._started = int(time.time())
        # an answer may take as long as it takes; an engine that does not even accept is gone
        self._client = httpx2.AsyncClient(base_url=address, timeout=httpx2.Timeout(None, connect=10), trust_env=False)

    def app(self, page: bool = False) -> ASGIApp:
        """The whole server. `page`: with the chat page at /."""
        routes: list[Any] = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
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
        errors: Any = {ApiError: _as_json, Exception: self._fault, 404: _as_json, 405: _as_json}
        inner = Starlette(routes=routes, exception_handlers=errors)

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            async def with_policy(message: Message) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message).update(HEADERS)
                await send(message)

            refused = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
            if refused is None:
                await inner(scope, receive, with_policy if scope["type"] == "http" else send)
            elif scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await _as_json(None, refused)(scope, receive, with_policy)

        return guarded

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Who may ask: the key's holder; on loopback without a key, whoever is on this machine and no page of
        elsewhere."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self._names is not None and urlsplit(f"//{host}").hostname not in self._names:
            return ApiError(403, "this server answers to the names of this machine alone")
        if "origin" in headers and urlsplit(headers["origin"]).netloc != host:
            return ApiError(403, "this server does not answer to the pages of other sites")
        path = scope["path"]
        # /health and /metrics ask for no key: probes and Prometheus have none, and nothing that was asked is in them
        if self.needs_key and (path in ("/tokenize", "/detokenize") or path.startswith("/v1/")):
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not self.key_matches(key.strip()):
                return ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", None, "invalid_api_key")
        return None

    def key_matches(self, given: str) -> bool:
        """In a time that does not tell how much of it is right."""
        return hmac.compare_digest(given.encode(errors="surrogateescape"), self._api_key.encode())

    async def _health(self, request: Request) -> Response:
        status = "the engine has ended"
        if self._alive():
            try:
                answer = await self._client.get(self._engine.health, timeout=5)
                status = "ok" if answer.status_code == 200 else "the engine is not ready"
            except httpx2.HTTPError:
                status = "the engine does not answer"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def _metrics(self, request: Request) -> Response:
        self.metrics.engine.set(self._alive())
        text = prometheus_client.generate_latest(self.metrics.registry)
        if self._engine.metrics:
            try:
                text += (await self._client.get(self._engine.metrics, timeout=5)).content
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
        return JSONResponse(await run_in_threadpool(made, await _body(request), self.limits))

    async def _answer(self, request: Request, check: Callable[[Any, Limits], Validated]) -> Response:
        record = _Record(self.metrics, request.url.path)
        with record.of_failures():
            # a chat template of somebody else's may take seconds
            asked = await run_in_threadpool(check, await _body(request), self.limits)
            upstream = await self._send(request.url.path, asked, record)
            cut = Cut(asked[1].get("stop", ()) if self._engine.keeps_stop else ())
            if asked[1].get("stream"):
                return StreamingResponse(self._passed_on(upstream, record, cut), media_type="text/event-stream")
            try:
                value = value_of(await upstream.aread())
                cut.event(value)
                record.answer_tokens = int((value.get("usage") or {}).get("completion_tokens", 0))
            except (httpx2.HTTPError, ValueError, TypeError, AttributeError) as error:
                raise ApiError(502, "the engine broke off its answer") from error
            finally:
                await upstream.aclose()
        record.end(200)
        return JSONResponse(value)

    async def _send(self, path: str, asked: Validated, record: "_Record") -> httpx2.Response:
        """The engine's answer, its head read. ApiError when it has none, or refuses."""
        ids, body = asked
        record.prompt_tokens = len(ids)
        try:
            request = self._client.build_request("POST", path, json=self._engine.request(body))
            upstream = await self._client.send(request, stream=True)
        except httpx2.HTTPError as error:
            raise ApiError(503, "the engine does not answer") from error
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

    async def _passed_on(self, upstream: httpx2.Response, record: "_Record", cut: Cut) -> AsyncIterator[bytes]:
        async for event in self._events(upstream, record):
            cut.event(event)
            yield b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    async def _events(self, upstream: httpx2.Response, record: "_Record") -> AsyncIterator[dict[str, Any]]:
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
        if isinstance(error, ClientDisconnect):
            return Response(status_code=499)
        log.error("%s: %s: %s", request.url.path, type(error).__name__, error)
        return JSONResponse(ApiError(500, "a fault in this server; its log has it").body, 500)


class _Record:
    """One request, from its beginning to its end: a line in the log, and the metrics."""

    def __init__(self, metrics: Metrics, path: str) -> None:
        self._metrics = metrics
        self._path = path
        self.begin = time.monotonic()
        self.prompt_tokens = 0
        self.answer_tokens = 0
        metrics.running.inc()

    @contextmanager
    def of_failures(self) -> Iterator[None]:
        """Ends the record with what is raised inside."""
        try:
            yield
        except BaseException as error:
            self.end(error.status if isinstance(error, ApiError) else 499)
            raise

    def end(self, status: int) -> None:
        """499: the client went away."""
        seconds = time.monotonic() - self.begin
        self._metrics.running.dec()
        self._metrics.requests.labels(self._path, str(status)).inc()
        self._metrics.seconds.labels(self._path).observe(seconds)
        if status == 200:
            self._metrics.prompt_tokens.inc(self.prompt_tokens)
            self._metrics.answer_tokens.inc(self.answer_tokens)
        said = "%s %d: %d tokens asked, %d answered, %.2f s"
        log.info(said, self._path, status, self.prompt_tokens, self.answer_tokens, seconds)


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


async def _body(request: Request) -> dict[str, Any]:
    """The object that a request holds. ApiError for another type (which any page could send) and for one too long."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the request must be sent as Content-Type: application/json")
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > requests.LONGEST_BODY:
            raise ApiError(413, f"the body is longer than {requests.LONGEST_BODY:,} bytes")
    return requests.parse_json(bytes(content))
