"""What the environment says of the way to Kubeflow Pipelines: a token, a proxy, whose certificates are trusted.

kfp's client reads none of it. What cannot be is said before anybody is called.
"""

import os
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from urllib3.exceptions import LocationParseError
from urllib3.util import make_headers, parse_url

from pipelines.kubeflow.answers import AUTHORITIES
from zhllama.errors import InputError

POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
MOST_OF_TOKEN = 2**16
"""Characters of a token's file that are read."""


def credentials() -> tuple[dict[str, Any], str]:
    """What kfp.Client is given so that it is let in, and where that is from; nothing where nothing is set."""
    if token := os.environ.get("ZHLLAMA_KFP_TOKEN"):
        return {"existing_token": _token(token, "ZHLLAMA_KFP_TOKEN")}, "ZHLLAMA_KFP_TOKEN"
    file, whose = os.environ.get("ZHLLAMA_KFP_TOKEN_FILE", ""), "ZHLLAMA_KFP_TOKEN_FILE"
    if not file and os.environ.get("KUBERNETES_SERVICE_HOST") and POD_TOKEN.is_file():
        file, whose = str(POD_TOKEN), "this pod"
    if not file:
        return {}, ""
    found = _TokenFile(Path(file), whose)
    found.read()
    return {"credentials": found}, whose


def _token(text: str, whose: str) -> str:
    """InputError for what no header can hold; a newline at the end is nobody's."""
    if not re.fullmatch(r"[!-~]+", text.strip()):
        raise InputError(f"{whose}: it holds no token (one word in ASCII is needed); set it anew, or unset it")
    return text.strip()


@dataclass(frozen=True)
class _TokenFile:
    """A token that is read again for every call, so that a mounted one may change."""

    path: Path
    whose: str

    def read(self) -> str:
        try:
            with self.path.open(encoding="utf-8") as file:
                text = file.read(MOST_OF_TOKEN)
        except (OSError, UnicodeDecodeError) as error:
            said = getattr(error, "strerror", "") or "no text"
            raise InputError(f"{self.whose}={self.path}: {said[:1].lower()}{said[1:]}; correct or unset it") from error
        return _token(text, f"{self.whose}={self.path}")

    def refresh_api_key_hook(self, config: Any) -> None:
        """As kfp calls it, before each request."""
        config.api_key["authorization"] = self.read()


@dataclass(frozen=True)
class Proxy:
    """One of HTTP, whole, as the variable names it."""

    address: str
    variable: str

    @property
    def shown(self) -> str:
        """Without its password."""
        scheme, _, rest = self.address.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]} ({self.variable})"

    @property
    def headers(self) -> dict[str, str]:
        """By which it knows the user that its address names; kfp's client passes over him."""
        user = parse_url(self.address).auth
        return {} if user is None else make_headers(proxy_basic_auth=unquote(user))


def proxy_to(address: str) -> Proxy | None:
    """The proxy to that address (HTTPS_PROXY, HTTP_PROXY; NO_PROXY); none to this machine itself."""
    try:
        found = urlsplit(address)
        host = found.hostname or ""
    except ValueError as error:
        raise InputError(f"--host {address}: {error}; write the whole address, as https://kfp.example.com") from error
    if host in ("localhost", "127.0.0.1", "::1") or proxy_bypass(host):
        return None
    proxy, name = getproxies().get(found.scheme, ""), f"{found.scheme.upper()}_PROXY"
    if not proxy:
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        known = parse_url(proxy)
    except LocationParseError:
        known = None
    if known is None or known.scheme not in ("http", "https") or not known.host:
        raise InputError(f"{name}: it names no proxy of HTTP; write http://host:port, or unset it")
    return Proxy(proxy, name)


def authorities_for(address: str) -> str | None:
    """A file with the certificates of those who are trusted, where the environment names one."""
    name = next((name for name in AUTHORITIES if os.environ.get(name)), "")
    if not name or not address.startswith("https:"):
        return None
    path = os.environ[name]
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:
        said = getattr(error, "reason", "") or error.strerror
        raise InputError(f"{name}={path}: no certificates can be read there ({said}); correct or unset it") from error
    return path
