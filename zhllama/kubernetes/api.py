"""The Kubernetes API server, as launch_training, serve and the reaper reach it: configured, asked with retries.

A request is made again, for half an hour, while the server is away or busy: as long as a control plane is gone when it
is upgraded. An answer that will not change is raised as the client's ApiException, or turned into one line by
`unanswered`. The client's own hidden retries are off: they repeat a stalled request four times before we hear of it.
"""

import copy
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from zhllama.artifacts.json_file import object_of, value_of
from zhllama.errors import InputError, StorageFault
from zhllama.retries import with_retries

log = logging.getLogger("launch")

GIVE_UP_AFTER = 1800.0
"""Seconds for which an API server may fail or be away."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0
"""Seconds between two attempts: at first about the one, doubled up to the other. What the server asks for, if more."""
LONGEST_ASKED = 60.0
"""Seconds of a server's Retry-After that are waited at most."""
TIMEOUT: tuple[float, float] = (10, 60)
"""Of a request: to connect, and between two bytes."""
CONNECTIONS = 64
LONGEST = 256 * 2**20
"""Bytes of an answer: a list of some ten thousand pods has a tenth."""
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""There in a pod with a token, and nowhere else."""


def connect() -> str:
    """Configures the client, for this pod or from KUBECONFIG, and says the namespace. InputError without a cluster."""
    try:
        settings = copy.deepcopy(_read_account())
        if ACCOUNT.exists():
            namespace = (ACCOUNT / "namespace").read_text().strip()
        else:
            _, current = config.list_kube_config_contexts(os.environ.get("KUBECONFIG"))
            namespace = str(current["context"].get("namespace") or "default")
    except config.ConfigException as error:
        raise InputError(f"no Kubernetes cluster is configured ({error}); set KUBECONFIG, or run in a pod") from error
    settings.refresh_api_key_hook = _as_read_last
    settings.retries = False
    settings.connection_pool_maxsize = CONNECTIONS
    client.Configuration.set_default(settings)
    return namespace


_account: list[client.Configuration] = []
"""Who this process is, as its pod or KUBECONFIG said last."""


def _read_account() -> client.Configuration:
    read = client.Configuration()
    if ACCOUNT.exists():
        config.load_incluster_config(client_configuration=read)
    else:
        config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=read)
    _account[:] = [read]
    return read


def _as_read_last(settings: client.Configuration) -> None:
    """Before each request: a token that was read again is every client's."""
    read = _account[0]
    if read.refresh_api_key_hook is not None:
        read.refresh_api_key_hook(read)
    settings.api_key = read.api_key


def _another_token() -> bool:
    """Whether the account, read again, has another token: they are replaced while a process runs."""
    before = [dict(one.api_key) for one in _account]
    try:
        return before not in ([], [_read_account().api_key])
    except (config.ConfigException, OSError):
        return False


_LASTING = (
    "failed to create typed patch object", "field not declared in schema", "request is too large", "Invalid value",
    " denied the request",
)  # fmt: skip
"""Of a 500 that will be one for ever."""


def passes(error: BaseException) -> bool:
    """Whether the same request may well be answered later."""
    if not isinstance(error, ApiException):
        return isinstance(error, HTTPError)
    match error.status:
        case 401:
            return _another_token()
        case 409:
            # a quota that is counted for others at the same moment: nothing is there yet
            return "on resourcequotas" in str(error.body)
        case 500:
            return not any(words in str(error.body) for words in _LASTING)
    return error.status in (0, 429, 502, 503, 504)


SAY_EVERY = 60.0
"""Seconds between two lines that say that a request is repeated; the first comes with its first failure."""


def call(request: Callable[..., Any], **options: Any) -> Any:
    """The answer to a request, made again while the server is away or busy; what it answers meanwhile, or a webhook
    that is away, is said at once and then once a minute: nobody waits half an hour in silence. ApiException for an
    answer that will not change."""
    said_at: float | None = None

    def say(error: BaseException, failures: int, spent: float) -> None:
        nonlocal said_at
        if said_at is None or spent - said_at >= SAY_EVERY:
            said_at = spent
            since = f"trying again since {spent:.0f} s" if failures > 1 else "trying again"
            log.warning("the Kubernetes API server: %s; %s", short(error), since)

    try:
        return with_retries(
            lambda: request(**options, _request_timeout=TIMEOUT), passes,
            seconds=GIVE_UP_AFTER, first=FIRST_WAIT, longest=LONGEST_WAIT, asked=_asked, say=say,
        )  # fmt: skip
    except HTTPError as error:
        raise StorageFault(f"the Kubernetes API server cannot be reached ({short(error)}); try again") from error


def _asked(error: BaseException) -> float:
    """Seconds of an answer's Retry-After; of a date, which API servers do not send, none."""
    headers = error.headers if isinstance(error, ApiException) and error.headers else {}
    try:
        return min(LONGEST_ASKED, float(headers.get("Retry-After") or 0))
    except ValueError:
        return 0.0


def plain(call: Callable[..., Any], **options: Any) -> Any:
    """The answer as JSON: the client's own classes refuse what a newer server leaves out. ApiException for what no API
    server answers: a page, an object without a kind, a list without items, more than LONGEST bytes."""
    response = call(**options, _preload_content=False)
    content = response.read(LONGEST + 1, decode_content=True)
    response.close() if len(content) > LONGEST else response.release_conn()
    try:
        if len(content) > LONGEST:
            raise ValueError(f"more than {LONGEST:,} bytes")
        found = object_of(content)
        if found["kind"].endswith("List"):
            found["items"] = list(found["items"] or ())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        page = " ".join(content.decode(errors="replace").split())[:80]
        mend = "a login page or a proxy's? Check the server in KUBECONFIG"
        raise ApiException(200, f"OK, but no answer of an API server ({page}); {mend}") from error
    return found


def delete_object(
    delete: Callable[..., Any], where: Mapping[str, str], name: str, uid: str = "", request: Callable[..., Any] = call
) -> bool:
    """Deletes a custom resource, and then what it owns. Whether it was there and, by a uid, that very one: a new object
    of its name is not hit. `delete`: the client's method, named by the caller, whose Role has to allow it; `request`:
    what asks. ApiException for other answers."""
    body = {"propagationPolicy": "Background"} | ({"preconditions": {"uid": uid}} if uid else {})
    try:
        request(plain, call=delete, **where, name=name, body=body)
    except ApiException as error:
        if error.status not in (404, 409):
            raise
        return False
    return True


def unanswered(error: ApiException) -> Exception:
    """InputError where this account may not, StorageFault for the rest."""
    if error.status in (401, 403):
        return InputError(f"the Kubernetes API server refused: {short(error)}; check the account and its Role")
    return StorageFault(f"the Kubernetes API server failed: {short(error)}")


def short(error: BaseException) -> str:
    """An error in one line: its status and what the server said."""
    if not isinstance(error, ApiException):
        return " ".join(str(error).split())[:200]
    try:
        text = value_of(error.body or "")["message"]
    except (ValueError, KeyError, TypeError):
        text = error.reason or ""
    return " ".join(f"{error.status} {text}".split())[:600]
