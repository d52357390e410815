"""What stores of other makers answer, as their documentation and bug reports say, and what is said of it here."""

import http.server
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faulty_proxy import Fault, FaultyProxy, Request
from zhllama import storage
from zhllama.artifacts.published import find_published
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError, StorageFault
from zhllama.storage import multipart, s3_errors

PART = 5 * 2**20


@dataclass(frozen=True)
class Answer:
    status: int
    body: str = ""
    headers: tuple[tuple[str, str], ...] = ()


class _Store(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.server.answer(self.command, self.path)  # type: ignore[attr-defined]
        body = answer.body.encode()
        self.send_response_only(answer.status)
        if "Date" not in dict(answer.headers):
            self.send_header("Date", self.date_time_string())
        for name, value in answer.headers:
            self.send_header(name, value)
        if "Content-Length" not in dict(answer.headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def vendor(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """`vendor(answer)`: a server that answers every request with what `answer(method, path)` returns, or with one
    answer; gives its endpoint, which is the one that is set."""
    servers = []

    def start(answer: Answer | Callable[[str, str], Answer]) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Store)
        server.answer = (lambda method, path: answer) if isinstance(answer, Answer) else answer  # type: ignore[attr-defined]
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        storage.forget_client()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def proxy(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with FaultyProxy(os.environ["ZHLLAMA_S3_ENDPOINT"]) as proxy:
        monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", proxy.endpoint)
        monkeypatch.setattr(multipart, "PART", PART)
        storage.forget_client()
        yield proxy


def error_body(code: str, message: str, more: str = "") -> str:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>'


SKEWED = "The difference between the request time and the current time is too large"
BAD = "We encountered an internal error, please try again."
CHECKSUMS = "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
ANSWERS = {
    "AWS clock": (403, "RequestTimeTooSkewed", SKEWED, "", "set this machine's"),
    "OSS clock": (403, "RequestTimeTooSkewed", SKEWED, "<HostId>oss</HostId>", "NTP"),
    "MinIO clock": (403, "RequestTimeTooSkewed", SKEWED, "", "clocks of this machine"),
    "R2 clock": (400, "ExpiredRequest", "Request has expired", "", "clocks"),
    "archive": (403, "InvalidObjectState", "not valid for the object's storage class", "", "restore it"),
    "OSS style": (403, "SecondLevelDomainForbidden", "Please use virtual hosted style", "", "addressing style"),
    "COS style": (403, "PathStyleDomainForbidden", "use virtual-styled domain", "", "addressing style"),
    "OSS region": (
        403, "AccessDenied", "The bucket you are attempting to access must be addressed using the specified endpoint.",
        "<Endpoint>oss-cn-beijing.aliyuncs.com</Endpoint>", "at another endpoint: oss-cn-beijing.aliyuncs.com",
    ),
    "AWS region": (
        400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'eu-west-9'",
        "<Region>eu-west-9</Region>", "eu-west-9",
    ),
    "MinIO full": (507, "XMinioStorageFull", "Storage backend has reached its minimum free drive", "", "zhllama gc"),
    "MinIO quota": (400, "XMinioAdminBucketQuotaExceeded", "Bucket quota exceeded", "", "quota"),
    "Ceph quota": (403, "QuotaExceeded", "", "", "quota"),
    "full, no code": (507, "Whatever", "no room", "", "zhllama gc"),
    "Ceph suspended": (403, "UserSuspended", "", "", "ask who runs the store"),
    "OSS in debt": (403, "InDebt", "Current user is indebted", "", "locked"),
    "MinIO token": (403, "InvalidTokenId", "The security token is invalid", "", "AWS_SESSION_TOKEN"),
    "OSS token": (403, "InvalidSecurityToken", "The security token is invalid", "", "AWS_SESSION_TOKEN"),
    "R2 no token": (401, "Unauthorized", "Unauthorized", "", "AWS_ACCESS_KEY_ID"),
    "AWS rights": (403, "AccessDenied", "not authorized to perform: s3:PutObject", "", "the rights of this account"),
    "AWS refuses": (400, "InvalidRequest", "Missing required header for this request", "", "refuses this request"),
    "AWS large": (400, "EntityTooLarge", "Your proposed upload exceeds the maximum", "", "refuses this request"),
    "GCS key": (400, "CloudKmsDisabledKey", "Cloud KMS key is disabled", "", "refuses this request"),
    "GCS reason": (403, "AccessDenied", "Access denied.", "<Details>billing is off</Details>", "billing is off"),
    "GCS billing": (403, "UserProjectAccountProblem", "absent billing account", "", "ask who runs the store"),
    "Wasabi closed": (403, "AccountClosed", "closed", "", "ask who runs the store"),
    "OBS arrears": (403, "FrozenAccount", "arrears", "", "ask who runs the store"),
    "B2 cap": (403, "StorageCapExceeded", "storage cap exceeded", "", "have the quota raised"),
    "Azure archive": (409, "BlobArchived", "not permitted on an archived blob", "", "restore it"),
    "R2 checksum": (501, "NotImplemented", "Header 'x-amz-checksum-crc32c' not implemented", "", CHECKSUMS),
    "B2 checksum": (400, "InvalidRequest", "Unsupported header 'x-amz-checksum-crc32c' received", "", CHECKSUMS),
    "OSS checksum": (400, "InvalidArgument", "aws-chunked encoding is not supported", "", CHECKSUMS),
    "GCS checksum": (400, "InvalidArgument", "Invalid argument.", "<Details>x-amz-checksum-crc32</Details>", CHECKSUMS),
    "AWS lock": (400, "InvalidRequest", "Content-MD5 OR x-amz-checksum- HTTP header is required", "", "this request"),
    "unknown 400": (400, "NobodyKnowsIt", "so it is", "", "refuses this request"),
    "not there": (501, "NotImplemented", "functionality that is not implemented", "", "refuses"),
}  # fmt: skip


@pytest.mark.parametrize("case", ANSWERS)
def test_a_refusal_is_said_with_the_servers_words_and_its_mend_and_never_to_be_tried_again(vendor, s3_store, case):
    status, code, message, more, line = ANSWERS[case]
    vendor(Answer(status, error_body(code, message, more)))
    for ask in (storage.read_bytes, lambda uri: storage.write_bytes(uri, b"1"), storage.listing):
        with pytest.raises(InputError) as caught:
            ask(f"{s3_store}/a")
        assert line in str(caught.value)
        assert message in str(caught.value)
        assert code in str(caught.value)
        assert "try again" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "SlowDown"), (503, "SlowDownWrite"), (429, "TooManyRequests"), (503, "ServerBusy"), (408, ""), (500, ""),
        (403, "QpsLimitExceeded"), (400, "XMinioBackendDown"), (400, "RequestTimeout"), (409, "OperationAborted"),
        (400, "CrcMismatch"), (599, "NobodyKnowsIt"),
    ],
)  # fmt: skip
def test_what_passes_is_tried_again_and_said_to(vendor, s3_store, monkeypatch, status, code):
    asked = []
    vendor(lambda method, path: asked.append(path) or Answer(status, error_body(code, BAD) if code else ""))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    storage.forget_client()
    with pytest.raises(StorageFault, match=f"S3 answered {code or status}.*; try again"):
        storage.write_bytes(f"{s3_store}/a", b"1")
    assert len(asked) == 2


