"""Storage: the same behaviour in a folder and in S3, and one clear line when the server or the account is wrong."""

import errno
import fcntl
import http.server
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zhllama import storage
from zhllama.errors import InputError, StorageFault
from zhllama.storage import folders
from zhllama.storage.s3_session import current_session

# --- both kinds of store ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 5000, storage.PART - 1, storage.PART, storage.PART + 1, 2 * storage.PART + 5])
def test_a_stream_arrives_whole_and_only_at_commit(store, size):
    content = os.urandom(min(size, 4096)) * (size // 4096 + 1)
    content = content[:size]
    uri = f"{store}/folder/stream.bin"
    writer = storage.open_writer(uri)
    for start in range(0, size, 1_234_567):
        writer.write(memoryview(content)[start : start + 1_234_567])
    assert not storage.exists(uri)
    writer.commit()
    assert storage.size_of(uri) == size
    assert storage.read_bytes(uri) == content


@pytest.mark.parametrize("refused", ["never", "when it is asked for", "when it is used"])
def test_a_stream_into_a_folder_is_the_same_where_the_file_system_cannot_go_past_the_cache(
    tmp_path, monkeypatch, refused
):
    def no_direct(file: int, command: int, flags: int = 0) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return fcntl.fcntl(file, command, flags)

    def no_direct_write(file: int, data: memoryview) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.write(file, data[: 2**20 + 1])

    if refused == "when it is asked for":
        monkeypatch.setattr(folders, "fcntl", SimpleNamespace(**vars(fcntl) | {"fcntl": no_direct}))
    if refused == "when it is used":
        monkeypatch.setattr(folders, "os", SimpleNamespace(**vars(os) | {"write": no_direct_write}))
    content = random.Random(0).randbytes(20 * 2**20 + 5)
    writer = storage.open_writer(f"{tmp_path}/stream.bin")
    for start in range(0, len(content), 3_000_001):
        writer.write(memoryview(content)[start : start + 3_000_001])
    writer.commit()
    assert Path(tmp_path, "stream.bin").read_bytes() == content


@pytest.mark.parametrize("size", [10, storage.PART * 2])
def test_an_aborted_stream_leaves_nothing(store, size):
    writer = storage.open_writer(f"{store}/a.bin")
    writer.write(b"x" * size)
    writer.abort()
    assert storage.listing(store) == []


def test_an_aborted_upload_leaves_no_parts_behind(s3_store):
    writer = storage.open_writer(f"{s3_store}/a.bin")
    writer.write(b"x" * (storage.PART * 2))
    bucket, key = storage.split_s3(f"{s3_store}/a.bin")
    uploads = current_session().client.list_multipart_uploads(Bucket=bucket, Prefix=key)
    assert len(uploads["Uploads"]) == 1
    writer.abort()
    assert not current_session().client.list_multipart_uploads(Bucket=bucket, Prefix=key).get("Uploads")


@pytest.mark.parametrize(("start", "length"), [(0, 10), (3, 4), (9, 1), (5, None), (0, None), (4, 0), (0, 0)])
def test_a_range_is_what_a_slice_would_be(store, start, length):
    storage.write_bytes(f"{store}/a", b"0123456789")
    wanted = b"0123456789"[start:] if length is None else b"0123456789"[start : start + length]
    assert storage.read_bytes(f"{store}/a", start, length) == wanted


def test_reading_past_the_end_is_a_fault_that_says_truncated(store):
    storage.write_bytes(f"{store}/a", b"0123456789")
    with pytest.raises(StorageFault, match=r"/a: 4 bytes at 6 where 10 were expected"):
        storage.read_bytes(f"{store}/a", 6, 10)


def test_an_absent_file_is_FileNotFoundError_everywhere(store):
    for ask in (storage.read_bytes, storage.size_of):
        with pytest.raises(FileNotFoundError):
            ask(f"{store}/nowhere")
    assert not storage.exists(f"{store}/nowhere")
    assert storage.listing(f"{store}/nowhere") == []
    storage.delete(f"{store}/nowhere")


def test_the_second_of_two_exclusive_writers_loses(store):
    storage.write_bytes(f"{store}/manifest.json", b"first", if_absent=True)
    with pytest.raises(FileExistsError):
        storage.write_bytes(f"{store}/manifest.json", b"second", if_absent=True)
    assert storage.read_bytes(f"{store}/manifest.json") == b"first"


def test_a_write_without_condition_replaces(store):
    storage.write_bytes(f"{store}/a", b"first")
    storage.write_bytes(f"{store}/a", b"second")
    assert storage.read_bytes(f"{store}/a") == b"second"
    assert [item.name for item in storage.listing(store)] == ["a"]


def test_a_listing_is_sorted_whole_and_without_hidden_files(store):
    names = ["b.txt", "a.txt", "a/z.txt", "a/b/c.txt", "中文.txt", "a b+c%20.txt"]
    for name in (*names, ".hidden", ".git/config", "a/.tmp"):
        storage.write_bytes(f"{store}/{name}", name.encode())
    found = storage.listing(store)
    assert [item.name for item in found] == sorted(names)
    assert [item.size for item in found] == [len(name.encode()) for name in sorted(names)]
    assert storage.read_bytes(storage.join(store, "a b+c%20.txt")) == b"a b+c%20.txt"


def test_a_prefix_is_a_folder_and_not_the_beginning_of_a_name(store):
    storage.write_bytes(f"{store}/model/a", b"1")
    storage.write_bytes(f"{store}/model-2/a", b"2")
    assert [item.name for item in storage.listing(f"{store}/model")] == ["a"]


@pytest.mark.slow
def test_a_listing_goes_beyond_one_page(s3_store):
    for number in range(1010):
        storage.write_bytes(f"{s3_store}/{number:04}", b"")
    assert [item.name for item in storage.listing(s3_store)] == [f"{number:04}" for number in range(1010)]


def test_deleting_a_prefix_leaves_nothing_not_even_hidden_files(store):
    for name in ("a", "b/c", ".hidden", "b/.hidden"):
        storage.write_bytes(f"{store}/{name}", b"1")
    storage.write_bytes(f"{store}-beside/a", b"1")
    storage.delete_all(store)
    for name in ("a", "b/c", ".hidden", "b/.hidden"):
        assert not storage.exists(f"{store}/{name}")
    assert storage.exists(f"{store}-beside/a")


@pytest.fixture(params=["folder to folder", "folder to s3", "s3 to folder", "s3 to s3"])
def two_stores(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    source, target = request.param.split(" to ")
    s3 = request.getfixturevalue("s3_store") if "s3" in request.param else ""
    folder = str(tmp_path / "store")
    return (f"{s3}/source" if source == "s3" else f"{folder}/source"), (
        f"{s3}/target" if target == "s3" else f"{folder}/target"
    )


def test_a_copy_is_equal_wherever_it_goes(two_stores):
    source, target = two_stores
    content = os.urandom(1000) * 17_000
    storage.write_bytes(f"{source}/a.bin", content)
    storage.copy(f"{source}/a.bin", f"{target}/b/c.bin")
    assert storage.read_bytes(f"{target}/b/c.bin") == content


def test_a_copy_of_what_is_not_there_leaves_nothing(two_stores):
    source, target = two_stores
    with pytest.raises(FileNotFoundError):
        storage.copy(f"{source}/a.bin", f"{target}/b.bin")
    assert storage.listing(target) == []


def test_a_file_is_read_in_chunks(store):
    storage.write_bytes(f"{store}/a", b"0123456789")
    assert list(storage.read_chunks(f"{store}/a", 4)) == [b"0123", b"4567", b"89"]


def test_a_writable_store_passes_the_check_and_keeps_no_trace(store):
    storage.check_writable(store)
    storage.write_bytes(f"{store}/a", b"1")
    storage.delete(f"{store}/a")
    assert storage.listing(store) == []


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://my.bucket-1/a/b/", "s3://my.bucket-1/a/b"),
        ("/a/b/", "/a/b"),
        ("file:///a/b", "/a/b"),
        ("/a/../b", "/b"),
    ],
)
def test_addresses_have_one_spelling(given, wanted):
    assert storage.normalise(given) == wanted


