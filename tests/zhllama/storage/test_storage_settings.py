"""The standard AWS settings hold for boto3's calls and for the requests of our own alike, as a proxy sees them."""

import http.server
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faulty_proxy import Fault, FaultyProxy, Request
from zhllama import storage
from zhllama.errors import InputError, StorageFault
from zhllama.storage.parallel import connections, patience


@pytest.fixture
def proxy(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy before the server, named by the standard setting alone."""
    with FaultyProxy(os.environ["ZHLLAMA_S3_ENDPOINT"]) as proxy:
        monkeypatch.delenv("ZHLLAMA_S3_ENDPOINT")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        storage.forget_client()
        yield proxy


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty AWS configuration file."""
    path = tmp_path / "config"
    path.write_text("")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(path))
    return path


def every_kind_of_call(store: str) -> None:
    storage.write_bytes(f"{store}/a", b"one")
    assert storage.read_bytes(f"{store}/a", 1, 2) == b"ne"
    assert storage.size_of(f"{store}/a") == 3
    assert [item.name for item in storage.listing(store)] == ["a"]


def test_a_profile_has_credentials_region_and_endpoint(proxy, s3_store, monkeypatch, config):
    config.write_text(
        f"[profile lab]\nregion = eu-lab-1\naws_access_key_id = {os.environ['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {os.environ['AWS_SECRET_ACCESS_KEY']}\n"
        f"services = lab\n[services lab]\ns3 =\n  endpoint_url = {proxy.endpoint}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    storage.forget_client()
    every_kind_of_call(s3_store)
    assert len(proxy.requests) == 4
    assert all("/eu-lab-1/s3/aws4_request" in request.headers["authorization"] for request in proxy.requests)


def test_a_region_stands_in_every_signature(proxy, s3_store, monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "ap-test-2")
    storage.forget_client()
    every_kind_of_call(s3_store)
    assert all("/ap-test-2/s3/aws4_request" in request.headers["authorization"] for request in proxy.requests)


@pytest.mark.parametrize("style", ["path", "virtual"])
@pytest.mark.parametrize("setting", ["AWS_ENDPOINT_URL_S3", "ZHLLAMA_S3_ENDPOINT"])
def test_the_style_of_addresses_is_the_configured_one(proxy, s3_store, monkeypatch, config, style, setting):
    """Host style needs a name for every bucket: tests.localhost is made to be this machine."""
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **named: look_up("127.0.0.1", *more, **named))
    config.write_text(f"[default]\ns3 =\n  addressing_style = {style}\n")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv(setting, proxy.endpoint.replace("127.0.0.1", "localhost"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage.forget_client()
    proxy.fault = lambda request: Fault("status", status=404, code="NoSuchKey")
    for ask in (storage.read_bytes, storage.size_of):
        with pytest.raises(FileNotFoundError):
            ask(f"{s3_store}/a")
    hosts = {request.headers["host"].partition(":")[0] for request in proxy.requests}
    assert hosts == {"localhost" if style == "path" else "tests.localhost"}
    assert all(request.target.startswith("/tests/") == (style == "path") for request in proxy.requests)


def test_our_own_endpoint_is_asked_by_path_unless_configured(proxy, s3_store, monkeypatch, config):
    monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", proxy.endpoint.replace("127.0.0.1", "localhost"))
    storage.forget_client()
    every_kind_of_call(s3_store)
    assert all(request.target.startswith("/tests") for request in proxy.requests)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 that signs itself, and its key, in one file."""
    path = tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", str(tmp_path / "cert")]
    subprocess.run(command, check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + (tmp_path / "cert").read_bytes())
    return path


def test_a_private_certificate_needs_its_CA_bundle_and_works_with_it(s3_store, monkeypatch, certificate):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with FaultyProxy(os.environ["ZHLLAMA_S3_ENDPOINT"], tls) as proxy:
        monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", proxy.endpoint)
        storage.forget_client()
        for ask in (storage.read_bytes, storage.size_of):
            with pytest.raises(InputError, match="AWS_CA_BUNDLE"):
                ask(f"{s3_store}/a")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        storage.forget_client()
        every_kind_of_call(s3_store)


def test_a_web_identity_is_exchanged_for_credentials_that_sign(proxy, s3_store, monkeypatch, tmp_path):
    """As a pod's service account does: a token in a file, a role, and an STS that hands out keys for them."""
    asked: list[str] = []

    class Sts(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            keys = "<AccessKeyId>ASSUMED</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>temporary"
            body = (
                f"<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>{keys}</SessionToken>"
                "<Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleWithWebIdentityResult>"
                "</AssumeRoleWithWebIdentityResponse>"
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    sts = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sts)
    threading.Thread(target=sts.serve_forever, args=(0.05,), daemon=True).start()
    (tmp_path / "token").write_text("a-pods-token")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/training")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{sts.server_port}")
    storage.forget_client()
    proxy.fault = lambda request: Fault("status", status=404, code="NoSuchKey")
    try:
        for ask in (storage.read_bytes, storage.size_of):
            with pytest.raises(FileNotFoundError):
                ask(f"{s3_store}/a")
    finally:
        sts.shutdown()
        sts.server_close()
    assert len(asked) == 1
    assert "WebIdentityToken=a-pods-token" in asked[0]
    for request in proxy.requests:
        assert "Credential=ASSUMED/" in request.headers["authorization"]
        assert request.headers["x-amz-security-token"] == "temporary"


def test_a_bucket_in_another_region_is_asked_there(proxy, s3_store):
    """As AWS answers: 301 and the bucket's region in a header."""

    def moved(request: Request) -> Fault | None:
        if "/us-east-1/" in request.headers["authorization"]:
            return Fault("status", status=301, code="PermanentRedirect", header="x-amz-bucket-region: eu-west-9")
        return None

    proxy.fault = moved
    storage.write_bytes(f"{s3_store}/a", b"one")
    assert storage.read_bytes(f"{s3_store}/a") == b"one"
    regions = [request.headers["authorization"].split("/")[2] for request in proxy.requests]
    assert regions == ["us-east-1", "eu-west-9", "eu-west-9"]


def test_a_server_that_knows_no_newer_checksum_gets_MD5(proxy, s3_store, monkeypatch):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    storage.forget_client()
    writer = storage.open_writer(f"{s3_store}/a")
    writer.write(bytes(storage.PART + 1))
    writer.commit()
    parts = [request for request in proxy.requests if request.kind == "part"]
    assert len(parts) == 2
    assert all("content-md5" in request.headers and "x-amz-checksum-crc32c" not in request.headers for request in parts)
    assert storage.size_of(f"{s3_store}/a") == storage.PART + 1


def test_every_part_carries_CRC32C(proxy, s3_store):
    writer = storage.open_writer(f"{s3_store}/a")
    writer.write(bytes(storage.PART + 1))
    writer.commit()
    assert all("x-amz-checksum-crc32c" in request.headers for request in proxy.requests if request.kind == "part")


def test_no_body_waits_until_its_head_is_acknowledged(s3_store, monkeypatch):
    """Head and body of a PUT are two packets; with Nagle's algorithm on, 40 ms pass between them."""
    opened: list[socket.socket] = []
    connect = socket.socket.connect

    def remembering(self: socket.socket, address: Any) -> None:
        opened.append(self)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", remembering)
    storage.forget_client()
    storage.write_bytes(f"{s3_store}/a", b"one")
    waits = [sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0 for sock in opened]
    assert waits
    assert not any(waits)


def test_a_wrong_checksum_is_refused_by_the_server(s3_store, monkeypatch):
    from zhllama.storage import s3

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage.forget_client()
    monkeypatch.setattr(s3, "crc32c", lambda content: "AAAAAA==")
    with pytest.raises(StorageFault, match=r"BadDigest|Checksum"):
        storage.write_bytes(f"{s3_store}/a", b"one")
    assert not storage.exists(f"{s3_store}/a")


@pytest.mark.parametrize(
    ("name", "value", "ask"),
    [("ZHLLAMA_S3_CONNECTIONS", "0", connections), ("ZHLLAMA_S3_TIMEOUT", "soon", patience)],
)
def test_a_setting_that_is_no_number_is_named(monkeypatch, name, value, ask):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name}={value}"):
        ask()


def test_never_more_calls_than_connections_are_under_way(monkeypatch):
    """What bounds the memory of a transfer: connections x the size of a part."""
    monkeypatch.setenv("ZHLLAMA_S3_CONNECTIONS", "2")
    most, now, lock, both = [0], [0], threading.Lock(), threading.Barrier(2)

    def put(number: int) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        both.wait(60)
        with lock:
            now[0] -= 1

    storage.in_parallel(put, range(20))
    assert most[0] == 2