def test_no_code_stands_for_two_things():
    codes = [code for codes in s3_errors._TABLE.values() for code in codes.split()]
    assert len(codes) == len(set(codes))


def test_a_servers_words_hold_no_signature_and_move_no_terminal(vendor, s3_store):
    signed = (
        "no: Credential=AKIAX/2026/s3, Signature=abcdef012 X-Amz-Security-Token=FwoG&amp;x=1 \x85\u202e" + "long " * 500
    )
    vendor(Answer(403, error_body("AccessDenied", signed)))
    with pytest.raises(InputError) as caught:
        storage.read_bytes(f"{s3_store}/a")
    line = str(caught.value)
    assert "Signature=***" in line
    for secret in ("AKIAX", "abcdef012", "FwoG", "\x85", "\u202e"):
        assert secret not in line
    assert len(line) < 800


def test_a_head_that_seems_to_come_from_another_hour_is_the_clock(vendor, s3_store):
    vendor(Answer(403, "", (("Date", "Thu, 01 Jan 2015 00:00:00 GMT"),)))
    with pytest.raises(InputError, match=r"clocks of this machine and of the S3 server differ, by \d+ min"):
        storage.exists(f"{s3_store}/a")


# --- another server than S3 answers -----------------------------------------------------------------------------------

CALLS = {
    "read": storage.read_bytes,
    "size": storage.size_of,
    "exists": storage.exists,
    "write": lambda uri: storage.write_bytes(uri, b"1"),
    "list": storage.listing,
    "delete": storage.delete,
    "copy": lambda uri: storage.copy(uri, f"{uri}-copy"),
    "writable": storage.check_writable,
    "part": lambda uri: storage.Upload(uri, anew=True),
    "uploads": storage.unfinished,
}
TAG = '"0123456789abcdef0123456789abcdef"'
PAGES = (
    "<html><body>Sign in</body></html>",
    '<?xml version="1.0"?><!DOCTYPE html><html xmlns="http://www.w3.org/1999/xhtml"><body></body></html>',
    "<!-- v2 -->\n<!DOCTYPE HTML>\n<HTML></HTML>",
)
PAGE = "<html><head><title>301 Moved Permanently</title></head></html>"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_an_endpoint_that_sends_to_https_says_what_to_write(vendor, s3_store, status):
    endpoint = vendor(lambda method, path: Answer(status, PAGE, (("Location", f"https://127.0.0.1:9443{path}"),)))
    for call in CALLS.values():
        with pytest.raises(InputError) as caught:
            call(f"{s3_store}/a")
        assert str(caught.value) == f"{endpoint}: the endpoint sends to https://127.0.0.1:9443; write that"


