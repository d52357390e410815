"""The way to the server as the environment has it: certificates that are not accepted, proxies that do not let through.
Each is one line that says what to set, and nothing is asked of the server."""

import base64
import os
import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipelines.kubeflow.client import Kubeflow
from zhllama.errors import InputError

pytestmark = pytest.mark.usefixtures("plain_environment")


def certificate(path: Path, host: str = "127.0.0.1", first: int = -1, last: int = 1) -> Path:
    """A certificate that signs itself, valid from day to day, and its key, in one file."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a site")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now + timedelta(first)).not_valid_after(now + timedelta(last))
    signed = builder.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))]), critical=False)
    made = signed.sign(key, hashes.SHA256())
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(serialization.Encoding.PEM, *form)
    )
    return path


def speak_tls(server, file: Path) -> str:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(file)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    return server.host.replace("http:", "https:")


@pytest.mark.parametrize(
    ("made", "trusted", "said", "mend"),
    [
        ({}, "", "self-signed certificate", "name in SSL_CERT_FILE a file with its authority's certificate"),
        ({}, "another", "self-signed certificate", "SSL_CERT_FILE must name a file with its authority's certificate"),
        ({"host": "127.0.0.2"}, "own", "IP address mismatch", "write the name that it is for in --host"),
        ({"first": -9, "last": -1}, "own", "certificate has expired", "have it renewed, or set this machine's clock"),
        ({"first": 1, "last": 2}, "own", "certificate is not yet valid", "have it renewed, or set this"),
    ],
    ids=["self-signed", "of another authority", "another host", "expired", "of tomorrow"],
)
def test_a_certificate_that_is_not_accepted_says_why_and_how_that_is_mended(
    server, monkeypatch, tmp_path, made, trusted, said, mend
):
    own, another = certificate(tmp_path / "own", **made), certificate(tmp_path / "another")
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(own if trusted == "own" else another))
    with pytest.raises(InputError) as caught:
        Kubeflow(speak_tls(server, own), None)
    assert f"its certificate is not accepted ({said}" in str(caught.value)
    assert f"; {mend}" in str(caught.value)
    assert server.asked == []


@pytest.mark.parametrize("content", [None, "", "no certificate"], ids=["not there", "empty", "a text"])
@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_a_file_without_certificates_is_named(monkeypatch, tmp_path, variable, content):
    file = tmp_path / "ca.crt"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv(variable, str(file))
    with pytest.raises(InputError, match=f"{variable}={file}: no certificates can be read there .* unset it"):
        Kubeflow("https://127.0.0.1:9", None)


@pytest.mark.parametrize(
    "said",
    [
        "Client sent an HTTP request to an HTTPS server.\n",
        "<html><head><title>400 The plain HTTP request was sent to HTTPS port</title></head></html>",
    ],
    ids=["Go", "nginx"],
)
def test_a_port_that_speaks_https_only_is_asked_so(server, said):
    server.always = {"": (400, {"Content-Type": "text/html"}, said)}
    with pytest.raises(InputError, match=rf"speaks https only; write https://127\.0\.0\.1:{server.server_address[1]}$"):
        Kubeflow(server.host, None)


def test_a_port_that_speaks_no_https_is_asked_so(server):
    with pytest.raises(InputError, match=rf"does not speak https; write {server.host}, or another port"):
        Kubeflow(server.host.replace("http:", "https:"), None)


# --- proxies ----------------------------------------------------------------------------------------------------------

HTML = {"Content-Type": "text/html"}


@pytest.mark.parametrize(
    ("status", "page", "said"),
    [
        (200, "<title>Portal</title>", "(Portal)"),
        (403, "<title>Blocked</title>", "(Blocked)"),
        (407, "<title>Who?</title>", "does not let us through (407"),
    ],
)
def test_a_proxy_that_answers_in_the_servers_place_is_named_without_its_password(
    server, monkeypatch, status, page, said
):
    server.always = {"": (status, HTML, f"<html>{page}</html>")}
    monkeypatch.setenv("HTTP_PROXY", server.host.replace("//", "//me:hunter2@"))
    with pytest.raises(InputError) as caught:
        Kubeflow("http://kfp.example.invalid", None)
    line = str(caught.value)
    assert said in line
    assert f"the proxy {server.host} (HTTP_PROXY)" in line
    assert "NO_PROXY" in line
    assert "hunter2" not in line


@pytest.mark.parametrize(("variable", "scheme"), [("http_proxy", "http"), ("HTTPS_PROXY", "https")])
def test_a_proxy_where_nobody_answers_is_named(monkeypatch, variable, scheme):
    monkeypatch.setenv(variable, "127.0.0.1:9")
    with pytest.raises(
        InputError, match=rf"the proxy http://127\.0\.0\.1:9 \({scheme.upper()}_PROXY\) does not let us"
    ):
        Kubeflow(f"{scheme}://kfp.example.invalid", None)


def test_a_proxy_that_refuses_a_tunnel_is_named(server, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", server.host)
    with pytest.raises(InputError, match=r"the proxy .* does not let us through \(Tunnel connection failed: 501"):
        Kubeflow("https://kfp.example.invalid", None)


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:9", "http://", "http://[::1", "nonsense://x"])
def test_what_is_no_proxy_of_http_is_named(monkeypatch, value):
    monkeypatch.setenv("HTTP_PROXY", value)
    with pytest.raises(InputError, match="HTTP_PROXY: it names no proxy of HTTP; write http://host:port, or unset it"):
        Kubeflow("http://kfp.example.invalid", None)


def test_a_proxy_is_told_its_user_and_password(server, monkeypatch):
    seen = []
    real = server.RequestHandlerClass._refused

    def refused(handler) -> bool:
        seen.append(handler.headers.get("Proxy-Authorization"))
        return bool(real(handler))

    monkeypatch.setattr(server.RequestHandlerClass, "_refused", refused)
    monkeypatch.setenv("HTTP_PROXY", server.host.replace("//", "//me:p%40ss@"))
    assert Kubeflow("http://kfp.example.invalid", None).run("r-42").name == "mine"
    assert set(seen) == {f"Basic {base64.b64encode(b'me:p@ss').decode()}"}


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no file without an end here")
def test_a_token_file_without_an_end_is_no_token(monkeypatch):
    monkeypatch.setenv("ZHLLAMA_KFP_TOKEN_FILE", "/dev/zero")
    with pytest.raises(InputError, match="ZHLLAMA_KFP_TOKEN_FILE=/dev/zero: it holds no token"):
        Kubeflow("http://127.0.0.1:9", None)
