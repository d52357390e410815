"""The standard AWS settings of a process, boto3's client with them, and the sending of signed requests.

A request is signed by botocore and sent by its HTTP session (connection pool, TLS, CA bundle, proxies). Where a bucket
lies (region, path or host style, custom endpoint) is asked of boto3's client: every AWS setting counts in both.
"""

import os
import socket
import threading
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from zhllama.errors import InputError
from zhllama.mounted_secrets import CREDENTIALS, credentials
from zhllama.storage.addresses import split_s3
from zhllama.storage.parallel import patience
from zhllama.storage.s3_errors import client_error, elsewhere, page_of, region_of, require_answer, require_tag

Buffer = bytes | bytearray | memoryview
ATTEMPTS = 8
"""Of one request, the first included, unless AWS_MAX_ATTEMPTS says otherwise."""
STYLE_VARIABLE = "ZHLLAMA_S3_ADDRESSING_STYLE"
LONGEST_ANSWER = 32 * 2**20
"""Bytes of a listing's page or an error: a thousand keys have some megabytes."""
_CHOICES = {
    STYLE_VARIABLE: ("path", "virtual", "auto"),
    "AWS_REQUEST_CHECKSUM_CALCULATION": ("when_supported", "when_required"),
    "AWS_RESPONSE_CHECKSUM_VALIDATION": ("when_supported", "when_required"),
}
SETTINGS = (
    "ZHLLAMA_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", *_CHOICES, "ZHLLAMA_S3_CONNECTIONS", "ZHLLAMA_S3_TIMEOUT",
    "AWS_MAX_ATTEMPTS",
)  # fmt: skip
"""Variables that say how a server is spoken to, whoever speaks: a launcher's are its job's, where no secret says."""
PLACES = ("AWS_DEFAULT_REGION", "AWS_CA_BUNDLE")
"""Those that differ from a laptop to a pod. In a pod the bundle may be the certificates themselves (zhllama.stage.tls).
"""