def test_a_login_page_is_no_store(vendor, s3_store):
    vendor(Answer(302, "", (("Location", "https://sso.example/login?state=SECRET"),)))
    for call in CALLS.values():
        with pytest.raises(InputError, match=r"sends to https://sso\.example, as no S3 server does") as caught:
            call(f"{s3_store}/a")
        assert "SECRET" not in str(caught.value)


def test_a_login_page_that_says_200_to_everything_is_no_store(vendor, s3_store):
    for page in PAGES:
        endpoint = vendor(Answer(200, page, (("Content-Type", "text/html"),)))
        for call in CALLS.values():
            with pytest.raises(InputError, match=f"{endpoint}: what answers there is no S3 server"):
                call(f"{s3_store}/a")


def without_reads(method: str, path: str, answer: Answer) -> Answer:
    """HEAD is answered as for an object; all else as is."""
    return Answer(200, "", (("ETag", TAG),)) if method == "HEAD" else answer


NO_XML = "<html><script>if (a<b && c)</script></html>"


@pytest.mark.parametrize(
    "answer",
    [Answer(200), Answer(204), Answer(200, '{"status": "UP"}'), Answer(200, NO_XML)],
    ids=["nothing", "204", "JSON", "a page that is no XML"],
)
def test_what_is_no_answer_to_a_call_is_believed_by_none(vendor, s3_store, answer):
    """Neither a list without files, which `gc` would act on, nor a copy that nobody made."""
    vendor(lambda method, path: without_reads(method, path, answer))
    for call in ("list", "copy", "part", "uploads"):
        with pytest.raises(StorageFault, match="try again"):
            CALLS[call](f"{s3_store}/a")


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_that_is_longer_than_any_is_not_held(vendor, s3_store, monkeypatch, status):
    monkeypatch.setattr("zhllama.storage.s3_session.LONGEST_ANSWER", 2**16)
    vendor(Answer(status, f'<?xml version="1.0"?><ListBucketResult>{" " * 2**20}'))
    for call in ("list", "uploads") if status == 200 else ("list", "read"):
        with pytest.raises(StorageFault, match="has more than 65,536 bytes"):
            CALLS[call](f"{s3_store}/a")