def test_relative_addresses_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.normalise("a/b") == str(tmp_path / "a" / "b")


@pytest.mark.parametrize("given", ["", "s3://", "s3:///a", "s3://B/a", "s3://a_b/c", "http://host/a", "gs://bucket/a"])
def test_wrong_addresses_are_refused_with_the_right_form(given):
    with pytest.raises(InputError, match=r"s3://bucket/prefix"):
        storage.normalise(given)


@given(st.text(max_size=30))
@settings(max_examples=300, deadline=None)
def test_no_name_leads_out_of_its_folder(name):
    try:
        joined = storage.join("/root/folder", name)
    except InputError:
        return
    assert os.path.commonpath([os.path.abspath(joined), "/root/folder"]) == "/root/folder"
    assert joined != "/root/folder"


# --- what can be wrong ------------------------------------------------------------------------------------------------


@pytest.fixture
def closed_port() -> int:
    """A port where nobody answers."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def answering() -> Iterator[Callable[..., str]]:
    """Starts a web server that gives every request one answer (status, body), or the last of several; its address."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(status: int, *bodies: str) -> str:
        left = list(bodies)

        class Answer(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = left.pop(0) if len(left) > 1 else left[0]
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body.encode())

            do_GET = do_HEAD = do_DELETE = do_PUT = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def check(store: str) -> str:
    """The one line with which `store` is refused."""
    storage.forget_client()
    with pytest.raises(InputError) as caught:
        storage.check_writable(store)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_wrong_secret_is_named_as_such(s3_store, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "0" * 40)
    line = check(s3_store)
    assert "refuses these credentials (SignatureDoesNotMatch" in line
    assert "AWS_SECRET_ACCESS_KEY" in line


