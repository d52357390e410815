"""An engine's process: nobody but the gateway reaches it, and one that ends or hangs is started again."""

import logging
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from components.serve import engine_process
from components.serve.engine_process import EngineProcess
from components.serve.engines import Engine

SERVER = """
import socketserver, sys, os, http.server, time
assert sys.argv[1] == "--uds"
class Handler(http.server.BaseHTTPRequestHandler):
    def address_string(self): return "-"
    def log_message(self, *_): pass
    def do_GET(self):
        if self.path == "/die": os.kill(os.getpid(), 11), time.sleep(60)
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
print("listening", flush=True)
Server(sys.argv[2], Handler).serve_forever()
"""


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    (tmp_path / "server.py").write_text(SERVER)
    return Engine("a server", tmp_path, [sys.executable, str(tmp_path / "server.py")], "/health")


@pytest.fixture
def process(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineProcess]:
    monkeypatch.setattr(engine_process, "WATCH_SECONDS", 0.2)
    monkeypatch.setattr(engine_process, "HUNG_SECONDS", 0.5)
    with EngineProcess(engine) as made:
        made.wait_until_healthy()
        yield made


def ask(process: EngineProcess, path: str = "/") -> int:
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=process.socket), base_url="http://engine") as client:
        return client.get(path).status_code


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def answers(process: EngineProcess) -> bool:
    try:
        return ask(process) == 200
    except httpx2.HTTPError:
        return False


def listening_ports(pid: int) -> list[str]:
    """Of TCP, as /proc has them: lines of sockets that this process has open and that listen."""
    held = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    tables = (Path(f"/proc/net/{name}").read_text("utf-8").splitlines()[1:] for name in ("tcp", "tcp6"))
    lines = [line.split() for table in tables for line in table]
    return [line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in held]


def test_its_socket_is_its_owners_alone_and_it_has_no_port(process: EngineProcess) -> None:
    assert ask(process) == 200
    assert stat.S_IMODE(Path(process.socket).stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(process.socket).parent.stat().st_mode) == 0o700
    assert not listening_ports(process._process.pid)


def test_a_long_place_for_temporary_files_is_no_hindrance(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with EngineProcess(engine) as made:
        made.wait_until_healthy()
        assert ask(made) == 200
        folder = Path(made.socket).parent
    assert not folder.exists()


def test_one_that_a_request_ends_is_started_again(process: EngineProcess, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "engine"):
        for times in (1, 2):
            with pytest.raises(httpx2.HTTPError):
                ask(process, "/die")
            # it may answer before its watcher has heard it
            wait_for(lambda times=times: caplog.text.count("answers again") == times)
            assert ask(process) == 200
    assert "ended with -11: listening; it is started again in 0 s" in caplog.text
    assert "it is started again in 1 s" in caplog.text


def test_one_that_hangs_is_ended_and_started_again(process: EngineProcess, caplog: pytest.LogCaptureFixture) -> None:
    before = process._process.pid
    os.kill(before, signal.SIGSTOP)
    wait_for(lambda: process._process.pid != before and answers(process))
    assert "has not answered for" in caplog.text


def test_one_that_does_not_come_up_again_is_a_fault(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_process, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(engine_process, "MOST_STARTS", 2)
    with EngineProcess(engine) as process:
        process.wait_until_healthy()
        (engine.folder / "server.py").write_text("raise SystemExit('no weights')")
        process._process.kill()
        with pytest.raises(RuntimeError, match=r"ended with 1: .*no weights"):
            process.wait()
    assert caplog.text.count("is started again") >= 2


def test_one_that_never_came_up_is_a_fault_at_once(tmp_path: Path) -> None:
    broken = Engine("broken", tmp_path, [sys.executable, "-c", "raise SystemExit('no weights')"], "/health")
    with EngineProcess(broken) as process, pytest.raises(RuntimeError, match="ended with 1: no weights"):
        process.wait_until_healthy()


def test_what_is_stopped_while_it_is_started_again_leaves_no_process(process: EngineProcess) -> None:
    process._process.kill()
    wait_for(lambda: process.alive)
    last = process._process
    process.__exit__()
    assert last.poll() is not None
    assert process._process.poll() is not None
    assert not any(thread.name == process._watcher.name for thread in threading.enumerate())
