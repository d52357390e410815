"""Storage under faults: a real S3 server behind a proxy that breaks things. Right bytes, or one clear line."""

import errno
import hashlib
import itertools
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.local.s3_server import LocalS3
from tests.faulty_proxy import Fault, FaultyProxy, Request
from tests.soak.storage import kill_and_start
from zhllama import storage
from zhllama.artifacts.blocks import BLOCK, block_digests
from zhllama.artifacts.manifest import MANIFEST
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.published import find_published
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError, StorageFault
from zhllama.storage import multipart
from zhllama.storage.s3_errors import server_code

SMALL = b"small" * 1000
PART = 5 * 2**20
"""Parts of the tests' uploads: as small as S3 allows."""
LARGE = random.Random(1).randbytes(4 * PART + 3 * 2**20)
"""Five parts, three blocks."""


@pytest.fixture
def proxy(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy before the session's server; transfers go through it."""
    with FaultyProxy(os.environ["ZHLLAMA_S3_ENDPOINT"]) as proxy:
        monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", proxy.endpoint)
        # no request is given up because the machine is busy
        monkeypatch.setenv("ZHLLAMA_S3_TIMEOUT", "60")
        monkeypatch.setattr(multipart, "PART", PART)
        storage.forget_client()
        yield proxy


def once(kinds: str, fault: Fault) -> Callable[[Request], Fault | None]:
    """The fault for the first request of each of these kinds, and no more."""
    left = set(kinds.split())
    lock = threading.Lock()

    def decide(request: Request) -> Fault | None:
        with lock:
            if request.kind not in left:
                return None
            left.remove(request.kind)
            return fault

    return decide


def always(kinds: str, fault: Fault) -> Callable[[Request], Fault | None]:
    return lambda request: fault if request.kind in kinds.split() else None


def publish(store: str) -> str:
    out = ArtifactWriter(store, "stage", "key")
    with out.writer("large.bin") as stream:
        stream.write(LARGE)
    out.add_bytes("small.bin", SMALL)
    return out.publish("files").reference


def assert_whole(reference: str) -> None:
    artifact = open_artifact(reference)
    assert artifact.read("large.bin") == LARGE
    assert artifact.read("small.bin") == SMALL


EVERY_CALL = "head uploads create part complete put list get"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=500),
        Fault("status", status=503, code="SlowDown"),
        Fault("reset"),
        Fault("reset answer", 0.0),
        Fault("reset answer", 0.4),
    ],
    ids=lambda fault: f"{fault.kind} {fault.code if fault.kind == 'status' else fault.at}",
)
def test_a_fault_of_every_call_is_ridden_out(proxy, s3_store, fault):
    proxy.fault = once(EVERY_CALL, fault)
    storage.check_writable(s3_store)
    assert_whole(publish(s3_store))


@pytest.mark.parametrize("fault", [Fault("lost"), Fault("corrupt request", 0.3)], ids=lambda fault: fault.kind)
def test_a_part_or_file_that_was_lost_on_the_way_is_sent_again(proxy, s3_store, fault):
    proxy.fault = once("part put", fault)
    reference = publish(s3_store)
    assert proxy.kinds().count("part") == 6
    assert_whole(reference)


@pytest.mark.parametrize(
    "fault",
    [Fault("corrupt answer", 0.7), Fault("truncate", 0.7), Fault("truncate", 0.0), Fault("stall", 0.7)],
    ids=lambda fault: f"{fault.kind} {fault.at}",
)
def test_an_answer_that_is_wrong_or_stops_is_asked_for_again(proxy, s3_store, tmp_path, monkeypatch, fault):
    reference = publish(s3_store)
    if fault.kind == "stall":
        monkeypatch.setenv("ZHLLAMA_S3_TIMEOUT", "1")
        storage.forget_client()
    artifact = open_artifact(reference)
    proxy.fault = once("get", fault)
    assert artifact.read("large.bin") == LARGE
    proxy.fault = once("get", fault)
    artifact.fetch(tmp_path)
    assert (tmp_path / "large.bin").read_bytes() == LARGE


