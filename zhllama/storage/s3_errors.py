"""S3's errors as ours, as storage/__init__.py says; a condition that does not hold is a FileExistsError.

What a server's code means stands in one table, for AWS, MinIO, Ceph, SeaweedFS, R2, Google's XML API, Alibaba's OSS,
Tencent's COS and Huawei's OBS. A code that nobody knows is judged by its HTTP status: 5xx is tried again, 4xx is not.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from xml.etree import ElementTree

from zhllama.errors import InputError, StorageFault
from zhllama.progress import human
from zhllama.secret_text import mask
from zhllama.storage.addresses import split_s3

LOCAL_FOLDER = "ZHLLAMA_S3_FOLDER"
"""Where the S3 server of this machine keeps its data: it cannot say that a disk is full, but the disk can."""
_LITTLE = 256 * 2**20
"""Bytes left on its disk at which SeaweedFS may fail."""
_SKEW = timedelta(minutes=10)
"""S3 takes 15 minutes; a clock that is more than this off is worth a word where nothing else was said."""
_LONGEST = 400
"""Letters of a server's message that are shown."""
_WANTS_TLS = re.compile(rb"HTTPS server|HTTPS port|TLS-encrypted|XMinioInsecureClientRequest")
_NO_CHECKSUM = re.compile(
    r"(?is)(?=.*(unsupported|not (supported|implemented|allowed)|invalid argument))"
    r".*(x-amz-(sdk-)?checksum|x-amz-trailer|aws-chunked)"
)
_PAGE = re.compile(rb"\s*(<!--.*?-->\s*|<\?xml[^>]*>\s*)*<(!doctype\s+)?html\b", re.IGNORECASE | re.DOTALL)
_RESULT = re.compile(rb"\s*(<\?xml[^>]*>\s*)?<(\w+:)?\w+Result\b")
_BODYLESS = ("HeadBucket", "HeadObject", "DeleteObject", "AbortMultipartUpload")
"""Of boto3's operations, those whose answer has no body."""
_LONGEST_WAIT = 30.0
"""Seconds that a server may ask us to wait (Retry-After)."""


@dataclass(frozen=True, eq=False)
class Kind:
    """What a code means: what is said of it (`{}`: the bucket), and how it is mended."""

    says: str = ""
    mend: str = ""
    error: type[Exception] = InputError


ABSENT, CONDITION = Kind(error=FileNotFoundError), Kind(error=FileExistsError)
AGAIN = Kind("S3 answered", "try again", StorageFault)
"""The same request may be answered later: throttling, a server in trouble, a byte lost on the way."""
LATER = Kind("S3 answered", "try again", StorageFault)
"""The work may be done when it is begun again, but not by the same request."""
_CHECK = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
CREDENTIALS = Kind(
    "S3 refuses these credentials",
    f"{_CHECK} (and AWS_SESSION_TOKEN where there is one) and the rights of this account on the bucket",
)
"""Credentials that are not, or are no longer, valid: read again once."""
RIGHTS = Kind("S3 refuses these credentials", f"{_CHECK} and the rights of this account on the bucket")
ACCOUNT = Kind("S3 says that the account or the bucket is locked", "ask who runs the store")
BUCKET = Kind("there is no bucket {}", "create it, or correct the address")
CLOCK = Kind("the clocks of this machine and of the S3 server differ", "set this machine's (NTP)")
ARCHIVE = Kind("the object is in an archive and cannot be read", "restore it first")
STYLE = Kind(
    "S3 wants bucket names elsewhere in its addresses",
    "set the addressing style, virtual or path (docs/storage.md, Settings)",
)
REGION = Kind(
    "S3 says the bucket is in another region or at another endpoint", "set AWS_DEFAULT_REGION and the endpoint"
)
FULL = Kind("the store is full or its quota is used up", "free some (zhllama gc), or have the quota raised")
CHECKSUM = Kind(
    "S3 does not know this kind of checksum",
    "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required (docs/storage.md, Settings)",
)
PROXY = Kind(
    "what answers is no S3 server but something in front of it",
    "check the endpoint, HTTPS_PROXY, HTTP_PROXY and NO_PROXY",
)
REFUSED = Kind("S3 refuses this request", "the same request will not be answered otherwise (docs/storage.md, Errors)")

