"""A fetch that was killed goes on: what is in the store is not asked of the source again, and is believed only read."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from components.fetch_weights.fetcher import fetch_weights
from components.fetch_weights.options import FetchWeights
from tests.bench.measure import run
from zhllama import storage
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.storage.s3_session import current_session
from zhllama.weights.meta_format import MetaParams

SIZES = {"consolidated.00.pth": 2 * storage.PART + 9 * 2**20, "consolidated.01.pth": storage.PART + 100}


@pytest.fixture
def served(http, llama_tokenizer, write_sums) -> Path:
    """Weights of two shards, of three parts and of two, behind the HTTP server."""
    http.folder.mkdir()
    chance = random.Random(5)
    for name, size in SIZES.items():
        (http.folder / name).write_bytes(chance.randbytes(size))
    (http.folder / "params.json").write_bytes(MetaParams(64, 2, 4, 1e-6).to_json())
    (http.folder / "tokenizer.model").write_bytes(llama_tokenizer)
    write_sums(http.folder)
    return Path(http.folder)


def options(store: str, address: str) -> FetchWeights:
    return FetchWeights(store=store, source=address, size="large")


def fetch(store: str, address: str) -> Manifest:
    return run_stage(options(store, address), fetch_weights)


def there(store: str) -> dict[str, int]:
    """Bytes of each shard that lie in the store, visible or not: file → bytes."""
    found = {Path(item.name).name: item.size for item in storage.listing(store)}
    if not storage.is_s3(store):
        for journal in Path(store).rglob(".*.parts.txt"):
            name = journal.name.removeprefix(".").removesuffix(".parts.txt")
            numbers = [int(line) for line in journal.read_text().split("\n")[:-1] if line]
            found[name] = sum(min(storage.PART, SIZES[name] - number * storage.PART) for number in numbers)
        return found
    bucket, prefix = storage.split_s3(store)
    client = current_session().client
    for upload in client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", []):
        parts = client.list_parts(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]).get("Parts", [])
        found[upload["Key"].rpartition("/")[2]] = sum(part["Size"] for part in parts)
    return found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


IN_THE_FIRST, IN_THE_SECOND = 2 * storage.PART + 2**20, 2 * storage.PART + 17 * 2**20
"""Bytes after which the source holds: two parts are whole then, or the first file, and the next part is under way."""


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-m", "components.fetch_weights", *command]) as process:
        try:
            yield process
        finally:
            process.kill()


def killed_fetch(store: str, http, after: int) -> dict[str, int]:
    """Starts a fetch, kills it (SIGKILL) when the source has given `after` bytes, and says what is in the store."""
    http.hold_after = after
    with running("--store", store, "--source", http.address, "--size", "large", "--parallel", "1") as process:
        # its one thread waits for the source; what came before that part is in the store, or just on its way there
        until(lambda: http.held.is_set() or process.poll() is not None)
        until(lambda: sum(there(store).values()) >= 2 * storage.PART or process.poll() is not None)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    http.hold_after, http.drops = None, True
    http.go_on.set()
    return there(store)


@pytest.mark.slow
@pytest.mark.parametrize("after", [IN_THE_FIRST, IN_THE_SECOND], ids=["in the first file", "in the second file"])
def test_after_a_kill_only_the_missing_bytes_are_moved(store, http, served, after):
    before = killed_fetch(store, http, after)
    assert before["consolidated.00.pth"] >= 2 * storage.PART
    assert not any(item.name.endswith("manifest.json") for item in storage.listing(store))
    http.sent.clear()
    manifest = fetch(store, http.address)
    for name, size in SIZES.items():
        assert http.sent[f"/{name}"] == size - before.get(name, 0), name
    artifact = open_artifact(manifest.reference)
    artifact.verify()
    for name in SIZES:
        assert artifact.file(name).sha256 == hashlib.sha256((served / name).read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_resumed_fetch_gives_the_artifact_of_one_that_was_not_killed(tmp_path, store, http, served):
    killed_fetch(store, http, IN_THE_FIRST)
    assert fetch(store, http.address).digest == fetch(str(tmp_path / "other"), http.address).digest


def spoil(store: str, name: str) -> None:
    """Puts other bytes into the place of a finished file or of a part under way, as a broken disk would."""
    for item in storage.listing(store):
        if item.name.endswith(name):
            storage.write_bytes(storage.join(store, item.name), bytes(item.size))
            return
    (path,) = Path(store).rglob(f".{name}.parts")
    with open(path, "r+b") as file:
        file.write(bytes(1000))


@pytest.mark.slow
def test_what_an_earlier_fetch_left_is_not_believed_unread(tmp_path, http, served, caplog):
    store = str(tmp_path / "store")
    killed_fetch(store, http, IN_THE_SECOND)
    spoil(store, "consolidated.00.pth")
    http.sent.clear()
    manifest = fetch(store, http.address)
    assert "what an earlier fetch left is not as it should be" in caplog.text
    open_artifact(manifest.reference).verify()
    assert (
        open_artifact(manifest.reference).read("consolidated.00.pth") == (served / "consolidated.00.pth").read_bytes()
    )


@pytest.mark.slow
def test_a_mismatch_after_a_kill_is_named_and_nothing_stays(tmp_path, http, served, write_sums):
    store = str(tmp_path / "store")
    sums = served / "sha256sums.txt"
    wrong = hashlib.sha256(b"other").hexdigest()
    lines = [wrong + line[64:] if line.endswith("00.pth") else line for line in sums.read_text().splitlines()]
    sums.write_text("\n".join(lines) + "\n")
    killed_fetch(store, http, IN_THE_FIRST)
    found = hashlib.sha256((served / "consolidated.00.pth").read_bytes()).hexdigest()
    with pytest.raises(InputError, match=rf"consolidated\.00\.pth: sha256 {wrong} expected .*, {found} found"):
        fetch(store, http.address)
    assert "consolidated.00.pth" not in there(store)


def test_a_server_without_ranges_is_read_from_beginning_to_end(store, http, served):
    http.ranged = False
    manifest = fetch(store, http.address)
    open_artifact(manifest.reference).verify()
    asked = [given for method, path, given in http.asked if method == "GET" and path == "/consolidated.00.pth"]
    assert asked == ["bytes=0-0", None]


@pytest.mark.slow
def test_parts_of_a_file_are_fetched_side_by_side(tmp_path, http, served):
    """The source holds every answer: one after another, the second part would never be asked for."""

    def asked() -> int:
        return sum(given not in (None, "bytes=0-0") for _, path, given in http.asked if path.endswith("00.pth"))

    http.hold_after = storage.PART // 2
    with running("--store", str(tmp_path), "--source", http.address, "--size", "large", "--parallel", "4") as process:
        until(lambda: asked() == 3 or process.poll() is not None)
        assert process.poll() is None
        http.hold_after = None
        http.go_on.set()
        assert process.wait(120) == 0


@pytest.mark.slow
def test_parts_of_a_hubs_file_are_fetched_by_range(tmp_path, hub, served):
    repository = hub.folder / "someone" / "large"
    repository.parent.mkdir(parents=True)
    served.rename(repository)
    (repository / "sha256sums.txt").unlink()
    environment = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    words = ["--store", str(tmp_path / "store"), "--source", "someone/large", "--reference", str(tmp_path / "ref")]
    command = [sys.executable, "-m", "components.fetch_weights", *words]
    ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    asked = [given for method, path, given in hub.asked if method == "GET" and path.endswith("consolidated.00.pth")]
    ends = [0, storage.PART, 2 * storage.PART, SIZES["consolidated.00.pth"]]
    assert sorted(asked) == sorted(f"bytes={start}-{end - 1}" for start, end in pairwise(ends))
    artifact = open_artifact((tmp_path / "ref").read_text())
    assert artifact.read("consolidated.00.pth") == (repository / "consolidated.00.pth").read_bytes()


@pytest.mark.slow
def test_no_shard_is_held_in_memory(tmp_path, llama_tokenizer):
    peaks = []
    for size in (50 * 2**20, 350 * 2**20):
        source = tmp_path / str(size)
        source.mkdir()
        with open(source / "consolidated.00.pth", "wb") as file:
            file.truncate(size)
        (source / "params.json").write_bytes(MetaParams(64, 2, 4, 1e-6).to_json())
        (source / "tokenizer.model").write_bytes(llama_tokenizer)
        words = ["--store", str(tmp_path / "store"), "--source", str(source), "--parallel", "1"]
        peaks.append(run([sys.executable, "-m", "components.fetch_weights", *words]).peak_mb)
    assert peaks[1] - peaks[0] < 64, peaks
