"""What the gateway costs a request: the same questions to an engine, straight and through it.

The engine is one of the tests' own that answers at once, in a process of its own, so that what is measured is the way
there and back: checks, counts and a second connection.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import httpx2

from tests.bench.measure import Table

REQUESTS = 300
PATH = "/v1/chat/completions"
_PROGRAM = """
import sys, threading
from pathlib import Path
import uvicorn
from components.serve.engines import Engine
from components.serve.gateway import Gateway
from components.serve.local import listening
from components.serve.requests import Limits
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from tests.fake_engine import FakeEngine

what, tokenizer, address = sys.argv[1:]
encoder = SentencePieceEncoder(Path(tokenizer).read_bytes())
if what == "engine":
    with FakeEngine(encoder) as engine:
        engine.pieces = ["好"] * 100
        print(engine.address, flush=True)
        sys.stdin.read()
else:
    engine = Engine("fake", Path(), [], "/health")
    gateway = Gateway(Limits("zhllama", encoder, 2048), engine, address, lambda: True)
    with listening("127.0.0.1", 0) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(gateway.app(), log_level="error", access_log=False)).run([listener])
"""


@contextmanager
def _program(what: str, tokenizer: Path, address: str = "") -> Iterator[str]:
    command = [sys.executable, "-c", _PROGRAM, what, str(tokenizer), address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        try:
            yield program.stdout.readline().strip()
        finally:
            program.kill()


def _seconds(client: httpx2.Client, body: dict[str, Any]) -> float:
    begin = perf_counter()
    with client.stream("POST", PATH, json=body) as answer:
        content = answer.read()
    assert answer.status_code == 200, content
    return perf_counter() - begin


def run(scratch: Path) -> list[Table]:
    from components.train_tokenizer.sentencepiece_trainer import trained

    tokenizer = scratch / "tokenizer.model"
    chars = [f"{chr(0x4E00 + number)}{chr(0x4E00 + (number * 7) % 500)}" for number in range(500)] * 4
    tokenizer.write_bytes(trained(chars, 800, 0.9995, "bench"))
    question = "".join(chars[:100])
    table = Table(
        f"A request through the gateway and straight to the engine (median of {REQUESTS}, ms)",
        ("request", "straight", "through the gateway", "added"),
        note="The bar: what a token of a 7B model takes on a fast GPU (10 ms) is more than the gateway adds.",
    )
    with (
        _program("engine", tokenizer) as engine,
        _program("gateway", tokenizer, engine) as gateway,
        httpx2.Client(base_url=engine) as straight,
        httpx2.Client(base_url=gateway) as through,
    ):
        for name, more in (("one answer", {}), ("a stream of 101 events", {"stream": True})):
            body = {"model": "zhllama", "messages": [{"role": "user", "content": question}], **more}
            # in turns, so that a machine whose speed drifts favours nobody
            pairs = [(_seconds(straight, body), _seconds(through, body)) for _ in range(REQUESTS)]
            one, other = (median(pair[side] for pair in pairs[10:]) * 1000 for side in (0, 1))
            table.rows.append((name, f"{one:.2f}", f"{other:.2f}", f"{other - one:.2f}"))
    return [table]