_TABLE: Mapping[Kind, str] = {
    ABSENT: "NoSuchKey 404 NotFound NoSuchVersion NoSuchObject",
    CONDITION: "PreconditionFailed 412 ConditionalRequestConflict FileAlreadyExists",
    BUCKET: "NoSuchBucket InvalidBucketName",
    CREDENTIALS: """
        InvalidAccessKeyId SignatureDoesNotMatch InvalidToken InvalidTokenId ExpiredToken ExpiredTokenException
        TokenRefreshRequired InvalidSecurityToken SecurityTokenExpired SecurityTokenNotSupported
        AccessKeyIdAndSecurityTokenNotMatch InvalidClientTokenId UnrecognizedClientException Unauthorized
        UnauthorizedAccess AuthenticationRequired InvalidSecurity AuthFailure InvalidCredentials NotSignedUp""",
    RIGHTS: "AccessDenied AccessDeniedException AccessForbidden Forbidden BucketNotBelongTo 401 403",
    ACCOUNT: """
        AccountProblem AllAccessDisabled UserSuspended InDebt InDebtOverdue UserDisable BucketDisable
        AbnormalBucketOwnerStatus Arrearage InvalidPayer UnavailableForLegalReasons UserProjectAccountProblem
        UserProjectMissing AccountClosed AccountIsDisabled AccountDisabled AccountSuspended FrozenAccount
        ServiceDisabled""",
    CLOCK: """
        RequestTimeTooSkewed RequestTimeSkewed RequestExpired ExpiredRequest RequestNotReadyYet RequestInTheFuture
        InvalidDate MalformedDate""",
    ARCHIVE: """
        InvalidObjectState ObjectNotInActiveTierError ObjectNotInActiveTier RestoreAlreadyInProgress BlobArchived
        BlobBeingRehydrated""",
    STYLE: "SecondLevelDomainForbidden PathStyleDomainForbidden InvalidPathAccess VirtualHostDomainRequired",
    REGION: """
        PermanentRedirect PermanentRedirectControlError AuthorizationHeaderMalformed IllegalLocationConstraint
        IllegalLocationConstraintException InvalidLocationConstraint InvalidRegionName InvalidRegion WrongRegion
        EndpointNotFound 301""",
    FULL: """
        XMinioStorageFull XMinioAdminBucketQuotaExceeded QuotaExceeded BucketQuotaExceeded StorageQuotaExceeded
        InsufficientStorage InsufficientStorageSpace InsufficientCapacity QuotaExceed ExceedQuota StorageCapExceeded
        TransactionCapExceeded DownloadCapExceeded 507""",
    AGAIN: """
        SlowDown SlowDownRead SlowDownWrite ServerBusy RequestTimeout InternalError ServiceUnavailable Throttling
        ThrottlingException RequestThrottled RequestLimitExceeded TooManyRequests RateLimitExceeded QpsLimitExceeded
        BandwidthLimitExceeded DownloadTrafficRateLimitExceeded UploadTrafficRateLimitExceeded OperationAborted
        TemporaryRedirect XMinioBackendDown ClientDisconnected BadDigest CrcMismatch XAmzContentChecksumMismatch
        XAmzContentSHA256Mismatch IncompleteBody 307 408 425 429 499""",
    PROXY: "407 511",
    LATER: "NoSuchUpload InvalidPart InvalidPartOrder InvalidRange 416",
}
_KINDS = {code: kind for kind, codes in _TABLE.items() for code in codes.split()}


def kind_of(error: Any) -> Kind:
    """What a ClientError means."""
    code, status = code_and_status(error)
    if 400 <= status < 500 and status not in (408, 429) and _words(error).startswith(f": {_A_PAGE}"):
        return PROXY
    if code.isdigit() and status in (400, 401, 403) and (_skew(error) or timedelta()) > _SKEW:
        # HEAD has no body: of a request that seems to come from another hour, no more is said
        return CLOCK
    if code == "AccessDenied" and error.response["Error"].get("Endpoint"):
        # as OSS says that a bucket is elsewhere
        return REGION
    if status in (400, 501) and _NO_CHECKSUM.match(_words(error)):
        return CHECKSUM
    known = _KINDS.get(code) or _KINDS.get(str(status))
    return known or (AGAIN if status >= 500 and status != 501 else REFUSED)


def worth_reading_again(error: Any) -> bool:
    """Whether other credentials may be answered otherwise: these are refused, or nothing was said but a status."""
    code, status = code_and_status(error)
    return kind_of(error) is CREDENTIALS or (code.isdigit() and status in (400, 401, 403))


