"""Models of the Hugging Face Hub as files of this node. A program for each question, since the hub's library reads its
settings when it is imported."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.components.fetch_weights.conftest import FolderServer, _HubHandler, _serving

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40_000}
SIZE = sum(map(len, FILES.values()))
PROGRAM = """
import sys
from zhllama.artifacts import cache
from zhllama.artifacts.open import open_artifact
model = open_artifact("hf://someone/model")
needed = []
cache.require_space = lambda folder, need, what: needed.append(need)
cache.require_room([model])
folder = cache.materialize(model, recheck="recheck" in sys.argv)
cache.require_room([model])
print(folder, needed[0], needed[-1])
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FolderServer]:
    """A hub with one model."""
    folder = tmp_path / "hub" / "someone" / "model"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    server = FolderServer(tmp_path / "hub")
    server.RequestHandlerClass = _HubHandler
    yield from _serving(server)


def local(hub: FolderServer, *options: str) -> tuple[Path, int, int]:
    """In another process: the copy on this node; the bytes to fetch before it was made, and after."""
    cache = str(hub.folder.parent / "cache")
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "ZHLLAMA_CACHE": cache}
    ended = subprocess.run([sys.executable, "-c", PROGRAM, *options], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    folder, before, after = ended.stdout.split()
    return Path(folder), int(before), int(after)


def test_a_node_fetches_a_model_once_for_all_its_processes(hub):
    folder, before, after = local(hub)
    assert (before, after) == (SIZE, 0)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert hub.sent.total() == SIZE
    assert local(hub) == (folder, 0, 0)
    assert hub.sent.total() == SIZE


@pytest.mark.slow
def test_a_recheck_fetches_what_was_damaged_on_the_node_and_nothing_else(hub):
    folder, _, _ = local(hub)
    damaged = folder / "model.safetensors"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    hub.sent.clear()
    local(hub, "recheck")
    assert damaged.read_bytes() == FILES["model.safetensors"]
    assert hub.sent == {"/someone/model/model.safetensors": len(FILES["model.safetensors"])}


ASKS = {
    "what is there": 'open_hub_model("someone/model", "--model")',
    "a range": 'hub_source("hf://x", "someone/model", "main", "")("a", 0, 9, memoryview(bytearray(9)), None)',
}


@pytest.mark.parametrize("coding", ["identity", "gzip"])
@pytest.mark.parametrize("question", ASKS)
def test_an_answer_without_end_takes_no_memory_and_is_one_line(question, coding):
    sent = 0

    class Endless(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal sent
            if not self.path.startswith("/elsewhere"):
                self.send_response(302)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Encoding", coding)
            self.end_headers()
            with suppress(OSError):
                while sent < 400 * 2**20:
                    self.wfile.write(b" " * 2**20)
                    sent += 2**20

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        words = f"""
from zhllama.artifacts.hub_model import hub_source, open_hub_model
from zhllama.errors import StorageFault
try:
    {ASKS[question]}
except StorageFault as error:
    print(error)
"""
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
        ended = subprocess.run([sys.executable, "-c", words], env=environment, capture_output=True, text=True)
        server.shutdown()
    assert ended.returncode == 0, ended.stderr[-600:]
    assert ("has more than" if coding == "identity" else "is compressed") in ended.stdout
    assert sent < 150 * 2**20
