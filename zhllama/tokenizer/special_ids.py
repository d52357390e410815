"""BOS, EOS and padding of a model: one rule for every stage that reads, writes or stops by them.

The tokenizer decides. config.json and generation_config.json are evidence: the widespread copies of LLaMA 1 say bos 0,
eos 1, pad 0 beside a tokenizer with 1, 2 and none, and a server that believed them would never stop. What they name as
further ends (ChatML's `<|im_end|>`, say) counts where it is a special piece that is no BOS, unknown or padding piece.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from zhllama.tokenizer.encoder import Encoder

log = logging.getLogger("tokenizer")

_NAMES = ("bos", "eos", "pad")
_LONGEST = 80
"""Characters of what a file says that a line of the log repeats."""


@dataclass(frozen=True)
class SpecialIds:
    """By the rule. `further`: ids that end an answer as EOS does."""

    bos: int | None
    eos: int
    pad: int | None
    further: tuple[int, ...] = ()

    @property
    def stops(self) -> tuple[int, ...]:
        return (self.eos, *self.further)

    def ending(self, end: int) -> Self:
        """With the piece that the taught chat template writes behind an answer: a model that learnt it stops there."""
        return self if end in self.stops else replace(self, further=(*self.further, end))

    @property
    def config(self) -> dict[str, int | None]:
        """As config.json has them."""
        return {f"{name}_token_id": getattr(self, name) for name in _NAMES}

    def generation(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """generation_config.json with these ids in place of those that `settings` has."""
        ids = self.config | {"eos_token_id": list(self.stops) if self.further else self.eos}
        kept = {name: value for name, value in settings.items() if name not in ids}
        return kept | {name: value for name, value in ids.items() if value is not None}


def special_ids(encoder: Encoder, files: Mapping[str, Mapping[str, Any]], where: str) -> SpecialIds:
    """The ids of a model with this tokenizer. files: name → content of config.json and generation_config.json, as far
    as they are there. Where one of them says otherwise, a line in the log says so, and begins with `where`."""
    said = {file: {name: _listed(read.get(f"{name}_token_id")) for name in _NAMES} for file, read in files.items()}
    ends = dict.fromkeys(one for ids in said.values() for one in ids["eos"] if type(one) is int and one != encoder.eos)
    further = _further(encoder, list(ends)) if ends else ()
    found = SpecialIds(encoder.named.get("bos"), encoder.eos, encoder.named_pad, further)
    # an end as padding is how files say that there is none of its own
    right: dict[str, set[int | None]] = {
        "bos": {found.bos}, "eos": set(found.stops), "pad": {found.pad, *found.stops},
    }  # fmt: skip
    wrong = {
        file: ", ".join(
            f"{name} {', '.join(map(str, given))}"[:_LONGEST]
            for name, given in ids.items()
            if any(one not in right[name] for one in given)
        )
        for file, ids in said.items()
    }
    if told := " and ".join(f"{file} says {ids}" for file, ids in wrong.items() if ids):
        pad = "none" if found.pad is None else found.pad
        also = f" ({', '.join(map(str, further))} as well)" if further else ""
        has = f"bos {'none' if found.bos is None else found.bos}, eos {found.eos}{also}, pad {pad}"
        log.warning("%s: %s; the tokenizer counts: %s", where, told, has)
    return found


def _listed(value: Any) -> list[Any]:
    """The ids that a field holds: one, several, or none, which is null or -1. Hashable, whatever stands there."""
    given = value if isinstance(value, list) else [value]
    return [one if type(one) is int else repr(one) for one in given if one is not None and one != -1]


def _further(encoder: Encoder, ends: list[int]) -> tuple[int, ...]:
    return tuple(index for index in ends if index != encoder.named.get("bos") and encoder.is_special(index))