def test_a_page_in_place_of_a_copied_part_is_none(vendor, s3_store):
    """Of an object that boto3 copies by parts."""

    def answer(method: str, path: str) -> Answer:
        if method == "HEAD":
            return Answer(200, "", (("ETag", TAG), ("x-amz-size", "1"), ("Content-Length", str(20 * 2**20))))
        if method == "POST":
            return Answer(200, "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>")
        return Answer(204) if method == "DELETE" else Answer(200, PAGES[0])

    vendor(answer)
    with pytest.raises(InputError, match="what answers there is no S3 server"):
        storage.copy(f"{s3_store}/a", f"{s3_store}/b")


@pytest.mark.parametrize(("code", "kind"), [("InternalError", StorageFault), ("AccessDenied", InputError)])
def test_a_copy_that_is_200_with_an_error_in_it_is_an_error(vendor, s3_store, code, kind):
    vendor(lambda method, path: without_reads(method, path, Answer(200, error_body(code, "so it is"))))
    with pytest.raises(kind, match=f"{code}: so it is"):
        storage.copy(f"{s3_store}/a", f"{s3_store}/b")


@pytest.mark.parametrize("status", [403, 407, 502, 503, 511])
def test_a_proxys_page_is_said_to_be_one(vendor, s3_store, status):
    vendor(Answer(status, "<html><head><title>Squid says no</title></head></html>"))
    for call in ("read", "write", "list", "part"):
        with pytest.raises((InputError, StorageFault), match=r"a page of HTML \(Squid says no\)") as caught:
            CALLS[call](f"{s3_store}/a")
        passes = status in (502, 503)
        assert isinstance(caught.value, StorageFault if passes else InputError)
        assert ("NO_PROXY" in str(caught.value)) is not passes
        assert "AWS_SECRET_ACCESS_KEY" not in str(caught.value)


@pytest.mark.parametrize(("status", "code"), [(301, "PermanentRedirect"), (307, "TemporaryRedirect")])
def test_a_redirect_that_names_no_region_is_followed_nowhere(vendor, s3_store, status, code):
    """boto3 asks for the bucket's region, is answered likewise, and would ask again until Python's stack is full."""
    vendor(lambda method, path: Answer(status, "" if method == "HEAD" else error_body(code, "elsewhere")))
    for call in ("read", "size", "write", "list", "copy", "part"):
        with pytest.raises((InputError, StorageFault), match=f"{status}|{code}"):
            CALLS[call](f"{s3_store}/a")


def test_the_wait_that_a_server_asks_for_is_waited(vendor, s3_store, monkeypatch):
    answers = [
        Answer(503, error_body("SlowDown", "slower"), (("Retry-After", "7"),)),
        Answer(200, "ok", (("ETag", TAG),)),
    ]
    vendor(lambda method, path: answers.pop(0))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    storage.forget_client()
    slept: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", slept.append)
    assert storage.read_bytes(f"{s3_store}/a") == b"ok"
    assert slept == [7]


@pytest.mark.parametrize(("said", "seconds"), [("3", 3), ("0", 0), ("99999999", 30), ("Wed, 21 Oct 2026", 0), ("x", 0)])
def test_no_server_makes_us_wait_for_long(said, seconds):
    from botocore.exceptions import ClientError

    answer = {"Error": {}, "ResponseMetadata": {"HTTPHeaders": {"Retry-After": said}}}
    assert s3_errors.wait_asked(ClientError(answer, "GET")) == seconds