def client_error(method: str, response: Any, endpoint: str) -> Exception:
    """What an answer of 300 or more is, as botocore would say it; or as we do, where no S3 server speaks."""
    from botocore.exceptions import ClientError, ResponseStreamingError
    from urllib3.exceptions import HTTPError

    status = response.status_code
    try:
        # what the answer says of its encoding is not believed: a byte that flips there names one that nobody knows
        text = ElementTree.fromstring(response.content, ElementTree.XMLParser(encoding="utf-8"))
        said = {one.tag.rpartition("}")[2]: one.text or "" for one in text} if text.tag.endswith("Error") else {}
    except (HTTPError, OSError) as error:
        return ResponseStreamingError(error=error)
    except ElementTree.ParseError:
        said = {}
    if refusal := elsewhere(endpoint, response):
        return refusal
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": dict(response.headers.items())}
    said |= {"Code": said.get("Code") or str(status), "Message": said.get("Message") or page_of(response.content)}
    return ClientError({"Error": said, "ResponseMetadata": metadata}, method)


def elsewhere(endpoint: str, response: Any) -> InputError | None:
    """What is said of an answer that is none of S3's own: a proxy that sends elsewhere, a port that wants TLS."""
    asked, status, to = urlsplit(response.url), response.status_code, response.headers.get("Location")
    if status == 400 and asked.scheme == "http" and _WANTS_TLS.search(response.content):
        return InputError(f"{endpoint}: the endpoint speaks https only; write {endpoint.replace('http:', 'https:', 1)}")
    if not 300 < status < 309 or not to or "x-amz-bucket-region" in response.headers or b"<Code>" in response.content:
        return None
    sent, own = urlsplit(to), urlsplit(endpoint)
    if sent.scheme == "https" and sent.path == asked.path:
        # the bucket may stand before the endpoint's name
        host = (own.hostname or "") if sent.hostname == asked.hostname else sent.hostname
        port = f":{sent.port}" if sent.port else ""
        return InputError(f"{endpoint}: the endpoint sends to https://{host}{port}; write that")
    where = f"{sent.scheme}://{sent.netloc.rpartition('@')[2]}" if sent.netloc else "another page"
    said = f"the endpoint sends to {where}, as no S3 server does (a login page?)"
    return InputError(f"{endpoint}: {said}; write the S3 server's own address")


_A_PAGE = "a page of HTML"


def page_of(body: bytes) -> str:
    """`a page of HTML (Sign in)`, as no S3 server answers with; "" for anything else."""
    if not _PAGE.match(body):
        return ""
    title = re.search(r"<title[^>]*>([^<]{1,80})", body.decode(errors="replace"), re.IGNORECASE)
    return f"{_A_PAGE} ({_shown(title[1])})" if title else _A_PAGE


def require_answer(endpoint: str, operation: str, answer: dict[str, Any]) -> None:
    """Looks at boto3's answers of 2xx before they are read, for botocore finds an empty list, or a copy that was made,
    in any page. InputError for one; what is otherwise no answer becomes an error that passes, as a cut-off one is."""
    if answer["status_code"] >= 300:
        return
    body, headers = bytes(answer["body"]), answer["headers"]
    if page_of(body):
        raise _stranger(endpoint)
    if operation == "HeadObject":
        require_tag(endpoint, headers)
        readable = str(headers.get("Content-Length", "0")).isdigit()
    else:
        readable = not body if operation in _BODYLESS else bool(_RESULT.match(body)) or b"<Error>" in body
    if not readable:
        said = f"<Code>InternalError</Code><Message>what came is no answer to {operation}</Message>"
        answer |= {"status_code": 500, "body": f"<Error>{said}</Error>".encode()}


def region_of(parsed: dict[str, Any]) -> str:
    """The region in which the server says that a bucket is; "" where it says none."""
    found = _headers(parsed).get("x-amz-bucket-region")
    return str(found or parsed.get("Error", {}).get("Region") or "")


def wait_asked(error: BaseException) -> float:
    """Seconds after which the server wants the same request again (Retry-After)."""
    said = _headers(getattr(error, "response", None) or {}).get("retry-after", "")
    return min(float(said), _LONGEST_WAIT) if said.isdigit() else 0.0


def _headers(answer: dict[str, Any]) -> dict[str, str]:
    return {key.lower(): value for key, value in answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).items()}


def _stranger(endpoint: str) -> InputError:
    said = "what answers there is no S3 server (a login page?)"
    return InputError(f"{endpoint}: {said}; write the S3 server's own address")


def require_tag(endpoint: str, headers: Mapping[str, str]) -> None:
    """InputError where an object's answer has no ETag, as each of S3's has: a login page says 200 to everything."""
    if "ETag" not in headers:
        raise _stranger(endpoint)


