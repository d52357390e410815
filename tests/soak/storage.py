"""Storage under random faults: a writer and a reader in programs of their own, behind a proxy that breaks things.

Each run writes an artifact (one or two files of some parts, some small ones), reads it back to files, and meets what
its seed draws: a share of requests that fail in any of the proxy's ways, the writer or the reader killed at a random
request, the server killed and started again. What must hold: nothing is visible but a whole artifact with right bytes;
a program ends with success or with one clear line; and started again without faults it completes.
"""

import multiprocessing
import os
import random
import shutil
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.local.s3_server import LocalS3
from tests.faulty_proxy import Fault, FaultyProxy, Request
from zhllama import storage
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.published import find_published
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError, StorageFault

PART, BLOCK = 5 * 2**20, 2**20
"""Small ones, so that a small artifact has several."""
KINDS = (
    *2 * ("status", "slow down", "reset", "lost", "reset answer", "truncate", "corrupt answer", "corrupt request"),
    # a second each
    "stall",
)


@dataclass(frozen=True)
class Plan:
    """What a seed means. share: of the requests that fail; kill_at: the request at which the client is killed;
    restart_at: the one at which the server is."""

    files: dict[str, bytes]
    share: float
    kill_writer_at: int | None
    kill_reader_at: int | None
    restart_at: int | None

    @staticmethod
    def of(seed: int) -> "Plan":
        chance = random.Random(seed)
        files = {f"large-{n}.bin": chance.randbytes(chance.randrange(PART, 3 * PART)) for n in range(1 + seed % 2)}
        files |= {f"folder/{n}.bin": chance.randbytes(chance.randrange(50_000)) for n in range(chance.randrange(5))}
        return Plan(
            files,
            share=chance.choice([0, 0.02, 0.1, 0.3]),
            kill_writer_at=chance.randrange(1, 16) if chance.random() < 0.4 else None,
            kill_reader_at=chance.randrange(1, 24) if chance.random() < 0.3 else None,
            restart_at=chance.randrange(1, 12) if chance.random() < 0.08 else None,
        )


def run(seeds: Iterable[int], scratch: Path) -> dict[str, int]:
    """AssertionError names the seed at which something was not as it must be."""
    counted: Counter[str] = Counter()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zhllama.artifacts.writer", "boto3", __name__])
    before = dict(os.environ)
    # the server dies with the thread that started it: this one stays
    keeper = ThreadPoolExecutor(1)
    with LocalS3(scratch / "server", bucket="soak") as server, FaultyProxy(server.endpoint) as proxy:
        os.environ.update(server.environment())
        try:
            for seed in seeds:
                try:
                    counted.update(_Run(seed, server, proxy, keeper, context, scratch / "work").all())
                except Exception as error:
                    raise AssertionError(f"seed {seed}: {error}") from error
        finally:
            proxy.fault = lambda request: None
            os.environ.clear()
            os.environ.update(before)
            storage.forget_client()
    return dict(sorted(counted.items()))


