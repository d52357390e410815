"""An engine as a child process on a unix socket, watched: one that ends or hangs is started again.

Only the gateway's user reaches the socket. An engine is somebody else's program, and a request may end it; then that
request is answered with an error, those behind it wait some seconds, and the log says so. One that does not come up
again several times is a fault of the whole server, for whoever started it.
"""

import collections
import logging
import os
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn, Self

import httpx2

from components.serve.engines import Engine
from components.serve.unix_socket import UDS
from zhllama.retries import with_retries
from zhllama.stage.child_processes import die_with_parent
from zhllama.storage.private import temporary_folder

log = logging.getLogger("engine")

START_SECONDS = 900.0
"""For reading a large model from a slow disk."""
STOP_SECONDS = 10.0
WATCH_SECONDS = 5.0
"""Between two looks at its health."""
HUNG_SECONDS = 120.0
"""Without an answer to those, while it is alive."""
STEADY_SECONDS = 60.0
"""After so long it is started again at once; one that ends sooner, after a pause that grows."""
LONGEST_PAUSE = 30.0
MOST_STARTS = 5
"""Without success, one after another."""
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
_LONGEST_FOLDER = 60
"""Characters: a socket's path may have a hundred."""


class EngineProcess:
    """`with EngineProcess(engine) as process: process.wait_until_healthy()`; from then on it is watched.

    It stays in our process group, so that what ends the group (Ctrl-C, a runner) ends it too; a signal to us alone is
    passed on when the `with` block is left, and the kernel ends it when we are killed. Its output becomes our log.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last: collections.deque[str] = collections.deque(maxlen=5)
        self._stopping = threading.Event()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Self:
        short = len(tempfile.gettempdir()) <= _LONGEST_FOLDER
        # 0700: its owner's alone
        self._held = ExitStack()
        self.socket = str(Path(self._held.enter_context(temporary_folder("" if short else "/tmp")), "socket"))
        self._start()
        return self

    def _start(self) -> None:
        Path(self.socket).unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [*self._engine.command, UDS, self.socket],
            cwd=self._engine.folder,
            # passive: idle threads leave the cores to others (zhllama/inference/load.py)
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **QUIET, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for raw in process.stdout:
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
        self._until_healthy()
        self._watcher.start()

    def _client(self) -> httpx2.Client:
        transport = httpx2.HTTPTransport(uds=self.socket)
        return httpx2.Client(base_url="http://engine", transport=transport, timeout=WATCH_SECONDS, trust_env=False)

    def _ask(self, client: httpx2.Client) -> None:
        """httpx2.HTTPError unless it is well. What else it says is not read: it may have no end."""
        with client.stream("GET", self._engine.health) as answer:
            answer.raise_for_status()

    def _until_healthy(self) -> None:
        try:
            with self._client() as client:
                with_retries(
                    lambda: self._ask(client),
                    lambda error: isinstance(error, httpx2.HTTPError),
                    seconds=START_SECONDS, first=0.1, longest=0.1,
                    goes_on=lambda: self.alive and not self._stopping.is_set(),
                )  # fmt: skip
            Path(self.socket).chmod(0o600)
        except httpx2.HTTPError:
            if not self.alive:
                raise self._ended() from None
            raise RuntimeError(f"the engine did not answer within {START_SECONDS:.0f} s") from None

    def wait(self) -> NoReturn:
        """Until the engine has ended for good, which is a RuntimeError."""
        self._over.wait()
        raise self._ended()

    def _ended(self) -> RuntimeError:
        self._reader.join(STOP_SECONDS)
        said = " | ".join(self._last) or "it said nothing"
        return RuntimeError(f"the engine ({self._engine.name}) ended with {self._process.returncode}: {said}")

    def _keep(self) -> None:
        """Starts it again whenever it has ended, until it is stopped, or does not come up any more."""
        pause, failed = 0.0, 0
        while failed < MOST_STARTS:
            begin = time.monotonic()
            self._watch()
            if self._stopping.is_set():
                return
            if time.monotonic() - begin > STEADY_SECONDS:
                pause, failed = 0.0, 0
            log.error("%s; it is started again in %.0f s", self._ended(), pause)
            if self._stopping.wait(pause):
                return
            pause = min(2 * pause or 1.0, LONGEST_PAUSE)
            self._start()
            try:
                self._until_healthy()
                failed = 0
                log.warning("the engine (%s) answers again", self._engine.name)
            except (RuntimeError, OSError):
                failed += 1
                self._process.kill()
        self._over.set()

    def _watch(self) -> None:
        """Until it has ended; one that hangs is ended."""
        heard = time.monotonic()
        with self._client() as client:
            while not self._stopping.is_set():
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(WATCH_SECONDS)
                    return
                try:
                    self._ask(client)
                    heard = time.monotonic()
                except httpx2.HTTPError:
                    if time.monotonic() - heard > HUNG_SECONDS:
                        log.error("the engine (%s) has not answered for %.0f s", self._engine.name, HUNG_SECONDS)
                        self._process.kill()

    def __exit__(self, *_: object) -> None:
        """SIGTERM, and SIGKILL when it does not go within ten seconds."""
        self._stopping.set()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._process.kill()
        self._process.wait()
        if self._watcher.is_alive():
            self._watcher.join(STOP_SECONDS)
            # what it may have started meanwhile
            self._process.kill()
            self._process.wait()
        self._reader.join(STOP_SECONDS)
        self._held.close()
