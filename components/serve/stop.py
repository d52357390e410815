"""A text that comes in pieces, up to the first that is to stop it: transformers' answers hold that one too."""

from collections.abc import Sequence
from typing import Any


class Cut:
    """Of one answer, whole or event by event."""

    def __init__(self, stop: str | Sequence[str]) -> None:
        self._stops = [one for one in ([stop] if isinstance(stop, str) else stop) if one]
        self._held = ""
        """What may be the beginning of one of them."""
        self._stopped = False

    def event(self, value: dict[str, Any]) -> None:
        """Cuts the text of an answer's one choice, in place. What is held back comes with the event that ends it."""
        for choice in value.get("choices", ()) if self._stops else ():
            holder = next((choice[part] for part in ("message", "delta") if part in choice), choice)
            name = "text" if "text" in choice else "content"
            last = choice.get("finish_reason") is not None
            text = self._passed(holder.get(name) or "", last)
            if text or holder.get(name):
                holder[name] = text

    def _passed(self, piece: str, last: bool) -> str:
        if self._stopped:
            return ""
        text = self._held + piece
        if found := [at for stop in self._stops if (at := text.find(stop)) >= 0]:
            self._stopped = True
            return text[: min(found)]
        begun = (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        kept = len(text) - (0 if last else max(begun, default=0))
        self._held = text[kept:]
        return text[:kept]
