"""transformers' server as a child process: started, waited for, asked, stopped.

It stays in our process group, so that what ends the group (Ctrl-C, a runner) ends it too; a signal to us alone is
passed on when the `with` block is left. Its output becomes our log, a record a line.

Known of transformers 5.24: a stream ends with an error event when a model says bytes that are no UTF-8 and goes on (an
untrained model does); the same answer without streaming is given with replacement characters.
"""

import collections
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NoReturn, Self

from components.shared.children import die_with_parent
from components.shared.errors import InputError
from components.shared.inference import Sampling

log = logging.getLogger("server")

START_SECONDS = 900.0
"""For reading a large model from a slow disk."""
STOP_SECONDS = 10.0


class Server:
    """Serves `folder/name`. `with Server(folder, "zhllama", host, port) as server: server.wait_until_healthy()`."""

    def __init__(self, folder: Path, name: str, host: str, port: int) -> None:
        self._folder = folder
        self._name = name
        self._host = host
        self._port = port
        self._last: collections.deque[str] = collections.deque(maxlen=5)

    @property
    def address(self) -> str:
        """`http://127.0.0.1:8000`."""
        return f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{self._port}"

    def __enter__(self) -> Self:
        import torch

        self._port = free_port(self._host, self._port)
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", self._name]
        command += ["--host", self._host, "--port", str(self._port)]
        if not torch.cuda.is_available():
            command += ["--device", "cpu", "--dtype", "float32"]
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self._process = subprocess.Popen(
            command,
            cwd=self._folder,
            # passive: idle threads leave the cores to others (components/shared/inference.py)
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **quiet, "PYTHONUNBUFFERED": "1"},
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
            if line and "/health" not in line:
                self._last.append(line)
                log.info("%s", line)

    def wait_until_healthy(self) -> None:
        """RuntimeError when the server ends before it answers, or does not within a quarter of an hour."""
        until = time.monotonic() + START_SECONDS
        while True:
            if self._process.poll() is not None:
                self._ended()
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                if time.monotonic() > until:
                    raise RuntimeError(f"the server did not answer within {START_SECONDS:.0f} s") from None
            time.sleep(0.1)

    def ask(self, text: str) -> str:
        """The answer to one question, through the API."""
        body = {
            "model": self._name,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": Sampling().max_new_tokens,
        }
        request = urllib.request.Request(
            f"{self.address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])

    def wait(self) -> NoReturn:
        """Until the server ends by itself, which is a RuntimeError."""
        self._process.wait()
        self._ended()

    def _ended(self) -> NoReturn:
        self._reader.join(STOP_SECONDS)
        said = " | ".join(self._last) or "it said nothing"
        raise RuntimeError(f"the server ended with {self._process.returncode}: {said}")

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when it does not go within ten seconds."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join(STOP_SECONDS)

    def __exit__(self, *_: object) -> None:
        self.stop()


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. InputError when it is taken or may not be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            # as the server does: a port that only waits for its last connections to expire is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise InputError(f"serve: {host}:{port}: {error.strerror}; choose another with --port") from error
