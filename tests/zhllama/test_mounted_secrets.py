"""S3's credentials as files of a pod: read when they are needed, anew when they are refused, shown nowhere."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import kubelet
from tests.faulty_proxy import Fault, FaultyProxy, Request
from zhllama import mounted_secrets, storage
from zhllama.errors import InputError
from zhllama.mounted_secrets import CREDENTIALS, MODEL_KEY, credentials, take_secrets
from zhllama.secret_text import mask
from zhllama.storage.s3_session import Session


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the S3 secret is mounted; no variable or file of AWS has a credential."""
    monkeypatch.setattr(mounted_secrets, "S3_FOLDER", str(tmp_path / "s3"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "shared"))
    for name in (*CREDENTIALS, "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path / "s3"
    storage.forget_client()


def pair(name: str, **more: str) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": name, "AWS_SECRET_ACCESS_KEY": f"secret-of-{name}", **more}


def key_of(session: Session) -> str:
    return str(session.credentials.access_key)


def test_a_key_that_is_rotated_under_a_running_process_is_read_again(s3_server, s3_store, folder, monkeypatch):
    """As the kubelet replaces the files, before a server that knows the new key alone."""
    new = {name: s3_server.environment()[name] for name in CREDENTIALS[:2]}
    kubelet.write(folder, pair("AKIDOLD", AWS_SESSION_TOKEN="expires"))
    with FaultyProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", proxy.endpoint)
        storage.forget_client()

        def refused(request: Request) -> Fault | None:
            if "AKIDOLD" not in request.headers["authorization"]:
                return None
            kubelet.write(folder, new)
            return Fault("status", status=400, code="ExpiredToken")

        proxy.fault = refused
        storage.write_bytes(f"{s3_store}/a", b"one")
        assert storage.read_bytes(f"{s3_store}/a") == b"one"
        first, *others = [request.headers for request in proxy.requests]
    assert first["x-amz-security-token"] == "expires"
    assert len(others) == 2
    for headers in others:
        assert new["AWS_ACCESS_KEY_ID"] in headers["authorization"]
        assert "x-amz-security-token" not in headers


def test_a_refused_key_that_nobody_replaces_ends_in_one_line(s3_store, folder):
    kubelet.write(folder, pair("AKIDOLD"))
    storage.forget_client()
    with pytest.raises(InputError, match="check AWS_ACCESS_KEY_ID") as said:
        storage.write_bytes(f"{s3_store}/a", b"one")
    assert "\n" not in str(said.value)


def test_variables_stand_over_files_and_files_over_what_a_machine_has(folder, tmp_path, monkeypatch):
    (tmp_path / "shared").write_text("[default]\naws_access_key_id = SHARED\naws_secret_access_key = s\n")
    assert key_of(Session("http://s3:9000")) == "SHARED"
    kubelet.write(folder, pair("FILES"))
    # a web identity that the pod has too
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/r")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    assert key_of(Session("http://s3:9000")) == "FILES"
    for name, value in pair("VARIABLES").items():
        monkeypatch.setenv(name, value)
    session = Session("http://s3:9000")
    assert (key_of(session), session.credentials.token) == ("VARIABLES", None)


def test_a_key_and_a_secret_are_of_one_version_while_they_are_replaced(folder):
    kubelet.write(folder, pair("k0", AWS_SESSION_TOKEN="of-k0"))
    over = threading.Event()

    def rotate() -> None:
        for number in range(1, 100):
            more = {"AWS_SESSION_TOKEN": f"of-k{number}"} if number % 2 else {}
            kubelet.write(folder, pair(f"k{number}", **more))
        over.set()

    rotating = threading.Thread(target=rotate)
    rotating.start()
    seen = []
    while not over.is_set():
        seen.append(credentials())
    rotating.join()
    for found in [*seen, credentials()]:
        key = found["AWS_ACCESS_KEY_ID"]
        assert found["AWS_SECRET_ACCESS_KEY"] == f"secret-of-{key}"
        assert found.get("AWS_SESSION_TOKEN", f"of-{key}") == f"of-{key}"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": "k"}, "AWS_SECRET_ACCESS_KEY is not there; put it into the S3 secret"),
        ({"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": " \n"}, "AWS_SECRET_ACCESS_KEY is not there"),
        ({"AWS_SESSION_TOKEN": "t"}, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is not there"),
    ],
)
def test_half_a_pair_is_one_line(folder, files, said):
    kubelet.write(folder, files)
    with pytest.raises(InputError, match=said):
        Session("http://s3:9000")


def test_without_files_there_are_none(folder):
    assert credentials() == {}
    kubelet.write(folder, {"ZHLLAMA_S3_ENDPOINT": "http://s3:9000"})
    assert credentials() == {}


def test_a_file_that_is_no_text_is_one_line_with_its_name(folder):
    folder.mkdir()
    (folder / "AWS_ACCESS_KEY_ID").write_bytes(b"\xff\xfe")
    for read in (credentials, take_secrets):
        with pytest.raises(InputError, match=r"AWS_ACCESS_KEY_ID: it cannot be read.*mend the secret's key"):
            read()


def test_what_was_read_of_files_is_in_no_log_though_no_variable_has_it(folder):
    values = ("AKIDOFFILES", "the-secret-key", "a-session-token")
    kubelet.write(folder, dict(zip(CREDENTIALS, values, strict=True)))
    Session("http://s3:9000")
    assert not {*CREDENTIALS} & os.environ.keys()
    assert mask(", ".join(values)) == "***, ***, ***"


def test_of_the_secret_with_a_models_key_that_key_alone_becomes_a_variable(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(mounted_secrets, "MODEL_FOLDER", str(tmp_path / "model"))
    monkeypatch.setenv(MODEL_KEY, "")
    monkeypatch.delenv(MODEL_KEY)
    kubelet.write(tmp_path / "model", {MODEL_KEY: "sk-of-a-file\n", "LD_PRELOAD": "/tmp/other.so"})
    take_secrets()
    assert os.environ[MODEL_KEY] == "sk-of-a-file"
    assert "LD_PRELOAD" not in os.environ
    kubelet.write(tmp_path / "model", {MODEL_KEY: "another"})
    take_secrets()
    # one that is set stays
    assert os.environ[MODEL_KEY] == "sk-of-a-file"