@pytest.mark.parametrize(
    ("status", "headers", "kind"),
    [
        (204, {"Content-Length": "0"}, "whole range"),
        (206, {"Content-Range": "bytes 0-4/100"}, "whole"),
        (206, {"Content-Range": "bytes 10-14/100"}, "range"),
        (206, {"Content-Range": "bytes 0-9/100"}, "range"),
        (200, {"Content-Length": "-5"}, "whole range size"),
        (200, {"Content-Length": "5, 5"}, "whole range size"),
        (200, {"Content-Length": "9"}, "whole range"),
        (304, {}, "whole range size"),
    ],
)
def test_an_answer_of_another_length_or_range_gives_no_bytes(vendor, s3_store, monkeypatch, status, headers, kind):
    vendor(Answer(status, "hello", (("ETag", TAG), *headers.items())))
    monkeypatch.setenv("ZHLLAMA_S3_TIMEOUT", "1")
    storage.forget_client()
    asks = {
        "whole": storage.read_bytes,
        "range": lambda uri: storage.read_bytes(uri, 0, 5),
        "size": storage.size_of,
    }
    for ask in kind.split():
        with pytest.raises((StorageFault, InputError)):
            asks[ask](f"{s3_store}/a")


def test_a_login_page_in_place_of_a_completion_is_none(vendor, s3_store):
    def answer(method: str, path: str) -> Answer:
        if method == "POST":
            begun = "uploads" in path
            result = "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
            return Answer(200, result if begun else "<html><title>Log in</title></html>")
        result = "<ListMultipartUploadsResult></ListMultipartUploadsResult>"
        return Answer(200, "", (("ETag", '"1"'),)) if method == "PUT" else Answer(200, result)

    vendor(answer)
    upload = multipart.Upload(f"{s3_store}/a")
    upload.put(1, b"1")
    with pytest.raises(InputError, match="what answers there is no S3 server"):
        upload.complete()


def test_a_port_that_wants_TLS_says_so(vendor, s3_store):
    vendor(Answer(400, "Client sent an HTTP request to an HTTPS server."))
    with pytest.raises(InputError, match="speaks https only; write https://127"):
        storage.read_bytes(f"{s3_store}/a")
    with pytest.raises(InputError, match="speaks https only; write https://127"):
        storage.check_writable(s3_store)


def test_https_asked_of_a_plain_port_is_no_matter_of_certificates(s3_store, monkeypatch):
    monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", os.environ["ZHLLAMA_S3_ENDPOINT"].replace("http:", "https:"))
    storage.forget_client()
    for ask in (storage.read_bytes, storage.size_of):
        with pytest.raises(InputError, match="does not speak https; write http://"):
            ask(f"{s3_store}/a")


# --- credentials, where HEAD says nothing -----------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "status"), [("size", 400), ("exists", 401), ("copy", 403), ("writable", 400)])
def test_credentials_are_read_again_where_HEAD_says_no_more_than_a_status(
    proxy, s3_store, monkeypatch, tmp_path, call, status
):
    storage.write_bytes(f"{s3_store}/a", b"one")
    right = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    file = tmp_path / "credentials"

    def write(token: str) -> None:
        lines = ["[default]", f"aws_access_key_id = {right[0]}", f"aws_secret_access_key = {right[1]}"]
        file.write_text("\n".join([*lines, *([f"aws_session_token = {token}"] if token else [])]))

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    write("over")
    storage.forget_client()

    def decide(request: Request) -> Fault | None:
        if request.headers.get("x-amz-security-token") == "over":
            write("")
            return Fault("status", status=status, code="ExpiredToken")
        return None

    proxy.fault = decide
    CALLS[call](f"{s3_store}/a")
    assert sum("x-amz-security-token" in request.headers for request in proxy.requests) <= 2