class _Run:
    def __init__(
        self, seed: int, server: LocalS3, proxy: FaultyProxy, keeper: ThreadPoolExecutor, context: Any, scratch: Path
    ) -> None:
        self._plan = Plan.of(seed)
        self._chance = random.Random(-seed - 1)
        self._store = f"s3://soak/{seed}"
        self._server, self._proxy, self._keeper = server, proxy, keeper
        self._context, self._scratch = context, scratch
        self._counted: Counter[str] = Counter({"runs": 1})
        self._lock = threading.Lock()

    def all(self) -> Counter[str]:
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        self._phase("writer", _write, self._plan.kill_writer_at, self._plan.restart_at)
        self._nothing_partial()
        self._proxy.fault = lambda request: None
        if self._child(_write) != "done":
            raise AssertionError(f"started again without faults, the writer ended with {self._said()}")
        self._nothing_partial(must_be_there=True)
        self._phase("reader", _read, self._plan.kill_reader_at, None)
        self._right_files()
        self._proxy.fault = lambda request: None
        if self._child(_read) != "done":
            raise AssertionError(f"started again without faults, the reader ended with {self._said()}")
        self._right_files(must_be_there=True)
        storage.delete_all(self._store)
        for left in storage.unfinished(self._store):
            storage.discard(left.uri, left.id)
        return self._counted

    def _phase(self, who: str, work: Callable[..., None], kill_at: int | None, restart_at: int | None) -> None:
        seen = 0

        def decide(request: Request) -> Fault | None:
            nonlocal seen
            with self._lock:
                seen += 1
                number, failing = seen, self._chance.random() < self._plan.share
                kind, at = self._chance.choice(KINDS), self._chance.random()
                if number == kill_at and self._process.pid:
                    os.kill(self._process.pid, signal.SIGKILL)
                    return Fault("reset")
                if number == restart_at:
                    self._counted["servers killed"] += 1
                    self._keeper.submit(kill_and_start, self._server).result()
                    self._proxy.upstream = self._server.endpoint
            if not failing:
                return None
            self._counted[f"faults: {kind}"] += 1
            return Fault("status", status=503, code="SlowDown") if kind == "slow down" else Fault(kind, at)

        self._proxy.fault = decide
        ended = self._child(work)
        with self._lock:
            # a server that is being started again is there when its turn is over
            self._proxy.fault = lambda request: None
        self._counted[f"{who} {ended}"] += 1
        if ended not in ("done", "gave up", "killed"):
            raise AssertionError(f"the {who} ended with {self._said()}")

    def _child(self, work: Callable[..., None]) -> str:
        """`done`, `gave up` (with one clear line), `killed`, or else what a bug looks like."""
        (self._scratch / "said").unlink(missing_ok=True)
        environment = {**self._server.environment(), "ZHLLAMA_S3_ENDPOINT": self._proxy.endpoint}
        arguments = (work, environment, self._store, self._plan.files, str(self._scratch))
        self._process = self._context.Process(target=_program, args=arguments)
        self._process.start()
        self._process.join(120)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError("a program hangs")
        if self._process.exitcode == -signal.SIGKILL:
            return "killed"
        return {0: "done", 1: "gave up"}.get(self._process.exitcode, "a bug")

    def _said(self) -> str:
        said = self._scratch / "said"
        return said.read_text() if said.exists() else "nothing"

    def _nothing_partial(self, must_be_there: bool = False) -> None:
        """Looks at the server itself, past the proxy."""
        os.environ["ZHLLAMA_S3_ENDPOINT"] = self._server.endpoint
        manifest = find_published(self._store, "stage", "key")
        if manifest is None:
            seen = storage.exists(f"{self._store}/stage/key/manifest.json")
            if must_be_there or seen:
                raise AssertionError("an artifact is half there" if seen else "there is no artifact")
            return
        for name, content in self._plan.files.items():
            if storage.read_bytes(f"{manifest.root}/{name}") != content:
                raise AssertionError(f"{name} was published with wrong bytes")

    def _right_files(self, must_be_there: bool = False) -> None:
        for name, content in self._plan.files.items():
            path = self._scratch / "copy" / name
            if path.exists() and path.read_bytes() != content:
                raise AssertionError(f"wrong bytes of {name} were accepted")
            if must_be_there and not path.exists():
                raise AssertionError(f"{name} is missing")


def kill_and_start(server: LocalS3) -> None:
    """SIGKILL, and the server again on its data, at another port. It dies with the thread that calls this."""
    assert server._server is not None
    os.killpg(server._server.pid, signal.SIGKILL)
    server._server.wait()
    server.__exit__()
    server.__enter__()


# --- in programs of their own -----------------------------------------------------------------------------------------


def _program(
    work: Callable[..., None], environment: dict[str, str], store: str, files: dict[str, bytes], scratch: str
) -> None:
    """Exit code 0: done; 1: ended with a line of ours; 2: a bug."""
    from zhllama.artifacts import blocks, reader, writer
    from zhllama.storage import multipart

    os.environ.update(environment)
    os.environ.update({"ZHLLAMA_S3_TIMEOUT": "1", "AWS_MAX_ATTEMPTS": "5", "ZHLLAMA_S3_CONNECTIONS": "4"})
    multipart.PART, storage.PIECE = PART, 2 * BLOCK
    blocks.BLOCK = reader.BLOCK = writer.BLOCK = BLOCK
    code = 0
    try:
        work(store, files, Path(scratch))
    except (InputError, StorageFault) as error:
        (Path(scratch) / "said").write_text(str(error))
        code = 1
    except BaseException:  # noqa: BLE001 - the parent process says that it is a bug
        (Path(scratch) / "said").write_text(traceback.format_exc())
        code = 2
    os._exit(code)


def _write(store: str, files: dict[str, bytes], scratch: Path) -> None:
    if find_published(store, "stage", "key") is not None:
        return
    out = ArtifactWriter(store, "stage", "key")
    for name, content in files.items():
        with out.writer(name) as stream:
            for at in range(0, len(content), 700_001):
                stream.write(content[at : at + 700_001])
    out.publish("files")


def _read(store: str, files: dict[str, bytes], scratch: Path) -> None:
    open_artifact(f"{store}/stage/key").fetch(scratch / "copy")
