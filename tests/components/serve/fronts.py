"""A gateway that listens, in front of an engine of the tests' own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from components.serve.engines import Engine
from components.serve.gateway import Gateway
from components.serve.local import listening, running
from components.serve.requests import Limits
from tests.fake_engine import FakeEngine
from zhllama.tokenizer.chat import Chat


@contextmanager
def listening_front(
    engine: FakeEngine, api_key: str = "", positions: int = 256, page: bool = False, **more: Any
) -> Iterator[httpx2.Client]:
    made = Engine("fake", Path(), [], "/health", metrics="/metrics", refuses=("logprobs",))
    gateway = Gateway(
        Limits("zhllama", Chat(engine.encoder), positions, made.refuses),
        made,
        engine.address,
        lambda: True,
        api_key,
        **more,
    )
    with (
        listening("127.0.0.1", 0) as listener,
        running(gateway.app(page), listener),
        httpx2.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client,
    ):
        yield client