# --- uploads ----------------------------------------------------------------------------------------------------------

CONTENT = os.urandom(2 * PART + 100)


@pytest.mark.parametrize("kind", ["SHA256", "CRC32"])
def test_an_upload_that_was_begun_with_another_checksum_is_left_and_all_is_sent_anew(proxy, s3_store, kind):
    from zhllama.storage import s3

    key = f"{s3_store}/a".removeprefix("s3://tests/")
    begun = s3.call(s3_store, "create_multipart_upload", Key=key, ChecksumAlgorithm=kind)["UploadId"]
    with storage.committed(storage.open_writer(f"{s3_store}/a")) as writer:
        writer.write(CONTENT)
    assert storage.read_bytes(f"{s3_store}/a") == CONTENT
    assert [upload.id for upload in storage.unfinished(s3_store)] == [begun]


def test_an_upload_whose_kind_of_checksum_is_listed_is_left_without_a_request(vendor, s3_store):
    prefix = s3_store.removeprefix("s3://tests/")

    def listed(kind: str, number: int) -> str:
        began = f"<Initiated>2026-01-0{number}T00:00:00Z</Initiated><ChecksumAlgorithm>{kind}</ChecksumAlgorithm>"
        return f"<Upload><Key>{prefix}/a</Key><UploadId>{kind}</UploadId>{began}</Upload>"

    def answer(method: str, path: str) -> Answer:
        if "uploadId=" in path:
            return Answer(200, "<ListPartsResult></ListPartsResult>")
        uploads = "".join(listed(kind, number) for number, kind in enumerate(("CRC32C", "SHA256", "CRC64NVME"), 1))
        return Answer(200, f"<ListMultipartUploadsResult>{uploads}</ListMultipartUploadsResult>")

    vendor(answer)
    assert storage.Upload(f"{s3_store}/a")._id == "CRC32C"
    assert storage.Upload(f"{s3_store}/a", md5=True)._id == "CRC64NVME"


@pytest.mark.parametrize(
    ("listed", "told", "part"),
    [
        ("<ChecksumAlgorithm>SHA256</ChecksumAlgorithm>", "", ""),
        ("", "<ChecksumAlgorithm>SHA1</ChecksumAlgorithm><ChecksumType>COMPOSITE</ChecksumType>", ""),
        ("", "<ChecksumAlgorithm>CRC64NVME</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>", ""),
        ("", "", "<ChecksumCRC64NVME>AAAAAAAAAAA=</ChecksumCRC64NVME>"),
        ("", "", "<ChecksumSHA256>47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=</ChecksumSHA256>"),
        ("<ChecksumAlgorithm>CRC32C</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>", "", ""),
        ("", "<ChecksumAlgorithm>CRC32C</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>", ""),
    ],
)
def test_an_upload_of_another_program_is_known_by_whatever_list_says_so(vendor, s3_store, listed, told, part):
    """AWS says the kind in both lists, MinIO in that of the parts alone, some with the parts only."""
    prefix = s3_store.removeprefix("s3://tests/")

    def answer(method: str, path: str) -> Answer:
        if method == "POST":
            return Answer(
                200, "<InitiateMultipartUploadResult><UploadId>new</UploadId></InitiateMultipartUploadResult>"
            )
        if "uploadId=" in path:
            one = f"<Part><PartNumber>1</PartNumber><ETag>{TAG}</ETag><Size>5</Size>{part}</Part>"
            return Answer(200, f"<ListPartsResult>{told}{one}</ListPartsResult>")
        one = f"<Key>{prefix}/a</Key><UploadId>old</UploadId><Initiated>2026-01-01T00:00:00Z</Initiated>{listed}"
        return Answer(200, f"<ListMultipartUploadsResult><Upload>{one}</Upload></ListMultipartUploadsResult>")

    vendor(answer)
    assert storage.Upload(f"{s3_store}/a")._id == "new"