class Session:
    """The standard AWS settings of this process: credentials, client, connection pool."""

    def __init__(self, endpoint: str | None) -> None:
        import boto3
        import botocore.session
        from botocore.config import Config
        from botocore.httpsession import URLLib3Session
        from botocore.utils import get_environ_proxies

        _bound_answers()
        # a session of its own: boto3's default one is shared by threads and keeps the first credentials it found
        core = botocore.session.Session()
        core.get_component("credential_provider").insert_after("env", _mounted())
        session = boto3.session.Session(botocore_session=core)
        try:
            self.attempts = int(core.get_config_variable("max_attempts") or ATTEMPTS)
        except ValueError as error:
            raise InputError(f"AWS_MAX_ATTEMPTS: {error}; give a whole number, 1 or more") from error
        chosen = {name: _choice(name) for name in _CHOICES}[STYLE_VARIABLE]
        # our own endpoint is a server on a laptop or in a cluster: bucket names are no host names there
        if endpoint and not chosen and "addressing_style" not in core.get_scoped_config().get("s3", {}):
            chosen = "path"
        config = Config(
            signature_version="s3v4",
            retries={"mode": "standard", "total_max_attempts": min(self.attempts, 5)},
            connect_timeout=10,
            read_timeout=patience(),
            max_pool_connections=32,
            s3={"addressing_style": chosen} if chosen else None,
        )
        self._new_client = partial(session.client, "s3", endpoint_url=endpoint, config=config)
        try:
            self.client = self._new_client()
        except ValueError as error:
            text = f"ZHLLAMA_S3_ENDPOINT={endpoint}: {error}; write http://host:port or https://host"
            raise InputError(text) from error
        events = self.client.meta.events
        # before boto3's search for the bucket's region, which follows a proxy's redirect until Python's stack is full
        events.register_first("needs-retry.s3", self._refuse_strangers)
        events.register_first("before-parse.s3.*", self._require_answer)
        self.checksums = self.client.meta.config.request_checksum_calculation
        self.credentials = session.get_credentials()
        self._http = URLLib3Session(
            verify=core.get_config_variable("ca_bundle") or True,
            proxies=get_environ_proxies(self.client.meta.endpoint_url),
            timeout=(10, patience()),
            max_pool_connections=64,
            # head and body of a request are two packets: without this a body waits 40 ms until the head is acknowledged
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        self._buckets: dict[str, tuple[str, str, str]] = {}

    def _bucket(self, bucket: str, region: str | None = None) -> tuple[str, str, str]:
        """Where boto3 would send a request: the address before the key, and the region and service to sign for."""
        if region or bucket not in self._buckets:
            client = self._new_client(region_name=region) if region else self.client
            url = urlsplit(client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"}))
            scope = parse_qs(url.query)["X-Amz-Credential"][0].split("/")
            self._buckets[bucket] = f"{url.scheme}://{url.netloc}{url.path.removesuffix('/k')}", scope[-3], scope[-2]
        return self._buckets[bucket]

    def moved(self, bucket: str, region: str) -> bool:
        """The server named another region than the settings: from now on it is asked there."""
        return self._bucket(bucket)[1] != region and bool(self._bucket(bucket, region))

    def send(self, method: str, uri: str, headers: Mapping[str, str], body: Buffer = b"", query: str = "") -> Any:
        """One signed request; returns botocore's AWSResponse. ClientError for an error of the server's."""
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSPreparedRequest, AWSRequest
        from botocore.exceptions import NoCredentialsError, ResponseStreamingError

        if self.credentials is None:
            raise NoCredentialsError
        bucket, key = split_s3(uri)
        address, region, service = self._bucket(bucket)
        url = f"{address}/{quote(key, safe='/~')}" + (f"?{query}" if query else "")
        request = AWSRequest(method, url, headers=dict(headers))
        signer = S3SigV4Auth(self.credentials.get_frozen_credentials(), service, region)
        # the payload's digest that the request itself names: large bodies are hashed once, by their owner
        signer.payload = lambda _: headers.get("X-Amz-Content-SHA256", "UNSIGNED-PAYLOAD")
        signer.add_auth(request)
        if method == "PUT":
            request.headers["Content-Length"] = str(len(body))
        prepared = AWSPreparedRequest(method, url, dict(request.headers.items()), body or None, method == "GET")
        response = self._http.send(prepared)
        if response.status_code >= 300:
            raise client_error(method, response, self.client.meta.endpoint_url)
        require_tag(self.client.meta.endpoint_url, response.headers)
        if response.status_code not in (200, 206 if "Range" in headers else 200) and method == "GET":
            raise ResponseStreamingError(error=f"GET was answered with {response.status_code}")
        return response

    def _refuse_strangers(self, response: Any, operation: Any, **_: Any) -> None:
        from botocore.exceptions import ClientError

        if response is None:
            return
        answer, parsed = response
        if refusal := elsewhere(self.client.meta.endpoint_url, answer):
            raise refusal
        if answer.status_code >= 300 and (page := page_of(answer.content)):
            parsed.setdefault("Error", {})["Message"] = page
        # boto3 asks for the bucket's region with this, and with this again where the answer names none
        if operation.name == "HeadBucket" and answer.status_code in (301, 307) and not region_of(parsed):
            raise ClientError(parsed, operation.name)

    def _require_answer(self, operation_model: Any, response_dict: dict[str, Any], **_: Any) -> None:
        require_answer(self.client.meta.endpoint_url, operation_model.name, response_dict)


@lru_cache(maxsize=1)
def _bound_answers() -> None:
    """What botocore holds as a whole (a listing, an error; never an object of ours) has an end: OSError where it has
    none."""
    from botocore.awsrequest import AWSResponse

    def content(self: Any) -> bytes:
        if self._content is None:
            held = bytearray()
            for chunk in self.raw.stream():
                held += chunk
                if len(held) > LONGEST_ANSWER:
                    self.raw.close()
                    raise OSError(f"an answer has more than {LONGEST_ANSWER:,} bytes")
            self._content = bytes(held)
        return bytes(self._content)

    setattr(AWSResponse, "content", property(content))  # noqa: B010 - to mypy it is no variable


def _mounted() -> Any:
    """botocore's provider of credentials from a mounted secret: variables stand over it, and it over what is left."""
    from botocore.credentials import CredentialProvider, Credentials

    class Mounted(CredentialProvider):
        METHOD = "mounted-secret"

        def load(self) -> Any:
            found = credentials()
            return Credentials(*map(found.get, CREDENTIALS), method=self.METHOD) if found else None

    return Mounted()


def _choice(name: str) -> str:
    """What a variable says, "" where it says nothing. InputError for another word than it may have."""
    value = os.environ.get(name, "").strip()
    # botocore takes its own words in capitals too
    if value and (value.lower() if name.startswith("AWS_") else value) not in _CHOICES[name]:
        raise InputError(f"{name}={value}: use {' or '.join(_CHOICES[name])}")
    return value


_session_for = lru_cache(maxsize=4)(lambda endpoint, process: Session(endpoint))
_making = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_making=threading.Lock()))


def current_session() -> Session:
    """The one of this process (a forked child gets its own) and of the endpoint that is set now."""
    with _making:
        return _session_for(os.environ.get("ZHLLAMA_S3_ENDPOINT") or None, os.getpid())


def forget_client() -> None:
    """The settings are read again at the next request."""
    _session_for.cache_clear()
