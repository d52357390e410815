"""What Kubeflow Pipelines' API answers, told apart: whose fault an error is, and whether an answer is the API's at all.

A wrong request is answered with 500, too, and the cause stands at the end of a chain of sentences, before a stack in an
upload's answer: the words and the gRPC code in the body decide.
"""

import os
import re
import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from zhllama.artifacts.json_file import object_of
from zhllama.errors import InputError, StorageFault

LONGEST = 600
"""Characters of an answer that are shown. What is left out is its beginning: the cause is at the end."""
_NOT_FOUND, _MAY_NOT, _WHO = 5, 7, 16
_PERMANENT_CODES = (3, _NOT_FOUND, 6, 9, 11, 12)
"""gRPC's codes for what the same request would meet again: a wrong argument, not found, there already, …"""
_PERMANENT_WORDS = re.compile(
    r"invalid input|already exist|notfounderror|data too long|duplicate entry|invalidargument"
    r"|failed to unmarshal|unknown template format",
    re.IGNORECASE,
)
_MAY_NOT_WORDS = re.compile(r"permission ?denied|is forbidden", re.IGNORECASE)
_WANTS_TLS = re.compile(r"HTTPS (server|port)|TLS-encrypted", re.IGNORECASE)
AUTHORITIES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
"""Variables that name a file with the certificates of those who are trusted; kfp's client reads neither."""
_FRAME = re.compile(r"^(\s+\S+:\d+|[\w.\-/*()]+\.[\w.*()]+)$")
"""A line of a Go stack: a function, or its file and line below it."""


class NotThere(InputError):
    """The server does not have what the path names, or does not know the path."""


class Gone(NotThere):
    """The server says that it does not have it."""


class Deleted(StorageFault):
    """A run that was there is no more."""


def _read(body: Any) -> tuple[str, dict[str, Any]]:
    """An answer's text, and what it holds where it is a JSON object."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    with suppress(ValueError):
        return text, object_of(text)
    return text, {}


def cause(body: Any) -> str:
    """An error's words in one line, its end in any case."""
    text, found = _read(body)
    said = [str(found[key]) for key in ("message", "error_message", "error", "error_details") if found.get(key)]
    if not said and text.lstrip().startswith("<"):
        return f"a page of HTML{_title(text)}, which the API does not send: something in front of it answered"
    lines = [line for line in (max(said, key=len) if said else text).splitlines() if not _FRAME.match(line)]
    line = " ".join(" ".join(lines).split())
    return (line if len(line) <= LONGEST else f"… {line[-LONGEST:]}") or "no text"