def test_parts_that_were_to_be_kept_of_an_upload_that_takes_no_others_are_dropped_once(proxy, s3_store):
    """What was kept is not at hand: this run ends with a fault, and the next one begins anew."""
    storage.Upload(f"{s3_store}/a", md5=True).put(1, CONTENT[:PART])
    proxy.fault = lambda request: Fault("status", status=400, code="InvalidRequest") if request.kind == "part" else None
    upload = storage.Upload(f"{s3_store}/a", md5=True)
    upload.keep(1)
    with pytest.raises(StorageFault, match=r"cannot be gone on with, and is dropped; try again .*InvalidRequest"):
        upload.put(2, b"two")
    assert storage.unfinished(s3_store) == []


@pytest.mark.parametrize("tags", ["MD5", "no MD5"])
def test_a_completion_whose_answer_was_lost_is_no_reason_to_send_all_again(proxy, s3_store, monkeypatch, tags):
    if tags == "no MD5":
        monkeypatch.setattr(multipart, "_TAG", re.compile("nothing"))
    lost = threading.Event()

    def decide(request: Request) -> Fault | None:
        if request.kind == "complete" and not lost.is_set():
            lost.set()
            return Fault("lost")
        return None

    proxy.fault = decide
    with storage.committed(storage.open_writer(f"{s3_store}/a")) as writer:
        writer.write(CONTENT)
    assert lost.is_set()
    assert proxy.kinds().count("part") == 3
    assert storage.read_bytes(f"{s3_store}/a") == CONTENT


def test_an_object_of_other_bytes_is_not_taken_for_ours(proxy, s3_store, monkeypatch):
    monkeypatch.setattr(multipart, "_TAG", re.compile("nothing"))
    upload = storage.Upload(f"{s3_store}/a")
    upload.put(1, b"mine")
    upload.abort()
    storage.write_bytes(f"{s3_store}/a", b"your")
    with pytest.raises(StorageFault, match="the upload is gone"):
        upload.complete()


def test_all_uploads_of_a_bucket_are_listed_and_filtered(proxy, s3_store):
    """MinIO takes the prefix of this call for a whole key."""
    storage.Upload(f"{s3_store}/below/a").put(1, b"one")
    storage.Upload(f"{s3_store}-beside/a").put(1, b"other")
    proxy.forget()
    assert [upload.uri for upload in storage.unfinished(s3_store)] == [f"{s3_store}/below/a"]
    asked = [request.target for request in proxy.requests if request.kind == "uploads"]
    assert not any(re.search("[?&]prefix=[^&]", target) for target in asked)


def test_an_object_that_is_replaced_again_and_again_is_given_up(proxy, s3_store):
    storage.write_bytes(f"{s3_store}/a", CONTENT)
    proxy.fault = lambda request: (
        None
        if request.kind != "get"
        else Fault("status", status=412, code="PreconditionFailed")
        if "if-match" in request.headers
        else Fault("reset answer", 0.95)
    )
    with pytest.raises(StorageFault, match="replaced 5 times while it was read"):
        storage.read_bytes(f"{s3_store}/a", 0, len(CONTENT))


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (501, "NotImplemented", "A header you provided implies functionality that is not implemented."),
        (501, "", ""),
        (400, "InvalidRequest", "Unsupported header 'If-None-Match' received for this API call."),
    ],
)
def test_a_store_without_conditional_writes_takes_a_file_once_all_the_same(proxy, s3_store, status, code, message):
    fault = Fault("status", status=status, code=code, message=message)
    proxy.fault = lambda request: fault if "if-none-match" in request.headers else None
    storage.write_bytes(f"{s3_store}/a", b"1", if_absent=True)
    with pytest.raises(FileExistsError):
        storage.write_bytes(f"{s3_store}/a", b"2", if_absent=True)
    assert storage.read_bytes(f"{s3_store}/a") == b"1"


