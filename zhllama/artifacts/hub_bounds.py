"""Bounds on what the Hub, or a mirror of it (HF_ENDPOINT), answers: huggingface_hub reads an answer whole.

What its API says is bounded as a provider's answer is (zhllama.bounded_answers), an answer to a range by the range: a
server that knows no ranges would send a whole model into memory. Files that it writes to disk as they come are not.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

LONGEST = 32 * 2**20
"""Bytes of what the API says: a repository's files, each with its size and digest."""
BESIDE = 2**20
"""Bytes more than a range has: of an error's body."""
_MOST = "zhllama_most"


@lru_cache(maxsize=1)
def bound_hub() -> None:
    """For all that huggingface_hub asks in this process, from now on. A ConnectionError when more bytes come."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import httpx
    from huggingface_hub.utils._http import default_client_factory

    class Bounded(httpx.SyncByteStream):
        def __init__(self, stream: Any, most: int) -> None:
            self._stream, self._most = stream, most

        def __iter__(self) -> Iterator[bytes]:
            whole = 0
            for chunk in self._stream:
                whole += len(chunk)
                if whole > self._most:
                    raise ConnectionError(f"an answer has more than {self._most:,} bytes")
                yield chunk

        def close(self) -> None:
            self._stream.close()

    def asked(request: Any) -> None:
        # what compressed bytes become is not known before
        request.headers["Accept-Encoding"] = "identity"
        # kept when an answer leads elsewhere
        request.extensions.setdefault(_MOST, _most(request.url.path, request.headers.get("Range", "")))

    def answered(response: Any) -> None:
        most = response.request.extensions[_MOST] or (LONGEST if response.status_code >= 400 else None)
        if most is None:
            return
        if (encoding := response.headers.get("content-encoding", "identity").lower()) != "identity":
            raise ConnectionError(f"an answer is compressed ({encoding}), which it was not asked to be")
        response.stream = Bounded(response.stream, most)

    def client() -> Any:
        made = default_client_factory()
        hooks = made.event_hooks
        made.event_hooks = {"request": [*hooks["request"], asked], "response": [*hooks["response"], answered]}
        return made

    set_client_factory(client)


def _most(path: str, span: str) -> int | None:
    if found := re.fullmatch(r"bytes=(\d+)-(\d+)", span):
        return int(found[2]) - int(found[1]) + 1 + BESIDE
    return LONGEST if "/api/" in path else None