@dataclass(frozen=True)
class Server:
    """Whom the requests go to, and as whom: what an error names, and says how to mend."""

    address: str
    credential: str = ""
    """Where its token is from, as users call it; "" where there is none."""
    namespace: str | None = None
    proxy: str = ""
    """The proxy to it, and the variable that names it; "" where there is none."""

    def refused(self, status: int, reason: Any, body: Any, location: str = "") -> Exception:
        """InputError for what the same request would meet again, StorageFault for what may pass. location: where a
        redirection leads."""
        words, code = cause(body), _read(body)[1].get("code")
        answer = f"{self.address}: Kubeflow Pipelines answered {status} {reason} ({words})"
        if re.search(r"incorrect string value", words, re.IGNORECASE):
            return InputError(
                f"{answer}; its database does not take Chinese text: convert it to utf8mb4 (ALTER DATABASE mlpipeline "
                "CHARACTER SET utf8mb4, and each of its tables), or leave Chinese out of the pipeline's values"
            )
        if 300 <= status < 400 and location:
            there = urljoin(self.address, location).partition("?")[0]
            return InputError(f"--host {self.address}: it answers {status} and sends on to {there}; {self._let_in()}")
        if status == 400 and _WANTS_TLS.search(words):
            return InputError(f"--host {self.address}: it speaks https only; write {_other_scheme(self.address)}")
        if status in (407, 511):
            return self.no_way(f"{status} {reason}: {words}")
        may_not = status == 403 or code == _MAY_NOT or _MAY_NOT_WORDS.search(words) is not None
        if may_not or status == 401 or code == _WHO or "unauthenticated" in words.lower():
            return InputError(f"{answer}; {self._let_in(of_kfp=code is not None, may_not=may_not)}")
        if code == _NOT_FOUND:
            return Gone(f"{answer}; check the address, --namespace and the run")
        if status in (404, 405, 501) or 300 <= status < 400:
            return NotThere(f"{answer}; check the address; {self._let_in()}")
        wrong = 400 <= status < 500 and status not in (408, 429)
        if wrong or code in _PERMANENT_CODES or _PERMANENT_WORDS.search(words):
            return InputError(f"{answer}; check the address, ZHLLAMA_KFP_TOKEN, --namespace and what was asked for")
        return StorageFault(f"{answer}; try again")

    def no_tls(self, error: Exception) -> Exception:
        """What is wrong with the other side's TLS, and how it is mended."""
        cause = next((one for one in (*error.args, error.__cause__) if isinstance(one, ssl.SSLError)), None)
        if not isinstance(cause, ssl.SSLCertVerificationError):
            plain = getattr(cause, "reason", None) in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE")
            if not plain:
                return self.nobody(error, passes=True)
            mend = f"write {_other_scheme(self.address)}, or another port"
            return InputError(f"--host {self.address}: it does not speak https; {mend}")
        if cause.verify_code in (9, 10):
            mend = "have it renewed, or set this machine's clock"
        elif cause.verify_code in (62, 64):
            mend = "write the name that it is for in --host"
        else:
            variable = next((name for name in AUTHORITIES if os.environ.get(name)), "")
            mend = f"{variable} must name" if variable else f"name in {AUTHORITIES[0]}"
            mend += " a file with its authority's certificate"
        said = f"its certificate is not accepted ({cause.verify_message.rstrip('.')})"
        return InputError(f"--host {self.address}: {said}; {mend}")

    def no_way(self, error: BaseException | str) -> "NoAnswer":
        """What is said where it is the proxy that does not let us through."""
        proxy = f"the proxy {self.proxy}" if self.proxy else "a proxy on the way"
        mend = "check it, or name the host in NO_PROXY"
        return NoAnswer(f"--host {self.address}: {proxy} does not let us through ({error}); {mend}", passes=False)

    def nobody(self, error: BaseException, passes: bool) -> "NoAnswer":
        said = f"--host {self.address}: no Kubeflow Pipelines answers there ({error}); check the address"
        return NoAnswer(said, passes)

    def not_the_api(self, asked: str, status: int, kind: str, text: str) -> InputError:
        """A success that is none."""
        page = f"{kind or 'something without a type'}{_title(text)}"
        return InputError(
            f"--host {self.address}: what answers there is not Kubeflow Pipelines' API: {asked} was answered with "
            f"{status} and {page}; a login page? {self._let_in()}"
        )

    def named(self, answer: Any, field: str, wanted: str = "") -> str:
        """A name or id that an answer must hold, and that has to be the one that was asked for."""
        found = getattr(answer, field, None)
        if not isinstance(found, str) or not found or (wanted and found != wanted):
            said = f"{field} {found!r:.60} where {wanted} was asked for" if found and wanted else f"no {field}"
            raise InputError(
                f"--host {self.address}: what answers there is not Kubeflow Pipelines' API ({said} in the answer); "
                f"{self._let_in()}"
            )
        return found

    def _let_in(self, of_kfp: bool = False, may_not: bool = False) -> str:
        """What to set, so that this server is reached and lets one in. of_kfp: whether its own API said that; may_not:
        whether it knows who asks."""
        mends = []
        if self.proxy:
            mends.append(f"if it is the proxy {self.proxy} that answers, name the host in NO_PROXY")
        if may_not:
            told = f"that --namespace {self.namespace} is" if self.namespace else "--namespace, of the profile that is"
            mends.append(f"check {told} this account's")
        if self.credential:
            mends.append(f"check that the token of {self.credential} is of this server and has not expired")
        else:
            mends.append("set ZHLLAMA_KFP_TOKEN, or ZHLLAMA_KFP_TOKEN_FILE, to a token")
        if not of_kfp and not urlsplit(self.address).path:
            mends.append(f"behind Kubeflow's gateway the API is below /pipeline: --host {self.address}/pipeline")
        return "; ".join(mends)


class NoAnswer(StorageFault):
    """Nobody answers at the address: at the first call the address is wrong, later the server is away."""

    def __init__(self, message: str, passes: bool) -> None:
        super().__init__(message)
        self.passes = passes


def _other_scheme(address: str) -> str:
    return address.replace("http:", "https:", 1) if address.startswith("http:") else address.replace("s:", ":", 1)


def _title(text: str) -> str:
    """Of a page of HTML: ` (Log in)`, or nothing."""
    found = re.search(r"<title[^>]*>([^<]{1,80})", text, re.IGNORECASE)
    return f" ({' '.join(found[1].split())})" if found else ""


def beyond_latin1(package: Path) -> str:
    """A text of a compiled pipeline, as the server stores it, that a database in latin1 does not take; else ""."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for event in yaml.parse(package.read_text(encoding="utf-8"), loader):
        text = getattr(event, "value", "")
        try:
            text.encode("cp1252")  # what MySQL calls latin1
        except UnicodeEncodeError:
            return text if len(text) <= 40 else f"{text[:40]}…"
    return ""
