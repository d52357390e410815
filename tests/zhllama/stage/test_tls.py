"""A site's own certificates are trusted beside the public ones, by whatever a command uses."""

import http.server
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from zhllama.stage.tls import BUNDLE_VARIABLE, TRUSTED, trust_site

ASK = """
import os, sys, urllib.request
from zhllama.stage.program import guarded

def ask():
    from botocore.awsrequest import AWSRequest
    from botocore.httpsession import URLLib3Session

    print(sorted(os.environ[name] == os.environ["SSL_CERT_FILE"] for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")))
    print(urllib.request.urlopen(sys.argv[1]).read().decode())
    request = AWSRequest("GET", sys.argv[1]).prepare()
    print(URLLib3Session(verify=os.environ["AWS_CA_BUNDLE"]).send(request).status_code)
    with open(os.environ["SSL_CERT_FILE"]) as file:
        print(file.read().count("BEGIN CERTIFICATE") > 50)

guarded(ask)
"""


class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 that signs itself, as a mounted ConfigMap holds it: by a link."""
    mounted = tmp_path / "mounted"
    (mounted / "..data").mkdir(parents=True)
    path = mounted / "..data" / "site.crt"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(tmp_path / "key.pem"), "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    (mounted / "site.crt").symlink_to("..data/site.crt")
    return mounted


@pytest.fixture
def address(authority: Path) -> Iterator[str]:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(authority / "site.crt", authority.parent / "key.pem")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TRUSTED, BUNDLE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def ask(address: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> subprocess.CompletedProcess[str]:
    monkeypatch.setenv("ZHLLAMA_CA", str(folder))
    return subprocess.run([sys.executable, "-c", ASK, address], capture_output=True, text=True, check=False)


def test_a_mounted_certificate_is_trusted_beside_the_public_ones(address, authority, monkeypatch):
    ended = ask(address, authority, monkeypatch)
    assert ended.stdout.splitlines() == ["[True, True]", "hello", "200", "True"], ended.stderr


@pytest.mark.parametrize("how", ["a folder", "a secret's key"])
def test_the_file_of_all_authorities_goes_with_the_command(address, authority, tmp_path, monkeypatch, how):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    if how == "a secret's key":
        monkeypatch.setenv("AWS_CA_BUNDLE", (authority / "site.crt").read_text())
    assert "hello" in ask(address, authority, monkeypatch).stdout
    assert os.listdir(tmp_path / "tmp") == []


def test_a_variable_that_is_set_is_left_as_it_is(address, authority, tmp_path, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "own.pem"))
    assert ask(address, authority, monkeypatch).stdout.splitlines()[:2] == ["[False, True]", "hello"]


def test_an_absent_config_map_changes_nothing(address, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    ended = ask(address, tmp_path / "empty", monkeypatch)
    assert "KeyError: 'AWS_CA_BUNDLE'" in ended.stderr


def test_a_file_without_a_certificate_is_refused_by_name(address, authority, monkeypatch):
    (authority / "other.pem").write_text("nothing")
    ended = ask(address, authority, monkeypatch)
    assert ended.returncode == 2
    assert ended.stderr.strip().endswith("other.pem: it holds no certificate; put certificates in PEM there")


@pytest.mark.parametrize("has_own", [True, False], ids=["certificates", "no certificates"])
def test_who_comes_later_in_the_pod_finds_all_authorities_in_one_file(authority, tmp_path, monkeypatch, has_own):
    """vLLM, say, which takes a file and no folder; it is told of it whether the ConfigMap is there or not."""
    monkeypatch.setenv(BUNDLE_VARIABLE, str(tmp_path / "authorities.pem"))
    monkeypatch.setenv("ZHLLAMA_CA", str(authority if has_own else tmp_path / "absent"))
    trust_site()
    written = (tmp_path / "authorities.pem").read_text()
    assert written.count("BEGIN CERTIFICATE") > 50
    assert ((authority / "site.crt").read_text() in written) is has_own
    assert os.environ.get("AWS_CA_BUNDLE") == (str(tmp_path / "authorities.pem") if has_own else None)
