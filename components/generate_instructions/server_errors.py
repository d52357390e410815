"""The error that a server writes into a body of status 200, as proxies and some APIs do: what its status would be.

The code may be a number, a number as text or a name, the error a text alone, and both may lie in the error, beside it
or in the first choice. What names no status is looked for by its words, in the languages that servers speak.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.generate_instructions.limits import LONGEST_PAUSE

_STATUS = {
    402: r"insufficient.?(?:quota|balance|credit|funds)|payment.?required|余额不足|欠费",
    401: r"(?:invalid|incorrect|wrong|missing).?api.?key|authentication|unauthori[sz]ed|鉴权|认证失败",
    403: r"permission.?denied|forbidden",
    429: r"\b429\b|qps|rate.?limit|too.?many.?requests|throttl|resource.?exhausted|quota|限流|频繁|频率|并发|限速",
    404: r"not.?found|no such model|模型不存在",
    503: r"overload|\bbusy\b|unavailable|server.?error|internal.?error|timed?.?out|bad gateway|try again|繁忙|稍后",
    400: r"invalid.?request|bad.?request|invalid.?param|unsupported|context.?length",
}
_CODES, _WORDS = ("code", "status", "statuscode", "type"), ("", "s", "message", "msg", "detail", "statusmsg")
"""Of an error's fields, without `error` before them."""


@dataclass
class ServerError(Exception):
    """An error in place of an answer."""

    status: int
    """What the server would have said in the first line of a plain answer; 0: neither code nor words tell."""
    said: str
    kind: str = ""
    """Its codes and names."""
    wait: float | None = None


def error_in(value: Any) -> ServerError | None:
    """The error in a body or in an event of a stream; None where there is none."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if not isinstance(value, Mapping):
        return None
    choices = value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}
    # MiniMax's lies in base_resp, whose status_code is 0 when all is well
    error = value.get("error") or value.get("errors") or first.get("error") or value.get("base_resp")
    codes, words = _said(error or ({} if "choices" in value else value))
    if not words and not (error and codes) and (not error or isinstance(error, Mapping)):
        return None
    if error is value.get("base_resp") and error and not codes:
        return None
    if error:
        beside = _said({name: one for name, one in value.items() if not isinstance(one, Mapping | list)})
        codes, words = codes + beside[0], words + beside[1]
    said = words[0] if words else json.dumps(error, ensure_ascii=False)
    kind = " ".join(codes)
    numbers = (int(code) for code in codes if re.fullmatch(r"[45]\d\d", code))
    named = (
        status for text in (kind, said) for status, name in _STATUS.items() if re.search(name, text, re.IGNORECASE)
    )
    asked = str(error.get("retry_after")) if isinstance(error, Mapping) else ""
    wait = min(float(asked), 100 * LONGEST_PAUSE) if re.fullmatch(r"\d+(\.\d+)?", asked) else None
    return ServerError(next(numbers, 0) or next(named, 0), said[:300], kind, wait)


def _said(value: Any, depth: int = 4) -> tuple[list[str], list[str]]:
    """The codes and the words of an error."""
    codes: list[str] = []
    words = [value] if isinstance(value, str) and value else []
    if isinstance(value, int | float) and not isinstance(value, bool):
        codes.append(f"{value:g}")
    members = [("error", one) for one in value] if isinstance(value, list) else ()
    for name, one in (value.items() if isinstance(value, Mapping) else members) if depth else ():
        # error_code, errorCode, code; error, errors, error_msg, message
        plain = str(name).lower().replace("_", "").removeprefix("error")
        if plain in _CODES and one and isinstance(one, str | int | float):
            codes.append(one if isinstance(one, str) else f"{one:g}")
        elif plain in _WORDS:
            inner = _said(one, depth - 1)
            codes, words = codes + inner[0], words + inner[1]
    return codes, words
