"""The Kubernetes API server, as launch_training and serve reach it: configured, asked with retries, its errors ours.

A request is made again, for ten minutes, while the server is away or busy; an answer that will not change is raised as
the client's ApiException, or turned into one line by `unanswered`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kubernetes import config
from kubernetes.client.exceptions import ApiException
from tenacity import retry, retry_if_exception, stop_after_delay, wait_random_exponential
from urllib3.exceptions import HTTPError

from components.shared.errors import InputError, StorageFault

GIVE_UP_AFTER = 600.0
"""Seconds for which an API server may fail or be away."""
TIMEOUT = (10, 60)
"""Of a request: to connect, and between two bytes."""
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""There in a pod with a token, and nowhere else."""


def connect() -> str:
    """Configures the client, for this pod or from KUBECONFIG, and says the namespace. InputError without a cluster."""
    try:
        if ACCOUNT.exists():
            config.load_incluster_config()
            return (ACCOUNT / "namespace").read_text().strip()
        config.load_kube_config(os.environ.get("KUBECONFIG"))
        _, current = config.list_kube_config_contexts(os.environ.get("KUBECONFIG"))
        return str(current["context"].get("namespace") or "default")
    except config.ConfigException as error:
        raise InputError(f"no Kubernetes cluster is configured ({error}); set KUBECONFIG, or run in a pod") from error


def _passes(error: BaseException) -> bool:
    return isinstance(error, HTTPError) or (
        isinstance(error, ApiException) and error.status in (0, 429, 500, 502, 503, 504)
    )


@retry(
    retry=retry_if_exception(_passes),
    wait=wait_random_exponential(multiplier=0.5, max=15),
    stop=stop_after_delay(GIVE_UP_AFTER),
    reraise=True,
)
def attempted(request: Callable[..., Any], **options: Any) -> Any:
    return request(**options, _request_timeout=TIMEOUT)


def plain(call: Callable[..., Any], **options: Any) -> Any:
    """The answer as JSON: the client's own classes refuse what a newer server leaves out."""
    return json.loads(call(**options, _preload_content=False).data)


def call(request: Callable[..., Any], **options: Any) -> Any:
    """A request, again while the server is away or busy. ApiException for an answer that will not change."""
    try:
        return attempted(request, **options)
    except HTTPError as error:
        raise StorageFault(f"the Kubernetes API server cannot be reached ({short(error)}); try again") from error


def unanswered(error: ApiException) -> Exception:
    """InputError where this account may not, StorageFault for the rest."""
    if error.status in (401, 403):
        return InputError(f"the Kubernetes API server refused: {short(error)}; check the account and its Role")
    return StorageFault(f"the Kubernetes API server failed: {short(error)}")


def short(error: Exception) -> str:
    """An error in one line: its status and what the server said."""
    if not isinstance(error, ApiException):
        return " ".join(str(error).split())[:200]
    try:
        text = json.loads(error.body or "")["message"]
    except (ValueError, KeyError, TypeError):
        text = error.reason or ""
    return f"{error.status} {text}".strip()[:300]