def test_a_length_that_is_missing_twice_is_asked_for_again(proxy, s3_store):
    storage.write_bytes(f"{s3_store}/a", SMALL)
    proxy.fault = once("get head", Fault("truncate", 0.7))
    assert storage.read_bytes(f"{s3_store}/a") == SMALL
    proxy.fault = once("head", Fault("truncate", 0.7))
    assert storage.size_of(f"{s3_store}/a") == len(SMALL)


def test_a_read_goes_on_where_it_broke(proxy, s3_store):
    storage.write_bytes(f"{s3_store}/a", LARGE)
    proxy.forget()
    # what is in the sockets' buffers when the reset comes is lost, but not all of 15 MB fits them
    proxy.fault = once("get", Fault("reset answer", 0.95))
    buffer = bytearray(storage.PIECE)
    storage.read_piece(f"{s3_store}/a", 0, len(buffer), memoryview(buffer))
    assert buffer == LARGE[: storage.PIECE]
    first, second = (int(re.fullmatch(r"bytes=(\d+)-.*", r.headers["range"])[1]) for r in proxy.requests)
    assert first == 0
    assert second > 0


def broken_and_replaced(proxy, uri: str, content: bytes):
    """The first answer to a read breaks half-way, and the object is another before the second is asked for."""
    seen = itertools.count()

    def decide(request: Request) -> Fault | None:
        if request.kind != "get":
            return None
        number = next(seen)
        if number == 1:
            proxy.fault = lambda request: None
            storage.write_bytes(uri, content)
        return Fault("reset answer", 0.5) if number == 0 else None

    return decide


def test_an_object_that_changes_while_it_is_read_is_read_from_its_beginning(proxy, s3_store):
    """Of one request, that is: what is large and has no manifest is read by several."""
    content = LARGE[:PART]
    storage.write_bytes(f"{s3_store}/a", content)
    proxy.fault = broken_and_replaced(proxy, f"{s3_store}/a", content[::-1])
    assert storage.read_bytes(f"{s3_store}/a", 0, len(content)) == content[::-1]


def test_no_byte_of_a_version_that_was_replaced_counts_for_the_new_one(proxy, s3_store):
    """What came before the break was right, and was hashed; in the version that is read anew it is wrong."""
    artifact = open_artifact(publish(s3_store))
    artifact.read("small.bin")
    artifact.read_range("large.bin", 2 * BLOCK, 1)
    proxy.fault = broken_and_replaced(proxy, f"{artifact.root}/large.bin", bytes([LARGE[0] ^ 1]) + LARGE[1:])
    with pytest.raises(InputError, match=rf"large\.bin: bytes 0 to {BLOCK}: blake3"):
        artifact.read_range("large.bin", 0, 2 * BLOCK)


def test_a_byte_that_stays_wrong_is_named_and_nothing_is_left(proxy, s3_store, tmp_path):
    artifact = open_artifact(publish(s3_store))
    proxy.forget()

    def begins(request: Request) -> bool:
        return "large.bin" in request.target and request.headers.get("range", "").startswith("bytes=0-")

    # a byte of the first block, whether it comes alone or with the second one
    proxy.fault = lambda request: Fault("corrupt answer", 0.2) if begins(request) else None
    with pytest.raises(InputError) as caught:
        artifact.fetch(tmp_path / "copy")
    (digest, *_) = block_digests(LARGE)
    assert re.search(
        rf"/large\.bin: bytes 0 to {BLOCK}: blake3 {digest} expected, [0-9a-f]{{64}} found", str(caught.value)
    )
    # with the second block, and then alone
    assert sum(begins(request) for request in proxy.requests) == 2
    assert not (tmp_path / "copy" / "large.bin").exists()
    assert list((tmp_path / "copy").glob(".*")) == []