@contextmanager
def mapped(uri: str) -> Iterator[None]:
    """Turns botocore's exceptions into ours."""
    from botocore import exceptions as boto

    endpoint = os.environ.get("ZHLLAMA_S3_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL_S3") or "the AWS endpoint"
    try:
        yield
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound) as error:
        mend = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise InputError(f"{uri}: no S3 credentials ({error}); {mend}") from error
    except boto.NoRegionError as error:
        raise InputError(f"{uri}: no S3 region; set AWS_DEFAULT_REGION") from error
    except boto.ClientError as error:
        raise our_error(uri, error) from error
    except (boto.EndpointConnectionError, boto.ConnectTimeoutError) as error:
        raise StorageFault(f"{uri}: no S3 server answers at {endpoint}; check the endpoint and the network") from error
    except boto.SSLError as error:
        if "WRONG_VERSION_NUMBER" in str(error):
            raise InputError(f"{uri}: {endpoint} does not speak https; write http://, or another port") from error
        wrong = f"the certificate of {endpoint} is not accepted ({error})"
        raise InputError(f"{uri}: {wrong}; name its CA in AWS_CA_BUNDLE") from error
    except (boto.HTTPClientError, boto.IncompleteReadError) as error:
        raise StorageFault(f"{uri}: the connection to S3 failed ({error}); try again") from error
    except boto.BotoCoreError as error:
        raise InputError(f"{uri}: S3 settings are wrong ({error}); check the endpoint, region and profile") from error


def our_error(uri: str, error: Any) -> Exception:
    kind = kind_of(error)
    if kind in (ABSENT, CONDITION):
        return kind.error(uri)
    code, status = code_and_status(error)
    if status >= 500 and (folder := os.environ.get(LOCAL_FOLDER)) and os.path.isdir(folder):
        free = shutil.disk_usage(folder).free
        if free < _LITTLE:
            full = f"this machine's S3 server answered {code}, and {folder} has {human(free, 'B')} left"
            return InputError(f"{uri}: {full}; free some there, or choose another --work")
    words = f"{code or status}{_words(error)}"
    words = f" {words}" if kind.error is StorageFault else f"{_more(kind, error)} ({words})"
    return kind.error(f"{uri}: {kind.says.format(split_s3(uri)[0])}{words}; {kind.mend}")


def _words(error: Any) -> str:
    """`: ` and the server's own words."""
    said = error.response.get("Error", {})
    # Google's message is "Invalid argument." alone, and the reason beside it
    message, more = (str(said.get(name) or "").strip() for name in ("Message", "Details"))
    # what botocore says in place of an answer without a body
    shown = [one for one in (message, more) if one not in ("", "Bad Request", "Forbidden", "Not Found")]
    return f": {_shown(' '.join(shown))}" if shown else ""


def _shown(text: str) -> str:
    """A server's words as one line of bounded length, without what moves a terminal or would let someone in."""
    line = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
    return mask(line)[:_LONGEST]


def _more(kind: Kind, error: Any) -> str:
    said = error.response.get("Error", {})
    if kind is CLOCK and (skew := _skew(error)):
        minutes = round(skew.total_seconds() / 60)
        return f", by {minutes} min" if minutes else ""
    if kind is REGION:
        found = [_shown(str(said[name])) for name in ("Region", "Endpoint") if said.get(name)]
        return f": {', '.join(found)}" if found else ""
    return ""


def _skew(error: Any) -> timedelta | None:
    """How far this machine's clock is from the server's, by the Date of its answer."""
    try:
        return abs(datetime.now(UTC) - parsedate_to_datetime(_headers(error.response).get("date", "")))
    except (TypeError, ValueError):
        return None


def code_and_status(error: Any) -> tuple[str, int]:
    """The server's code and the HTTP status of a ClientError."""
    said, metadata = (error.response.get(key, {}) for key in ("Error", "ResponseMetadata"))
    return str(said.get("Code", "")), int(metadata.get("HTTPStatusCode", 0))


def server_code(error: BaseException) -> str:
    """The server's code behind one of our errors; empty where no server spoke."""
    from botocore.exceptions import ClientError

    return code_and_status(error.__cause__)[0] if isinstance(error.__cause__, ClientError) else ""


def kind_behind(error: BaseException) -> Kind | None:
    """What the server meant, behind one of our errors; None where no server spoke."""
    from botocore.exceptions import ClientError

    return kind_of(error.__cause__) if isinstance(error.__cause__, ClientError) else None


def knows_no_condition(error: BaseException) -> bool:
    """Whether a write was refused because the server does not know its condition (If-None-Match)."""
    from botocore.exceptions import ClientError

    cause = error.__cause__
    if not isinstance(cause, ClientError) or kind_of(cause) is not REFUSED:
        return False
    return code_and_status(cause)[1] == 501 or "if-none-match" in _words(cause).lower()
