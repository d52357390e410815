"""Moving bytes between S3 and this machine: 1 GB beside boto3's transfers, 10,000 small files beside `aws s3 cp`.

Two servers: SeaweedFS, and a plain one that only sends a file's ranges and takes what comes, which shows the client
where SeaweedFS is what limits (an upload costs it 8 CPU-seconds per GB, mostly MD5). Processor time is the client's;
SeaweedFS's own stands beside it, since both have to share two cores.
"""

import http.server
import io
import mmap
import os
import random
import resource
import shutil
import socket
import socketserver
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.local.s3_server import LocalS3
from tests.bench.measure import Cost, Table, measured, side_by_side
from tests.bench.measure import run as run_program
from tests.folders import add_folder
from zhllama import storage
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter

SIZE = 1_000_000_000
SMALL_FILES = 10_000
SMALL_BYTES = 4096


def run(scratch: Path) -> list[Table]:
    place = _memory_disk(scratch)
    try:
        material = place / "material"
        material.mkdir()
        chance = random.Random(1)
        with open(material / "large.bin", "wb") as file:
            for _ in range(0, SIZE, 10_000_000):
                file.write(chance.randbytes(10_000_000))
        with LocalS3(place / "server", bucket="bench") as server:
            environment = server.environment()
            assert server._server is not None
            return [_large(place, environment, server._server.pid, scratch), _small(place, environment, scratch)]
    finally:
        if place != scratch:
            shutil.rmtree(place)


def _memory_disk(scratch: Path) -> Path:
    """A folder in memory where there is room, so that no disk is measured."""
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free > 8 * SIZE:
        place = shared / f"zhllama-bench-{os.getpid()}"
        place.mkdir()
        return place
    return scratch


# --- 1 GB -------------------------------------------------------------------------------------------------------------


def _large(place: Path, environment: dict[str, str], server: int, disk: Path) -> Table:
    source, target, on_disk = str(place / "material" / "large.bin"), str(place / "copy"), str(disk / "copy")
    reference = measured(publish, "s3://bench/large", source, environment=environment).result["reference"]
    key = reference.removeprefix("s3://bench/").replace("manifest.json", "large.bin")
    table = Table(
        "1 GB between S3 and this machine",
        (
            "what",
            "GB/s",
            "boto3",
            "ratio",
            "CPU-s per GB",
            "boto3",
            "ratio",
            "peak MB",
            "boto3",
            "SeaweedFS's CPU-s per GB",
            "boto3",
        ),
        note="Bars of the issue: twice boto3's speed at half its processor time, checksums on (BLAKE3 of every 8 MiB "
        "block when reading, CRC32C of every part when writing; an artifact's SHA-256 on top).",
    )
    copied = measured(socket_copy)
    table.rows.append(
        ("a plain socket copy on loopback, both ends", f"{SIZE / 1e9 / copied.wall:.2f}", "", "",
         f"{copied.result['cpu']:.2f}", "", "", "", "", "", "")
    )  # fmt: skip

    def row(what: str, ours: tuple[Any, ...], peer: tuple[Any, ...], environment: dict[str, str]) -> None:
        served: tuple[list[float], list[float]] = ([], [])

        def cost(call: tuple[Any, ...], of_server: list[float]) -> Cost:
            before = _used_by(server)
            made = measured(*call, environment=environment)
            of_server.append(_used_by(server) - before)
            for copied in (target, on_disk):
                Path(copied).unlink(missing_ok=True)
            return Cost(made.wall, made.result["cpu"], made.peak_mb)

        a, b = side_by_side(lambda: cost(ours, served[0]), lambda: cost(peer, served[1]))
        gigabytes = SIZE / 1e9
        servers = ("", "") if "plain" in what else tuple(f"{statistics.median(s) / gigabytes:.2f}" for s in served)
        table.rows.append((
            what, f"{gigabytes / a.wall:.2f}", f"{gigabytes / b.wall:.2f}", f"{b.wall / a.wall:.1f}",
            f"{a.cpu / gigabytes:.2f}", f"{b.cpu / gigabytes:.2f}", f"{a.cpu / b.cpu:.2f}",
            f"{a.peak_mb:.0f}", f"{b.peak_mb:.0f}", *servers,
        ))  # fmt: skip

    row("download to memory", (read_to_memory, reference), (boto3_to_memory, key), environment)
    row("download to a file", (read_to_file, reference, target), (boto3_to_file, key, target), environment)
    row("download to a file on a disk", (read_to_file, reference, on_disk), (boto3_to_file, key, on_disk), environment)
    row("upload", (send, source, "s3://bench/sent/a"), (boto3_send, source, "sent/b"), environment)
    row("upload as an artifact", (publish, "s3://bench/x", source), (boto3_send, source, "sent/b"), environment)
    with _plain_server(source) as endpoint:
        plain = {**environment, "ZHLLAMA_S3_ENDPOINT": endpoint}
        row("plain server: download to memory", (read_plain, "s3://bench/x/a"), (boto3_to_memory, "a"), plain)
        row("plain server: upload", (send, source, "s3://bench/sent/a"), (boto3_send, source, "sent/b"), plain)
    return table


