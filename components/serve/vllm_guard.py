"""Who may ask vLLM's own server what, on a cluster: the key comes before every path, not before /v1 alone.

vLLM's --api-key leaves /tokenize, /invocations, /pause and the rest open. It takes ASGI classes (--middleware), the
last of which is asked first, so this one stands before all. What only steers the server (/pause, /sleep, …) is answered
to nobody. Tried instead, on paper: our gateway beside it, a second server whose list of fields is not vLLM's.
`components.serve.check`, which runs before vLLM in its pod, puts this file where vLLM finds it: it needs Python alone.
"""

import hmac
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

KEY_FILE = "/etc/zhllama-api-key/API_KEY"
OPEN = ("/health", "/metrics", "/metrics/")
"""What asks for no key: probes and Prometheus have none."""
BELOW = ("/v1/", "/v2/", "/cohere/")
STEERING = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
SERVED = (
    "/tokenize", "/detokenize", "/version", "/ping", "/load", "/invocations", "/score", "/rerank", "/classify",
    "/pooling", "/generative_scoring", "/inference/v1/generate",
)  # fmt: skip
"""What is there for the key's holder, beside what is below BELOW and not STEERING."""


class Guard:
    """`vllm serve --middleware`. RuntimeError where there is no key: the server then does not start."""

    def __init__(self, app: Callable[..., Awaitable[None]], key_file: str = KEY_FILE) -> None:
        self._app = app
        self._key = Path(key_file).read_bytes().strip()
        if not self._key:
            raise RuntimeError(f"{key_file} is empty: there is no API key to ask for")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status = self._refusal(scope) if scope["type"] in ("http", "websocket") else 0
        if not status:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            said = (
                "a valid API key is needed: Authorization: Bearer KEY"
                if status == 401
                else "there is no such path here"
            )
            error = {"message": said, "type": "invalid_request_error", "param": None, "code": None}
            body = json.dumps({"error": error}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Any) -> int:
        path, method = scope["path"], scope.get("method", "")
        if path in OPEN and method in ("GET", "HEAD"):
            return 0
        there = path in SERVED or (path.startswith(BELOW) and path.rstrip("/") not in STEERING)
        if there and method == "OPTIONS":
            # a browser's question, which carries no key: vLLM says which pages may ask, and nothing else
            return 0
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # in a time that does not tell how much of it is right
        if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            return 401
        return 0 if there else 404