def test_an_unknown_key_is_named_as_such(s3_store, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert "refuses these credentials (InvalidAccessKeyId" in check(s3_store)


def test_wrong_credentials_are_no_absent_file(s3_store, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "0" * 40)
    storage.forget_client()
    for ask in (storage.read_bytes, storage.exists, storage.listing):
        with pytest.raises(InputError, match="refuses these credentials"):
            ask(f"{s3_store}/a")


def test_no_credentials_at_all(s3_store, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert "no S3 credentials" in check(s3_store)


def test_an_unknown_profile(s3_store, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "nobody" in check(s3_store)


def test_a_missing_bucket_is_named(s3_store):
    assert check("s3://no-such-bucket/a").startswith("s3://no-such-bucket/a: there is no bucket no-such-bucket")
    for ask in (storage.read_bytes, storage.listing):
        with pytest.raises(InputError, match="there is no bucket no-such-bucket"):
            ask("s3://no-such-bucket/a")


def test_an_endpoint_where_nobody_answers(s3_store, monkeypatch, closed_port):
    monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", f"http://127.0.0.1:{closed_port}")
    assert f"no S3 server answers at http://127.0.0.1:{closed_port}" in check(s3_store)


def test_an_endpoint_that_is_no_S3_server(s3_store, monkeypatch, answering):
    monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", answering(405, "<html>Method Not Allowed</html>"))
    assert check(s3_store).startswith(s3_store)


@pytest.mark.parametrize(
    ("status", "code", "kind", "line"),
    [
        (403, "AccessDenied", InputError, "refuses these credentials (AccessDenied: so it is)"),
        (400, "ExpiredToken", InputError, "refuses these credentials (ExpiredToken: so it is)"),
        (404, "NoSuchBucket", InputError, "there is no bucket tests"),
        (404, "NoSuchKey", FileNotFoundError, "/a"),
        (400, "AuthorizationHeaderMalformed", InputError, "set AWS_DEFAULT_REGION"),
        (400, "EntityTooLarge", InputError, "S3 refuses this request (EntityTooLarge: so it is)"),
        (503, "SlowDown", StorageFault, "S3 answered SlowDown"),
    ],
)
def test_what_the_server_says_becomes_the_right_kind_of_error(
    s3_store, monkeypatch, answering, status, code, kind, line
):
    body = f"<Error><Code>{code}</Code><Message>so it is</Message></Error>"
    monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", answering(status, body))
    storage.forget_client()
    with pytest.raises(kind) as caught:
        storage.write_bytes(f"{s3_store}/a", b"1")
    assert line in str(caught.value)


NO_NUMBER = "<ListBucketResult><MaxKeys>1 000</MaxKeys></ListBucketResult>"
NO_DATE = (
    "<ListBucketResult><Contents><Key>a</Key><LastModified>2026=11-25</LastModified></Contents></ListBucketResult>"
)
NO_XML = "<ListBucketResult><MaxKeys>1"


@pytest.mark.parametrize("body", [NO_NUMBER, NO_DATE, NO_XML], ids=["number", "date", "XML"])
def test_an_answer_that_cannot_be_read_is_a_fault_in_one_line(s3_store, monkeypatch, answering, body):
    monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", answering(200, body))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    storage.forget_client()
    with pytest.raises(StorageFault, match="try again"):
        storage.listing(s3_store)


def test_an_answer_that_cannot_be_read_is_asked_for_again(s3_store, monkeypatch, answering):
    whole = "<ListBucketResult><Contents><Key>a/b</Key><Size>3</Size><ETag>1</ETag><LastModified>2026-11-25T20:49:14Z"
    whole += "</LastModified></Contents></ListBucketResult>"
    monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", answering(200, NO_DATE, whole))
    storage.forget_client()
    assert [item.name for item in storage.listing("s3://tests/a")] == ["b"]


def test_an_error_whose_encoding_is_garbled_is_understood(s3_store, monkeypatch, answering):
    said = '<?xml version="1.0" encoding="UTV-8"?><Error><Code>NoSuchKey</Code></Error>'
    monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", answering(404, said))
    storage.forget_client()
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{s3_store}/a")


@pytest.mark.parametrize("endpoint", ["localhost:9000", "nonsense", "http://", "http://[::1"])
def test_an_endpoint_that_is_no_address(s3_store, monkeypatch, endpoint):
    monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", endpoint)
    line = check(s3_store)
    assert f"ZHLLAMA_S3_ENDPOINT={endpoint}" in line
    assert "http://host:port" in line


def test_our_endpoint_wins_over_the_one_that_KFP_uses(s3_store, monkeypatch, closed_port):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{closed_port}")
    storage.forget_client()
    storage.check_writable(s3_store)


def test_the_standard_endpoint_is_used_when_ours_is_not_set(s3_store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", os.environ["ZHLLAMA_S3_ENDPOINT"])
    monkeypatch.delenv("ZHLLAMA_S3_ENDPOINT")
    storage.forget_client()
    storage.check_writable(s3_store)


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "choose another --store" in check(str(tmp_path / "file" / "store"))


def test_a_write_that_fails_leaves_no_half_file(tmp_path):
    """A limit on the size of files stands in for a full disk: the same place fails, with another number."""
    program = (
        "import resource, sys\n"
        "from zhllama import storage\n"
        "from zhllama.artifacts.writer import ArtifactWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "out = ArtifactWriter(sys.argv[1], 'stage', 'key')\n"
        "try:\n"
        "    out.add_bytes('small', b'x' * 10_001)\n"
        "except OSError as error:\n"
        "    print(error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "27"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_forked_child_has_a_client_of_its_own(s3_store):
    # in a program of its own: this one has threads, and what they hold when it forks stays held in the child
    program = """
import multiprocessing, sys
from zhllama import storage

address = sys.argv[1]
storage.write_bytes(address, b"1")
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(storage.read_bytes, [address] * 8))
print(storage.read_bytes(address))
"""
    command = [sys.executable, "-c", program, f"{s3_store}/a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [str([b"1"] * 8), str(b"1")], done.stderr


def test_what_a_killed_writer_left_is_listed_and_freed(s3_store):
    writer = storage.open_writer(f"{s3_store}/a/b.bin")
    writer.write(bytes(storage.PART + 1))
    writer.suspend()
    # the part is on its way
    while (left := storage.unfinished(s3_store)[0]).bytes < storage.PART:
        continue
    assert left.uri == f"{s3_store}/a/b.bin"
    assert abs(datetime.now(UTC) - left.began) < timedelta(minutes=5)
    assert storage.listing(s3_store) == []
    storage.discard(left.uri, left.id)
    storage.discard(left.uri, left.id)
    assert storage.unfinished(s3_store) == []


def test_a_listing_says_when_files_were_written(store):
    storage.write_bytes(f"{store}/a", b"1")
    storage.write_bytes(f"{store}/.hidden", b"1")
    (item,) = storage.listing(store)
    assert timedelta(minutes=-1) < datetime.now(UTC) - item.modified < timedelta(minutes=5)
    assert [item.name for item in storage.listing(store, hidden=True)] == [".hidden", "a"]


def test_many_files_are_deleted_at_once(store):
    for number in range(20):
        storage.write_bytes(f"{store}/{number}", b"1")
    storage.in_parallel(storage.delete, [f"{store}/{number}" for number in range(25)])
    assert storage.listing(store) == []
