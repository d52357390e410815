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
    429: r"rate.?limit|too.?many.?requests|throttl|resource.?exhausted|quota|限流|频繁|频率|并发|限速",
    404: r"model.?not.?found|not.?found.?error|no such model|模型不存在",
    503: r"overload|\bbusy\b|unavailable|server.?error|internal.?error|timed?.?out|bad gateway|try again|繁忙|稍后",
    400: r"invalid.?request|bad.?request|invalid.?param|unsupported|context.?length",
}
_CODES, _WORDS = ("code", "status", "status_code", "type"), ("message", "msg", "detail", "status_msg", "error")


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
    if not isinstance(value, Mapping):
        return None
    choices = value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}
    # MiniMax's lies in base_resp, whose status_code is 0 when all is well
    error = value.get("error") or first.get("error") or value.get("base_resp")
    if not error and choices is None and any(name in value for name in _CODES) and any(n in value for n in _WORDS):
        error = value
    inner: Mapping[str, Any] = error if isinstance(error, Mapping) else {}
    codes = [known for of in (inner, value) for name in _CODES if (known := of.get(name)) and not _holds(known)]
    words = next((inner[name] for name in _WORDS if isinstance(inner.get(name), str)), "")
    if not error or (inner and not words and not codes) or (error is value.get("base_resp") and not codes):
        return None
    said = words or (error if isinstance(error, str) else json.dumps(error, ensure_ascii=False))
    kind = " ".join(map(str, codes))
    numbers = (int(code) for code in map(str, codes) if re.fullmatch(r"[45]\d\d", code))
    named = (
        status for text in (kind, said) for status, name in _STATUS.items() if re.search(name, text, re.IGNORECASE)
    )
    asked = inner.get("retry_after")
    wait = float(asked) if isinstance(asked, int | float) and 0 <= asked <= 100 * LONGEST_PAUSE else None
    return ServerError(next(numbers, 0) or next(named, 0), said[:300], kind, wait)


def _holds(value: Any) -> bool:
    return isinstance(value, Mapping | list)