def _used_by(process: int) -> float:
    """Processor seconds of a process so far, in user and in kernel mode."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _timed(work: Callable[[], Any]) -> dict[str, Any]:
    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    began, before = time.perf_counter(), used()
    made = work()
    return {"seconds": time.perf_counter() - began, "cpu": used() - before, **(made if isinstance(made, dict) else {})}


def publish(store: str, path: str) -> dict[str, Any]:
    out = ArtifactWriter(store, "bench", f"{time.time_ns()}")
    storage.exists(f"{out.root}/large.bin")

    def work() -> dict[str, Any]:
        out.add_file("large.bin", Path(path))
        return {"reference": out.publish("files").reference}

    return _timed(work)


def read_to_memory(reference: str) -> dict[str, Any]:
    artifact, room = open_artifact(reference), memoryview(bytearray(SIZE))
    return _timed(lambda: artifact.read_into("large.bin", 0, room))


def read_plain(uri: str) -> dict[str, Any]:
    room = memoryview(bytearray(SIZE))
    storage.size_of(uri)
    return _timed(lambda: storage.read_into(uri, 0, room))


def read_to_file(reference: str, target: str) -> dict[str, Any]:
    artifact = open_artifact(reference)

    def work() -> None:
        artifact.fetch(Path(target).parent / "fetched")

    timed = _timed(work)
    shutil.rmtree(Path(target).parent / "fetched")
    return timed


def send(path: str, uri: str) -> dict[str, Any]:
    storage.exists(uri)
    timed = _timed(lambda: storage.copy(path, uri))
    storage.delete(uri)
    return timed


def _boto3() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3", endpoint_url=os.environ["ZHLLAMA_S3_ENDPOINT"], config=Config(s3={"addressing_style": "path"})
    )


class Room(io.RawIOBase):
    """Memory that is there, as a file: fresh memory costs both ways the same, as much as reading does."""

    def __init__(self) -> None:
        self._room, self._at = memoryview(bytearray(SIZE)), 0

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        self._room[self._at : self._at + len(data)] = data
        self._at += len(data)
        return len(data)


def boto3_to_memory(key: str) -> dict[str, Any]:
    client, room = _boto3(), Room()
    return _timed(lambda: client.download_fileobj("bench", key, room))


def boto3_to_file(key: str, target: str) -> dict[str, Any]:
    client = _boto3()
    return _timed(lambda: client.download_file("bench", key, target))


def boto3_send(path: str, key: str) -> dict[str, Any]:
    client = _boto3()
    timed = _timed(lambda: client.upload_file(path, "bench", key))
    client.delete_object(Bucket="bench", Key=key)
    return timed


def socket_copy() -> dict[str, Any]:
    """1 GB through a loopback connection, from one buffer into another, 256 KiB at a time."""
    content, room = memoryview(bytearray(2**18)), memoryview(bytearray(2**18))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def give() -> None:
            with socket.create_connection(listener.getsockname()) as sender:
                for at in range(0, SIZE, len(content)):
                    sender.sendall(content[: min(len(content), SIZE - at)])

        def work() -> None:
            thread = threading.Thread(target=give)
            thread.start()
            with listener.accept()[0] as receiver:
                while receiver.recv_into(room):
                    pass
            thread.join()

        return _timed(work)


# --- a server that does nothing but move bytes ------------------------------------------------------------------------


class PlainServer(http.server.BaseHTTPRequestHandler):
    """Every object is the one file; what is put is received and forgotten."""

    protocol_version = "HTTP/1.1"
    file: mmap.mmap

    def do_HEAD(self) -> None:
        self._answer(200, {"Content-Length": str(len(self.file)), "ETag": '"1"'})

    def do_GET(self) -> None:
        if "uploads" in self.path:
            self._answer(200, {}, b"<ListMultipartUploadsResult></ListMultipartUploadsResult>")
            return
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        start, end = int(first), min(int(last or len(self.file) - 1), len(self.file) - 1) + 1
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(self.file)}", "ETag": '"1"'}
        self._answer(206, headers, memoryview(self.file)[start:end])

    def do_PUT(self) -> None:
        room = memoryview(bytearray(2**18))
        left = int(self.headers["Content-Length"])
        while left:
            left -= self.rfile.readinto(room[: min(left, len(room))])  # type: ignore[attr-defined]
        self._answer(200, {"ETag": f'"{"0" * 32}"'})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = "CompleteMultipartUploadResult" if "uploadId" in self.path else "InitiateMultipartUploadResult"
        self._answer(200, {}, f"<{name}><UploadId>1</UploadId><ETag>1</ETag></{name}>".encode())

    def do_DELETE(self) -> None:
        self._answer(204, {})

    def _answer(self, status: int, headers: dict[str, str], body: bytes | memoryview = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Threaded(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


def serve(path: str) -> None:
    with open(path, "rb") as file:
        PlainServer.file = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    server = _Threaded(("127.0.0.1", 0), PlainServer)
    print(server.server_port, flush=True)
    server.serve_forever()


@contextmanager
def _plain_server(path: str) -> Iterator[str]:
    program = f"from tests.bench.storage import serve; serve({path!r})"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield f"http://127.0.0.1:{child.stdout.readline().strip()}"
    finally:
        child.kill()
        child.wait()


# --- small files ------------------------------------------------------------------------------------------------------


def _small(place: Path, environment: dict[str, str], scratch: Path) -> Table:
    table = Table(
        f"{SMALL_FILES:,} files of {SMALL_BYTES} bytes",
        ("what", "seconds", "aws s3 cp --recursive", "ratio", "CPU seconds", "aws"),
        note="Bar of the issue: three times the speed of `aws s3 cp --recursive`.",
    )
    folder = place / "small"
    for number in range(SMALL_FILES):
        path = folder / f"{number % 100:02}" / f"{number:05}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(number.to_bytes(8, "little") * (SMALL_BYTES // 8))
    aws = _aws(scratch)
    up = measured(publish_folder, str(folder), "s3://bench/small", environment=environment)
    down = measured(fetch_folder, up.result["reference"], str(place / "small-copy"), environment=environment)
    aws_up = aws_down = None
    if aws is not None:
        settings = {
            **environment,
            "AWS_ENDPOINT_URL_S3": environment["ZHLLAMA_S3_ENDPOINT"],
            "AWS_CONFIG_FILE": str(place / "aws.config"),
        }
        (place / "aws.config").write_text("[default]\ns3 =\n  addressing_style = path\n")
        command = [aws, "s3", "cp", "--recursive", "--quiet"]
        aws_up = run_program([*command, str(folder), "s3://bench/aws-small"], settings)
        aws_down = run_program([*command, "s3://bench/aws-small", str(place / "aws-copy")], settings)
    for what, ours, peer in (("upload", up, aws_up), ("download", down, aws_down)):
        theirs = ("no aws here", "", "") if peer is None else (f"{peer.wall:.1f}", f"{peer.wall / ours.wall:.1f}")
        table.rows.append((
            what, f"{ours.wall:.1f}", theirs[0], theirs[1], f"{ours.result['cpu']:.1f}",
            "" if peer is None else f"{peer.cpu:.1f}",
        ))  # fmt: skip
    return table


def _aws(scratch: Path) -> str | None:
    """The AWS command line: on the PATH, or from pip into an environment of its own; None where neither works."""
    found = shutil.which("aws")
    if found:
        return found
    place = scratch / "aws"
    made = subprocess.run([sys.executable, "-m", "venv", str(place)], capture_output=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "-q", "awscli"]
    if made.returncode or subprocess.run(pip, capture_output=True).returncode:
        return None
    return str(place / "bin" / "aws")


def publish_folder(folder: str, store: str) -> dict[str, Any]:
    out = ArtifactWriter(store, "bench", "small")
    storage.exists(f"{out.root}/nothing")

    def work() -> dict[str, Any]:
        add_folder(out, Path(folder))
        return {"reference": out.publish("files").reference}

    return _timed(work)


def fetch_folder(reference: str, target: str) -> dict[str, Any]:
    artifact = open_artifact(reference)

    def work() -> None:
        artifact.fetch(Path(target))

    return _timed(work)