@pytest.mark.parametrize(
    ("kinds", "fault", "line"),
    [
        ("part", Fault("status", status=503, code="SlowDown"), "S3 answered SlowDown"),
        ("part", Fault("reset"), "the connection to S3 failed"),
        ("complete", Fault("status", status=500), "S3 answered InternalError"),
        ("create", Fault("status", status=503, code="SlowDown"), "S3 answered SlowDown"),
        ("put", Fault("corrupt request"), "S3 answered"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_a_server_that_stays_broken_ends_in_one_line_and_the_next_run_completes(
    proxy, s3_store, monkeypatch, kinds, fault, line
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    storage.forget_client()
    proxy.fault = always(kinds, fault)
    with pytest.raises(StorageFault, match=line) as caught:
        publish(s3_store)
    assert "\n" not in str(caught.value)
    assert find_published(s3_store, "stage", "key") is None
    proxy.fault = lambda request: None
    assert_whole(publish(s3_store))


def test_parts_that_are_there_are_not_sent_again_after_a_fault(proxy, s3_store, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("ZHLLAMA_S3_CONNECTIONS", "1")
    storage.forget_client()
    proxy.fault = lambda r: Fault("reset") if r.kind == "part" and "partNumber=4" in r.target else None
    with pytest.raises(StorageFault):
        publish(s3_store)
    (left,) = storage.unfinished(s3_store)
    assert left.uri.endswith("/large.bin")
    assert left.bytes == 3 * PART
    proxy.fault = lambda request: None
    proxy.forget()
    assert_whole(publish(s3_store))
    sent = [re.search(r"partNumber=(\d+)", r.target)[1] for r in proxy.requests if r.kind == "part"]
    assert sorted(sent) == ["4", "5"]
    assert storage.unfinished(s3_store) == []


def test_parts_of_other_bytes_are_sent_again(proxy, s3_store):
    writer = storage.open_writer(f"{s3_store}/stage/key/large.bin")
    writer.write(LARGE[:PART] + bytes(PART) + b"1")
    writer.suspend()
    assert_whole(publish(s3_store))


@pytest.mark.parametrize("lost", ["complete", "put"])
def test_an_answer_that_is_lost_after_the_work_was_done_is_no_failure(proxy, s3_store, lost):
    """The second try finds the upload gone, or the manifest already there: both are ours."""
    proxy.fault = once(lost, Fault("lost"))
    if lost == "put":
        proxy.fault = once("put", Fault("lost"))
        storage.write_bytes(f"{s3_store}/a", b"mine", if_absent=True)
        assert storage.read_bytes(f"{s3_store}/a") == b"mine"
    assert_whole(publish(s3_store))


def test_what_is_given_up_is_aborted(proxy, s3_store):
    out = ArtifactWriter(s3_store, "stage", "key")

    def cancelled() -> None:
        with out.writer("large.bin") as stream:
            stream.write(LARGE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cancelled()
    assert "abort" in proxy.kinds()
    assert storage.unfinished(s3_store) == []


def test_a_part_that_is_there_is_hashed_once(s3_store, monkeypatch):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    storage.forget_client()
    storage.Upload(f"{s3_store}/a").put(1, LARGE)
    hashed, md5 = [], hashlib.md5
    monkeypatch.setattr(hashlib, "md5", lambda content, **more: hashed.append(len(content)) or md5(content, **more))
    upload = storage.Upload(f"{s3_store}/a")
    upload.put(1, LARGE)
    assert hashed.count(len(LARGE)) == 1
    upload.complete()
    assert storage.read_bytes(f"{s3_store}/a") == LARGE


def test_a_fault_of_a_part_keeps_its_cause_and_an_upload_that_is_gone_is_said(proxy, s3_store, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage.forget_client()
    upload = storage.Upload(f"{s3_store}/a")
    proxy.fault = once("part", Fault("status", status=500, code="InternalError"))
    with pytest.raises(StorageFault) as raised:
        upload.put(1, b"x")
    assert server_code(raised.value) == "InternalError"
    upload.put(1, b"x")
    upload.abort()
    for late in (upload.complete, lambda: upload.put(1, b"x")):
        with pytest.raises(StorageFault, match="the upload is gone: ended by another run, or lost; try again"):
            late()


def test_a_copy_within_s3_is_the_servers_work(proxy, s3_store):
    storage.write_bytes(f"{s3_store}/a", LARGE)
    proxy.forget()
    storage.copy(f"{s3_store}/a", f"{s3_store}/b")
    sent = sum(int(request.headers.get("content-length", 0)) for request in proxy.requests)
    assert sent + proxy.bytes_down < 10_000
    assert storage.read_bytes(f"{s3_store}/b") == LARGE


# --- credentials ------------------------------------------------------------------------------------------------------


def test_credentials_that_expire_in_an_upload_are_read_again(proxy, s3_store, monkeypatch, tmp_path):
    """A rotated file of credentials: the new ones are taken in the middle of the upload, and nothing is lost."""
    file = tmp_path / "credentials"
    right = (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])

    def write(token: str) -> None:
        file.write_text(
            f"[default]\naws_access_key_id = {right[0]}\naws_secret_access_key = {right[1]}\n"
            + (f"aws_session_token = {token}\n" if token else "")
        )

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("ZHLLAMA_S3_CONNECTIONS", "1")
    write("")
    storage.forget_client()
    refused = threading.Event()

    def decide(request: Request) -> Fault | None:
        if "partNumber=3" in request.target and not refused.is_set():
            refused.set()
            return Fault("status", status=400, code="ExpiredToken")
        return None

    proxy.fault = decide
    assert_whole(publish(s3_store))
    assert refused.is_set()
    assert proxy.kinds().count("part") == 6


def test_credentials_that_stay_expired_end_in_one_line_and_new_ones_complete(proxy, s3_store):
    proxy.fault = lambda r: (
        Fault("status", status=400, code="ExpiredToken") if "partNumber=3" in r.target or r.kind == "abort" else None
    )
    with pytest.raises(InputError, match="refuses these credentials"):
        publish(s3_store)
    assert find_published(s3_store, "stage", "key") is None
    proxy.fault = lambda request: None
    assert_whole(publish(s3_store))


def test_no_secret_is_logged_and_no_signature(proxy, s3_store, monkeypatch, caplog):
    proxy.fault = once("part get put list", Fault("status", status=503, code="SlowDown"))
    with caplog.at_level(logging.DEBUG, "storage"), caplog.at_level(logging.DEBUG, "artifact"):
        reference = publish(s3_store)
        open_artifact(reference).verify()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "0" * 40)
    storage.forget_client()
    with pytest.raises(InputError) as caught:
        storage.read_bytes(reference)
    said = caplog.text + str(caught.value)
    for secret in ("Signature=", "X-Amz-Security-Token", os.environ["AWS_ACCESS_KEY_ID"], "0" * 40):
        assert secret not in said


def test_manifests_hold_no_signed_addresses(proxy, s3_store):
    reference = publish(s3_store)
    text = storage.read_bytes(reference).decode()
    assert "X-Amz" not in text
    assert "http" not in text


# --- the server and the client die ------------------------------------------------------------------------------------

PROGRAM = """
import os, sys
from zhllama import storage
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.artifacts.open import open_artifact
from zhllama.storage import multipart
from pipelines.local.s3_server import LocalS3
multipart.PART = 5 * 2**20
from tests.zhllama.storage.test_storage_faults import publish
print(publish(sys.argv[1]), flush=True)
"""


def test_a_killed_writer_leaves_nothing_visible_and_the_next_one_sends_the_rest(proxy, s3_store, monkeypatch):
    monkeypatch.setenv("ZHLLAMA_S3_CONNECTIONS", "1")
    child: list[subprocess.Popen[str]] = []
    started = threading.Event()

    def kill(request: Request) -> Fault | None:
        if "partNumber=4" in request.target:
            started.wait()
            child[0].kill()
            return Fault("reset")
        return None

    proxy.fault = kill
    child.append(subprocess.Popen([sys.executable, "-c", PROGRAM, s3_store], stdout=subprocess.PIPE, text=True))
    started.set()
    assert child[0].wait(120) == -signal.SIGKILL
    assert storage.listing(s3_store) == []
    assert len(storage.unfinished(s3_store)) == 1
    proxy.fault = lambda request: None
    proxy.forget()
    assert_whole(publish(s3_store))
    assert proxy.kinds().count("part") == 2


@pytest.fixture
def own_server(s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LocalS3, FaultyProxy]]:
    """A server that the test may kill, the proxy before it, and the settings of a patient client."""
    with LocalS3(tmp_path / "server", bucket="own") as server, FaultyProxy(server.endpoint) as proxy:
        for name, value in {**server.environment(), "ZHLLAMA_S3_ENDPOINT": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        # 40 tries are minutes: more than a server needs to start on a machine that does other work
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "40")
        monkeypatch.setattr(multipart, "PART", PART)
        storage.forget_client()
        yield server, proxy
    storage.forget_client()


@pytest.mark.parametrize("direction", ["upload", "download"])
def test_a_transfer_goes_on_when_the_server_is_killed_and_started_again(own_server, tmp_path, direction):
    server, proxy = own_server
    before = publish("s3://own/before")
    reached, killed = threading.Event(), threading.Event()
    kind = "part" if direction == "upload" else "get"
    seen = itertools.count(1)

    def decide(request: Request) -> Fault | None:
        # the third one goes to a server that is dead, and so does what else is under way
        if request.kind == kind and "large.bin" in request.target and next(seen) == 3:
            reached.set()
            killed.wait()
        return None

    def transfer() -> None:
        if direction == "upload":
            publish("s3://own/after")
        else:
            open_artifact(before).fetch(tmp_path / "copy")

    with ThreadPoolExecutor(1) as thread:
        proxy.fault = decide
        done = thread.submit(transfer)
        done.add_done_callback(lambda _: reached.set())
        reached.wait()
        kill_and_start(server)
        proxy.upstream = server.endpoint
        killed.set()
        done.result()
    assert_whole(before)
    if direction == "upload":
        assert_whole("s3://own/after/stage/key")
    else:
        assert (tmp_path / "copy" / "large.bin").read_bytes() == LARGE


MEETING = """
import platform, sys
from zhllama.artifacts.writer import ArtifactWriter
store, platform.node, result = sys.argv[1], lambda: sys.argv[2], sys.argv[3]
out = ArtifactWriter(store, "stage", "key")
out.facts["result"] = result
out.add_bytes("a", b"the same")
print(out.publish("files").host)
"""


@pytest.mark.parametrize(("results", "codes"), [(("x", "x"), [0, 0]), (("x", "y"), [0, 1])], ids=["equal", "different"])
def test_of_two_programs_that_meet_at_the_manifest_one_publishes(proxy, s3_store, results, codes):
    both = threading.Barrier(2)

    def meet(request: Request) -> Fault | None:
        if request.kind == "put" and request.target.endswith(MANIFEST):
            assert request.headers["if-none-match"] == "*"
            both.wait(120)
        return None

    proxy.fault = meet
    children = [
        subprocess.Popen(
            [sys.executable, "-c", MEETING, s3_store, host, result],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host, result in zip(("one", "two"), results)
    ]
    said = [child.communicate(timeout=120) for child in children]
    assert sorted(child.returncode for child in children) == codes, said
    # the second may look before the first has set the provenance right that both have written
    assert open_artifact(f"{s3_store}/stage/key").manifest.host in {words.strip() for words, _ in said if words}
    if codes == [0, 1]:
        assert "another run of the same work has published" in max(said, key=lambda words: len(words[1]))[1]


def test_two_programs_that_share_an_upload_do_no_harm(proxy, s3_store):
    """Each may end the other's upload: that one says so, and finds the result when it is started again."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, s3_store], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [child.communicate(timeout=120)[1] for child in children]
    for child, words in zip(children, said):
        assert child.returncode == 0 or "StorageFault" in words.splitlines()[-1]
    if not any(child.returncode == 0 for child in children):
        publish(s3_store)
    assert_whole(f"{s3_store}/stage/key")


def test_two_runs_with_different_results_do_not_both_win(s3_store):
    first, second = (ArtifactWriter(s3_store, "stage", "key") for _ in range(2))
    first.add_bytes("a", b"first")
    second.facts["result"] = "another"
    second.add_bytes("b", b"second")
    first.publish("files")
    with pytest.raises(StorageFault, match="another run of the same work has published"):
        second.publish("files")
    assert open_artifact(first.root).read("a") == b"first"


def test_a_run_stops_before_it_writes_over_what_another_has_published(store):
    slow = ArtifactWriter(store, "stage", "key")
    slow.add_bytes("a", b"slow")
    fast = ArtifactWriter(store, "stage", "key")
    fast.add_bytes("a", b"fast")
    fast.publish("files")
    # as if a second had passed since it looked
    slow._look_at = 1e-9
    with pytest.raises(StorageFault, match="another run of the same work has published it"):
        slow.add_bytes("a", b"slow again")
    assert open_artifact(fast.root).read("a") == b"fast"


@pytest.mark.parametrize("damage", ["a file is gone", "the manifest is no manifest", "a file has other bytes"])
def test_a_damaged_artifact_is_replaced_by_the_work_done_again(store, damage):
    first = ArtifactWriter(store, "stage", "key")
    first.add_bytes("a", b"first")
    first.add_bytes("old", b"old")
    manifest = first.publish("files")
    if damage == "a file is gone":
        storage.delete(f"{first.root}/old")
    elif damage == "the manifest is no manifest":
        storage.write_bytes(manifest.reference, b"{")
    else:
        storage.write_bytes(f"{first.root}/old", b"odd")
    again = ArtifactWriter(store, "stage", "key")
    again.add_bytes("a", b"second")
    again.publish("files")
    assert open_artifact(again.root).read("a") == b"second"
    assert "old" not in open_artifact(again.root)


# --- disk full at the reader ------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_without_room_is_refused_before_anything_is_moved(proxy, s3_store, small_disk):
    artifact = open_artifact(publish(s3_store))
    proxy.forget()
    with pytest.raises(OSError, match="No space left") as caught:
        artifact.fetch(small_disk / "copy")
    assert caught.value.errno == errno.ENOSPC
    assert proxy.requests == []


def test_a_disk_that_fills_while_it_is_written_leaves_no_part_of_a_file(proxy, s3_store, small_disk, monkeypatch):
    artifact = open_artifact(publish(s3_store))
    monkeypatch.setattr(storage, "check_room", lambda folder, size: None)
    with pytest.raises(OSError, match="No space left"):
        artifact.fetch(small_disk / "copy", ["large.bin"])
    assert [path for path in small_disk.rglob("*") if path.is_file()] == []
    artifact.fetch(small_disk / "copy", ["small.bin"])


# --- ranges -----------------------------------------------------------------------------------------------------------


def test_one_tensor_of_a_model_moves_its_bytes_and_the_header_and_no_more(proxy, s3_store):
    """A plain prefix moves the bytes alone; of an artifact, the blocks of 8 MiB that they lie in, to verify them."""
    torch = pytest.importorskip("torch")
    from zhllama.weights.safetensors_io import Checkpoint, SafetensorsStream

    shapes = {f"layer.{number}": ("uint8", (4, 2**20)) for number in range(10)}
    out = ArtifactWriter(s3_store, "stage", "key")
    with out.writer("model.safetensors") as sink:
        stream = SafetensorsStream(sink, shapes)
        for number, name in enumerate(shapes):
            stream.write(name, torch.full((4, 2**20), number, dtype=torch.uint8))
        stream.close()
    reference = out.publish("hf-model").reference
    for place, most in ((reference, 3 * BLOCK), ("plain", 4 * 2**20 + 4096)):
        if place == "plain":
            storage.copy(f"{out.root}/model.safetensors", f"{s3_store}/plain/model.safetensors")
        checkpoint = Checkpoint(open_artifact(reference if place == reference else f"{s3_store}/plain"))
        proxy.forget()
        assert bool((checkpoint.read("layer.5") == 5).all())
        assert 4 * 2**20 <= proxy.bytes_down <= most
