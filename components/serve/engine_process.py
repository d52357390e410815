"""The engine as a child process on loopback: started, waited for, stopped.

It stays in our process group, so that what ends the group (Ctrl-C, a runner) ends it too; a signal to us alone is
passed on when the `with` block is left, and the kernel ends it when we are killed. Its output becomes our log, a record
a line. It cannot be reached from another machine: keys, limits and metrics are the gateway's (gateway.py).
"""

import collections
import logging
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from typing import NoReturn, Self

from components.serve.engines import Engine
from zhllama.stage.child_processes import die_with_parent

log = logging.getLogger("engine")

START_SECONDS = 900.0
"""For reading a large model from a slow disk."""
STOP_SECONDS = 10.0
LOOPBACK = "127.0.0.1"
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class EngineProcess:
    """`with EngineProcess(engine) as process: process.wait_until_healthy()`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last: collections.deque[str] = collections.deque(maxlen=5)
        self.address = ""
        """`http://127.0.0.1:43210`."""

    def __enter__(self) -> Self:
        with socket.create_server((LOOPBACK, 0)) as probe:
            port = probe.getsockname()[1]
        self.address = f"http://{LOOPBACK}:{port}"
        self._process = subprocess.Popen(
            self._engine.command(LOOPBACK, port),
            cwd=self._engine.folder,
            # passive: idle threads leave the cores to others (zhllama/inference/load.py)
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **QUIET, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").strip()
            # what is asked is the gateway's to record
            if line and '" 200' not in line and "[Request received]" not in line:
                self._last.append(line)
                log.info("%s", line)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_healthy(self) -> None:
        """RuntimeError when the engine ends before it answers, or does not within a quarter of an hour."""
        until = time.monotonic() + START_SECONDS
        while True:
            if not self.alive:
                self._ended()
            try:
                with urllib.request.urlopen(f"{self.address}{self._engine.health}", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                if time.monotonic() > until:
                    raise RuntimeError(f"the engine did not answer within {START_SECONDS:.0f} s") from None
            time.sleep(0.1)

    def wait(self) -> NoReturn:
        """Until the engine ends by itself, which is a RuntimeError."""
        self._process.wait()
        self._ended()

    def _ended(self) -> NoReturn:
        self._reader.join(STOP_SECONDS)
        said = " | ".join(self._last) or "it said nothing"
        raise RuntimeError(f"the engine ({self._engine.name}) ended with {self._process.returncode}: {said}")

    def __exit__(self, *_: object) -> None:
        """SIGTERM, and SIGKILL when it does not go within ten seconds."""
        if self.alive:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join(STOP_SECONDS)
