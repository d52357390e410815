"""S3's errors as ours, as storage/__init__.py says; a condition that does not hold is a FileExistsError."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

from zhllama.errors import InputError, StorageFault
from zhllama.storage.addresses import split_s3


def client_error(method: str, response: Any) -> Exception:
    from botocore.exceptions import ClientError, ResponseStreamingError
    from urllib3.exceptions import HTTPError

    status = response.status_code
    try:
        # what the answer says of its encoding is not believed: a byte that flips there names one that nobody knows
        text = ElementTree.fromstring(response.content, ElementTree.XMLParser(encoding="utf-8"))
        said = {"Code": text.findtext("Code") or str(status), "Message": text.findtext("Message") or ""}
    except (HTTPError, OSError) as error:
        return ResponseStreamingError(error=error)
    except ElementTree.ParseError:
        said = {"Code": str(status), "Message": ""}
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": dict(response.headers.items())}
    return ClientError({"Error": said, "ResponseMetadata": metadata}, method)


_CREDENTIALS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "InvalidToken")
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
AGAIN = (
    "SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException",
    "RequestLimitExceeded", "BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "IncompleteBody",
)  # fmt: skip
"""What a server says of a request that may succeed when it is sent again; a bad digest is a byte lost on the way."""


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
        wrong = f"the certificate of {endpoint} is not accepted ({error})"
        raise InputError(f"{uri}: {wrong}; name its CA in AWS_CA_BUNDLE") from error
    except (boto.HTTPClientError, boto.IncompleteReadError) as error:
        raise StorageFault(f"{uri}: the connection to S3 failed ({error}); try again") from error
    except boto.BotoCoreError as error:
        raise InputError(f"{uri}: S3 settings are wrong ({error}); check the endpoint, region and profile") from error


def our_error(uri: str, error: Any) -> Exception:
    code, status = code_and_status(error)
    if code in ("NoSuchKey", "404", "NotFound"):
        return FileNotFoundError(uri)
    if code in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
        return FileExistsError(uri)
    if code == "NoSuchBucket":
        return InputError(f"{uri}: there is no bucket {split_s3(uri)[0]}; create it, or correct the address")
    if code in _REGION:
        return InputError(f"{uri}: S3 says the bucket is in another region ({code}); set AWS_DEFAULT_REGION")
    if code in _CREDENTIALS or code in EXPIRED or status in (401, 403):
        mend = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights of this account on the bucket"
        return InputError(f"{uri}: S3 refuses these credentials ({code}); {mend}")
    return StorageFault(f"{uri}: S3 answered {code or status} ({error}); try again")


def code_and_status(error: Any) -> tuple[str, int]:
    """The server's code and the HTTP status of a ClientError."""
    said, metadata = (error.response.get(key, {}) for key in ("Error", "ResponseMetadata"))
    return str(said.get("Code", "")), int(metadata.get("HTTPStatusCode", 0))


def server_code(error: BaseException) -> str:
    """The server's code behind one of our errors; empty where no server spoke."""
    from botocore.exceptions import ClientError

    return code_and_status(error.__cause__)[0] if isinstance(error.__cause__, ClientError) else ""
