"""The local S3 server attacked: by another user of the machine on every port and socket that it has, and by a page."""

import http.client
import json
import os
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from pipelines.local import s3_guard
from pipelines.local.s3_server import LocalS3
from tests.other_user import as_stranger, root_alone

SECRET = b"nobody else reads this " * 1000
EVIL = "http://evil.example"
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""HTTP/2's, which every gRPC server answers."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    # a folder that others may enter, as a home's are
    folder = tmp_path_factory.mktemp("work")
    with LocalS3(folder / "s3") as server:
        server.client().put_object(Bucket=server.bucket, Key="secret", Body=SECRET)
        yield server


@pytest.fixture(scope="module")
def ports(server: LocalS3) -> list[int]:
    """Every port that the server's processes listen on."""
    assert server._server is not None
    first = psutil.Process(server._server.pid)
    found = [one for tree in (first, *first.children(recursive=True)) for one in tree.net_connections("tcp")]
    listening = [one.laddr for one in found if one.status == psutil.CONN_LISTEN]
    assert {one.ip for one in listening} == {"127.0.0.1"}
    return [one.port for one in listening]


def ask(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, str, bytes]:
    """Status, allowed origin and body of the answer; of a port that speaks no HTTP 0 and what it said."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body, {"Origin": EVIL, "Access-Control-Request-Method": "PUT"})
        answer = connection.getresponse()
        return answer.status, answer.getheader("Access-Control-Allow-Origin", ""), answer.read()
    except (http.client.HTTPException, OSError) as error:
        return 0, "", repr(error).encode()
    finally:
        connection.close()


READS = (
    "/zhllama/secret", "/zhllama?list-type=2", "/buckets/zhllama/secret", "/buckets/zhllama/?limit=100",
    "/1,01637037d6", "/dir/assign", "/dir/lookup?volumeId=1", "/dir/status", "/vol/status", "/ui/index.html",
    "/stats/memory", "/?Action=ListAccessKeys", "/etc/iam/identity.json", "/api/s3/buckets",
    "/api/config", "/debug/pprof/heap",
)  # fmt: skip
WRITES = (
    ("PUT", "/zhllama/secret"), ("DELETE", "/zhllama/secret"), ("DELETE", "/zhllama"), ("POST", "/zhllama?delete"),
    ("POST", "/buckets/zhllama/secret"), ("PUT", "/buckets/zhllama/secret"),
    ("DELETE", "/buckets/zhllama?recursive=true"), ("POST", "/submit"), ("POST", "/col/delete?collection=zhllama"),
    ("GET", "/col/delete?collection=zhllama"),
    ("GET", "/vol/grow?count=1"), ("GET", "/vol/vacuum?garbageThreshold=0"), ("POST", "/1,01637037d6"),
    ("DELETE", "/1,01637037d6"), ("POST", "/?Action=CreateUser&UserName=evil"),
    ("POST", "/.tus/buckets/zhllama/secret"), ("POST", "/cluster/raft/remove?id=x"),
    ("DELETE", "/api/s3/buckets/zhllama"),
)  # fmt: skip


def test_another_user_reads_nothing_on_any_port(server, ports):
    answers = as_stranger(lambda: {(port, path): ask(port, "GET", path) for port in ports for path in READS})
    assert len(answers) == len(ports) * len(READS)
    for asked, (status, _, body) in answers.items():
        assert status in (0, 400, 401, 403, 404, 405), (asked, status, body)
        assert SECRET[:20] not in body
        assert server.keys["secretKey"].encode() not in body


def test_another_user_changes_nothing_on_any_port(server, ports):
    def attack() -> dict[tuple[int, str, str], int]:
        return {(port, method, path): ask(port, method, path, b"evil")[0] for port in ports for method, path in WRITES}

    answers = as_stranger(attack)
    assert {asked: status for asked, status in answers.items() if 200 <= status < 400} == {}
    assert server.client().get_object(Bucket=server.bucket, Key="secret")["Body"].read() == SECRET


def test_no_port_lets_a_page_of_another_origin_read_or_write(ports):
    answers = {(port, path): ask(port, "OPTIONS", path) for port in ports for path in (*READS, "/status", "/healthz")}
    let_in = {asked: answer for asked, answer in answers.items() if answer[1] == EVIL}
    assert let_in == {}


def test_grpc_answers_nobody_without_the_certificate_of_this_start(ports):
    def attack() -> dict[int, tuple[bytes, bytes]]:
        found = {}
        for port in ports:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
                plain.sendall(GREETING)
                try:
                    said = plain.recv(100)
                except ConnectionResetError:
                    said = b""
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.set_alpn_protocols(["h2"])
            try:
                with context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=10)) as one:
                    one.sendall(GREETING)
                    sealed = one.recv(100)
            except (ssl.SSLError, ConnectionResetError):
                sealed = b""
            found[port] = said, sealed
        return found

    # HTTP/1 servers say that they do not know that method
    answered = as_stranger(attack)
    assert {port: said for port, said in answered.items() if said[1] or not b"HTTP/1".startswith(said[0][:6])} == {}


@root_alone
def test_no_socket_of_it_takes_another_user(server):
    assert server._server is not None
    mine = [one.laddr for one in psutil.Process(server._server.pid).net_connections("unix") if one.laddr]

    def attack() -> list[str]:
        entered = []
        for path in mine:
            with socket.socket(socket.AF_UNIX) as one:
                try:
                    one.connect(path)
                except PermissionError:
                    continue
                entered.append(path)
        return entered

    assert mine
    assert as_stranger(attack) == []


def test_its_files_are_for_its_owner_and_its_command_line_names_no_key(server):
    assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in server.folder.iterdir()}
    assert {name for name, mode in modes.items() if mode & 0o077} == set()
    assert server._server is not None
    said = " ".join(psutil.Process(server._server.pid).cmdline())
    settings = (server.folder / "security.toml").read_text()
    secrets = [*server.keys.values(), *(line.split('"')[1] for line in settings.splitlines() if "key = " in line)]
    assert [one for one in secrets if one in said and not one.endswith(".pem")] == []


def test_each_user_and_each_start_has_secrets_of_its_own(server, tmp_path):
    with LocalS3(tmp_path / "s3") as other:
        assert other.keys != server.keys
        first = (other.folder / "security.toml").read_text()
        assert first != (server.folder / "security.toml").read_text()
    with LocalS3(tmp_path / "s3") as again:
        assert (again.folder / "security.toml").read_text() != first


def test_a_store_of_an_earlier_release_is_closed_and_read(tmp_path):
    folder = tmp_path / "s3"
    with LocalS3(folder) as server:
        server.client().put_object(Bucket=server.bucket, Key="a", Body=SECRET)
    # as earlier releases left it
    for path in (folder, folder / "data"):
        path.chmod(0o755)
    for name in ("security.toml", "internal.pem", ".users"):
        (folder / name).unlink()
    (folder / "server.log").chmod(0o644)
    with LocalS3(folder) as server:
        assert server.client().get_object(Bucket=server.bucket, Key="a")["Body"].read() == SECRET
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_keys_of_the_users_own_account_open_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAOFTHEUSER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-user")
    monkeypatch.setenv("WEED_JWT_SIGNING_KEY", "known")
    with LocalS3(tmp_path / "s3") as server:
        assert server._server is not None
        around = psutil.Process(server._server.pid).environ()
        assert [name for name in around if name.startswith(("AWS_", "WEED_"))] == []


def test_nothing_of_it_stays_in_the_temporary_folders(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    with LocalS3(tmp_path / "s3") as server:
        ports = json.loads((server.folder / "server.json").read_text())["ports"]
    assert os.listdir(tmp_path / "tmp") == []
    assert [path for path in Path("/tmp").glob("seaweedfs-*") if path.stem.rsplit("-", 1)[1] in map(str, ports)] == []


def test_what_a_killed_server_left_in_the_temporary_folder_goes_at_the_next_start(tmp_path):
    with LocalS3(tmp_path / "s3") as server:
        record = (server.folder / "server.json").read_bytes()
        ports = json.loads(record)["ports"]
    left = Path(f"/tmp/seaweedfs-volume-grpc-{ports[3]}.sock")
    left.touch()
    (tmp_path / "s3" / "server.json").write_bytes(record)
    with LocalS3(tmp_path / "s3"):
        assert not left.exists()


def test_a_start_that_is_killed_before_it_is_ready_has_said_which_sockets_are_its_own(tmp_path, monkeypatch):
    def killed(self):
        raise SystemExit(json.loads((self.folder / "server.json").read_text())["ports"] == self._ports)

    monkeypatch.setattr(LocalS3, "_is_ready", killed)
    with pytest.raises(SystemExit) as ended, LocalS3(tmp_path / "s3"):
        pytest.fail("it is not ready")
    assert ended.value.code is True


def test_sockets_of_this_user_that_nobody_listens_on_go_and_no_others(request):
    begin = f"/tmp/seaweedfs-test-{os.getpid()}"
    old = (0, time.time() - s3_guard.STALE - 60)
    paths = {name: Path(f"{begin}-{name}.sock") for name in ("stale", "young", "listening", "file")}
    request.addfinalizer(lambda: [path.unlink(missing_ok=True) for path in paths.values()])
    with ExitStack() as held:
        for name in ("stale", "young", "listening"):
            made = held.enter_context(socket.socket(socket.AF_UNIX))
            made.bind(str(paths[name]))
            made.listen() if name == "listening" else made.close()
        paths["file"].touch()
        for name in ("stale", "listening", "file"):
            os.utime(paths[name], old)
        s3_guard.remove_stale_sockets()
        s3_guard.remove_sockets([os.getpid()])
        assert [name for name, path in paths.items() if path.exists()] == ["young", "listening", "file"]


def test_a_page_in_a_browser_reads_and_changes_nothing(server, ports):
    import shutil

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("NOT CHECKED: no chromium here, so no page attacks the S3 server")
    from playwright.sync_api import sync_playwright

    attack = """async ([ports, reads, writes]) => {
        const found = [], tries = []
        for (const port of ports) {
            const at = `http://127.0.0.1:${port}`
            for (const path of reads)
                tries.push(fetch(at + path).then(r => r.text()).then(t => found.push([port, path, t])))
            for (const [method, path] of writes) {
                const what = {method, body: method == 'GET' ? undefined : 'evil'}
                tries.push(fetch(at + path, what))
                if (method == 'POST' || method == 'GET') tries.push(fetch(at + path, {...what, mode: 'no-cors'}))
            }
        }
        await Promise.allSettled(tries)
        return found
    }"""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-background-networking"]
        )
        page = browser.new_page()
        # the visited page, at an address of its own
        page.route("http://evil.example/", lambda route: route.fulfill(body="<p>hello", content_type="text/html"))
        page.goto(EVIL)
        found = page.evaluate(attack, [ports, READS, WRITES])
        browser.close()
    assert [one for one in found if SECRET[:20].decode() in one[2] or "secret" in one[2]] == []
    assert server.client().get_object(Bucket=server.bucket, Key="secret")["Body"].read() == SECRET