def test_a_write_that_is_refused_for_another_reason_is_not_made_without_its_condition(proxy, s3_store):
    fault = Fault("status", status=400, code="InvalidRequest", message="no")
    proxy.fault = lambda request: fault if "if-none-match" in request.headers else None
    with pytest.raises(InputError, match="refuses this request"):
        storage.write_bytes(f"{s3_store}/a", b"1", if_absent=True)
    assert not storage.exists(f"{s3_store}/a")


def test_R2_takes_no_object_of_more_than_its_equal_parts_hold(s3_store, monkeypatch):
    storage.check_size(f"{s3_store}/a", 400 * 10**9)
    with pytest.raises(InputError, match=r"over 419\.4 GB"):
        storage.check_size(f"{s3_store}/a", 420 * 10**9)
    monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", "https://0123.eu.r2.cloudflarestorage.com")
    storage.forget_client()
    storage.check_size(f"{s3_store}/a", 83 * 10**9)
    with pytest.raises(InputError, match=r"over 83\.9 GB, .* parts of one size, which this store wants; split it"):
        storage.check_size(f"{s3_store}/a", 84 * 10**9)
    storage.check_size("/a/folder", 10**15)


# --- listings that lag, disks that are full ---------------------------------------------------------------------------


def test_what_a_listing_does_not_show_yet_is_asked_for_by_itself(store, monkeypatch):
    out = ArtifactWriter(store, "stage", "key")
    out.add_bytes("a", b"one")
    out.publish("files")
    monkeypatch.setattr(storage, "listing", lambda uri, hidden=False: [])
    assert find_published(store, "stage", "key") is not None
    storage.delete(f"{out.root}/a")
    assert find_published(store, "stage", "key") is None


def test_a_full_disk_below_this_machines_server_is_said(proxy, s3_store, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage.forget_client()
    proxy.fault = lambda request: Fault("status", status=500)
    monkeypatch.setenv(s3_errors.LOCAL_FOLDER, str(tmp_path))
    monkeypatch.setattr(s3_errors, "_LITTLE", 0)
    with pytest.raises(StorageFault, match="S3 answered InternalError"):
        storage.write_bytes(f"{s3_store}/a", b"1")
    monkeypatch.setattr(s3_errors, "_LITTLE", 2**60)
    with pytest.raises(InputError, match=rf"answered InternalError, and {tmp_path} has .* left; free some there"):
        storage.write_bytes(f"{s3_store}/a", b"1")


def test_room_is_asked_of_a_folder_and_of_this_machines_server(s3_store, monkeypatch, tmp_path):
    monkeypatch.delenv(s3_errors.LOCAL_FOLDER)
    storage.require_room(s3_store, 10**18)
    monkeypatch.setenv(s3_errors.LOCAL_FOLDER, str(tmp_path))
    for root in (s3_store, str(tmp_path / "store")):
        storage.require_room(root, 10)
        with pytest.raises(InputError, match=rf"--store {tmp_path}: 1000000.0 TB will be needed and .* are free"):
            storage.require_room(root, 10**18)


def test_what_a_killed_run_has_left_needs_no_room(s3_store, monkeypatch, tmp_path):
    monkeypatch.setenv(s3_errors.LOCAL_FOLDER, str(tmp_path))
    asked: list[int] = []
    monkeypatch.setattr(storage.folders, "require_space", lambda uri, need, what: asked.append(need))
    for root in (s3_store, str(tmp_path / "store")):
        storage.write_bytes(f"{root}/.a.parts", b"x" * 1000)
        storage.require_room(root, 1500)
    storage.Upload(f"{s3_store}/b").put(1, b"x" * 300)
    storage.require_room(s3_store, 1500)
    assert asked == [500, 500, 200]


def test_the_local_server_says_where_its_data_lie(s3_server):
    assert Path(s3_server.environment()[s3_errors.LOCAL_FOLDER]) == s3_server.folder
