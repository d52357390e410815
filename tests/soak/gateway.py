"""The gateway under mixed load: clients that ask, stream, read slowly, send half, die, and flood, and an engine that
breaks off, stalls and refuses.

`SOAK_SECONDS=600` says how long. Each client draws what it does from a seed. What must hold: every whole request is
answered, and within its time; no request is counted that nobody waits for; memory is flat from the second quarter to
the last; no error stands in the log.
"""

import gc
import json
import logging
import os
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2

from components.serve import connections
from components.serve.engines import Engine
from components.serve.gateway import Gateway
from components.serve.local import listening, running
from components.serve.requests import Limits
from tests.fake_engine import FakeEngine
from tests.fuzz.gateway import Errors
from tests.texts import chinese_sentences, llama_shaped
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder

CHAT = "/v1/chat/completions"
CLIENTS = 16
GROWTH = 40 * 2**20
"""Bytes that memory may grow by after the second quarter: the allocator's own coming and going."""


def run(seeds: range, scratch: Path) -> dict[str, Any]:
    seconds = float(os.environ.get("SOAK_SECONDS", "600"))
    encoder = SentencePieceEncoder(llama_shaped(islice(chinese_sentences(), 3000), 800))
    made = Engine("fake", Path(), [], "/health")
    errors = Errors()
    logging.getLogger().addHandler(errors)
    # the times of clients that do nothing, so that many pass
    for name in ("HEADER", "BODY", "LINGER", "STALLED"):
        setattr(connections, f"{name}_SECONDS", 1.0)
    with FakeEngine(encoder) as engine:
        engine.faults[CHAT] = lambda handler: _misbehave(engine, handler)
        gateway = Gateway(Limits("zhllama", Chat(encoder), 256), made, engine.address, lambda: True)
        with listening("127.0.0.1", 0) as listener, running(gateway.app(), listener):
            address = ("127.0.0.1", listener.getsockname()[1])
            found: Counter[str] = Counter()
            end = time.monotonic() + seconds
            threads = [
                threading.Thread(target=_client, args=(seeds.start + number, address, end, found), daemon=True)
                for number in range(CLIENTS)
            ]
            for thread in threads:
                thread.start()
            memory = _watched(end, engine)
            for thread in threads:
                thread.join(120)
            assert not any(thread.is_alive() for thread in threads), "a client waits for ever"
            _at_rest(address)
    logging.getLogger().removeHandler(errors)
    # the first one fills pools and caches
    quarter = max(1, len(memory) // 4)
    peaks = [max(memory[begin : begin + quarter]) for begin in range(0, len(memory), quarter)][:4]
    first, last = peaks[1 % len(peaks)], peaks[-1]
    said = {**dict(sorted(found.items())), "MiB, by quarters": [peak >> 20 for peak in peaks]}
    wrong = [name for name in found if name.startswith("WRONG")]
    if wrong or errors.said or last - first > GROWTH:
        sys.exit("\n".join(["the gateway did not hold:", str(said), *errors.said[:20]]))
    return said


def _misbehave(engine: FakeEngine, handler: Any) -> None:
    """The engine's part, by chance: most answers are right."""
    _, body = engine.seen[-1]
    what = random.random()
    if what < 0.03:
        handler.json(500, {"detail": "no"})
    elif what < 0.06:
        handler.connection.shutdown(socket.SHUT_RDWR)
    elif body.get("stream"):
        with suppress(OSError):
            handler.stream([handler.chunk("好" * 100)] * random.randrange(1, 300), whole=what > 0.1)
    else:
        choice = {"index": 0, "message": {"role": "assistant", "content": "好"}}
        handler.json(200, {"choices": [choice], "usage": {"completion_tokens": 1}})


def _client(seed: int, address: tuple[str, int], end: float, found: Counter[str]) -> None:
    chance = random.Random(seed)
    kinds = (_asks, _asks, _streams, _wrong, _half, _dies, _reads_slowly, _floods)
    while time.monotonic() < end:
        kind = chance.choice(kinds)
        try:
            found[f"{kind.__name__[1:]}: {kind(chance, address)}"] += 1
        except (AssertionError, TimeoutError) as error:
            found[f"WRONG {kind.__name__[1:]}: {type(error).__name__} {error}"[:200]] += 1
        except (OSError, HTTPException) as error:
            found[f"{kind.__name__[1:]}: {type(error).__name__}"] += 1


def _content(chance: random.Random, **more: Any) -> bytes:
    messages = [{"role": "user", "content": "好" * chance.randrange(1, 30)}]
    return json.dumps({"model": "zhllama", "messages": messages, **more}).encode()


def _head(address: tuple[str, int], length: int) -> bytes:
    lines = f"Host: 127.0.0.1:{address[1]}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    return f"POST {CHAT} HTTP/1.1\r\n{lines}".encode()


def _posted(address: tuple[str, int], content: bytes) -> tuple[int, bytes]:
    connection = HTTPConnection(*address, timeout=60)
    try:
        connection.request("POST", CHAT, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _asks(chance: random.Random, address: tuple[str, int], **more: Any) -> str:
    status, text = _posted(address, _content(chance, **more))
    assert status in (200, 502), text
    return str(status)


def _streams(chance: random.Random, address: tuple[str, int]) -> str:
    return _asks(chance, address, stream=True)


def _wrong(chance: random.Random, address: tuple[str, int]) -> str:
    wrong: dict[str, Any] = chance.choice(
        [{"stop": ["x"] * 10_000}, {"x": 1}, {"messages": [{}] * 10_000}, {"user": "x" * 5_000_000}, {"top_p": "x"}]
    )
    status, text = _posted(address, _content(chance, **wrong))
    assert 400 <= status < 500, text
    return str(status)


def _half(chance: random.Random, address: tuple[str, int]) -> str:
    """Sends a part, and waits until it is cut off."""
    content = _content(chance)
    whole = _head(address, len(content)) + content
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(whole[: chance.randrange(len(whole) - 1)])
        while connection.recv(65536):
            pass
    return "cut off"


def _dies(chance: random.Random, address: tuple[str, int]) -> str:
    """Sends a request, and is gone: with a FIN, or with a RST, before the answer or in it."""
    content = _content(chance, stream=chance.random() < 0.5)
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(_head(address, len(content)) + content)
        if chance.random() < 0.5:
            connection.recv(10)
        if chance.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return "left"


def _reads_slowly(chance: random.Random, address: tuple[str, int]) -> str:
    content = _content(chance, stream=True)
    with socket.create_connection(address, timeout=60) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(_head(address, len(content)) + content)
        for _ in range(chance.randrange(20)):
            if not connection.recv(500):
                break
            time.sleep(0.05)
    return "read some"


def _floods(chance: random.Random, address: tuple[str, int]) -> str:
    """Opens many connections that say nothing."""
    held = [socket.create_connection(address, timeout=60) for _ in range(30)]
    time.sleep(chance.random())
    for one in held:
        one.close()
    return "opened"


def _watched(end: float, engine: FakeEngine) -> list[int]:
    """Bytes of memory of this process, twice a second until the end. What the engine keeps for tests is let go."""
    memory = []
    while time.monotonic() < end:
        engine.connections = [one for one in engine.connections if one.fileno() >= 0]
        del engine.seen[:-100]
        gc.collect()
        status = Path("/proc/self/statm").read_text("utf-8").split()
        memory.append(int(status[1]) * os.sysconf("SC_PAGE_SIZE"))
        time.sleep(0.5)
    return memory


def _at_rest(address: tuple[str, int]) -> None:
    """AssertionError where something is still being answered half a minute after the last client."""
    until = time.monotonic() + 30
    while True:
        text = httpx2.get(f"http://127.0.0.1:{address[1]}/metrics", timeout=60, trust_env=False).text
        if "zhllama_requests_running 0.0" in text:
            return
        assert time.monotonic() < until, "requests are counted that nobody waits for"
        time.sleep(0.1)
