"""What Kubeflow Pipelines' API answers, told apart: whose fault an error is, and whether an answer is the API's at all.

A wrong request is answered with 500, too, and the cause stands at the end of a chain of sentences, before a stack in an
upload's answer: the words and the gRPC code in the body decide.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from zhllama.artifacts.json_file import object_of
from zhllama.errors import InputError, StorageFault

LONGEST = 600
"""Characters of an answer that are shown. What is left out is its beginning: the cause is at the end."""
_NOT_FOUND = 5
_PERMANENT_CODES = (3, _NOT_FOUND, 6, 7, 9, 11, 12, 16)
"""gRPC's codes for what the same request would meet again: a wrong argument, not found, not allowed, …"""
_PERMANENT_WORDS = re.compile(
    r"invalid input|already exist|notfounderror|data too long|duplicate entry|invalidargument"
    r"|permission ?denied|unauthenticated|is forbidden|failed to unmarshal|unknown template format",
    re.IGNORECASE,
)
_FRAME = re.compile(r"^(\s+\S+:\d+|[\w.\-/*()]+\.[\w.*()]+)$")
"""A line of a Go stack: a function, or its file and line below it."""


class Gone(InputError):
    """The server does not have it."""


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
        return "a page of HTML, which the API does not send: something in front of it answered"
    lines = [line for line in (max(said, key=len) if said else text).splitlines() if not _FRAME.match(line)]
    line = " ".join(" ".join(lines).split())
    return (line if len(line) <= LONGEST else f"… {line[-LONGEST:]}") or "no text"


def refused(address: str, status: int | None, reason: Any, body: Any) -> Exception:
    """InputError for what the same request would meet again, StorageFault for what may pass."""
    words, code = cause(body), _read(body)[1].get("code")
    answer = f"{address}: Kubeflow Pipelines answered {status} {reason} ({words})"
    if re.search(r"incorrect string value", words, re.IGNORECASE):
        return InputError(
            f"{answer}; its database does not take Chinese text: convert it to utf8mb4 (ALTER DATABASE mlpipeline "
            "CHARACTER SET utf8mb4, and each of its tables), or leave Chinese out of the pipeline's values"
        )
    if code == _NOT_FOUND or (status == 404 and code is None):
        return Gone(f"{answer}; check the address, --namespace and the run")
    wrong = status is not None and 300 <= status < 500 and status not in (408, 429)
    if wrong or code in _PERMANENT_CODES or _PERMANENT_WORDS.search(words):
        return InputError(f"{answer}; check the address, ZHLLAMA_KFP_TOKEN, --namespace and what was asked for")
    return StorageFault(f"{answer}; try again")


def named(answer: Any, field: str, address: str) -> str:
    """A name or id that an answer must hold. A login page with status 200 holds none."""
    found = getattr(answer, field, None)
    if not isinstance(found, str) or not found:
        raise InputError(
            f"--host {address}: what answers there is not Kubeflow Pipelines' API (no {field} in the answer; a login "
            "page?); check the address and ZHLLAMA_KFP_TOKEN"
        )
    return found


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
