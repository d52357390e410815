"""Rotary positions: the one place that knows how config.json says them, and which of them are done.

transformers 5 keeps base and stretching in `rope_parameters`, older ones, vLLM on them and mistral.rs in `rope_theta`
and `rope_scaling`; a program that misses its own spelling takes a base of 10,000 without a word. Both are read, with
the precedence of transformers 5, and both are written. Types and settings are a list of what is done; the rest is
refused by name.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zhllama.errors import InputError

log = logging.getLogger("model")

THETA = 10_000.0
DEFAULT = "default"
_REQUIRED: dict[str, tuple[str, ...]] = {
    DEFAULT: (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_OPTIONAL: dict[str, tuple[str, ...]] = {"yarn": (*_NUMBERS, "truncate")}
LENGTH = "original_max_position_embeddings"
"""What yarn and llama3 stretch; the model's own positions where nothing is said."""
_HARMLESS = {"rope_type", "type", "rope_theta", "finetuned"}
_WITHOUT_EFFECT = {"factor": 1, "partial_rotary_factor": 1, "extrapolation_factor": 1, "attn_factor": 1}
"""Settings that say nothing at this value."""


@dataclass(frozen=True)
class Rope:
    """Type, base, and the settings of the type by transformers' names."""

    kind: str = DEFAULT
    theta: float = THETA
    settings: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(config: Mapping[str, Any], where: str) -> "Rope":
        """As config.json says it; InputError for what is not done. `where` begins the message."""
        new, old = (_object(config, name, where) for name in ("rope_parameters", "rope_scaling"))
        rope = _rope(config, old or new, where)
        if old and new and _rope(config, new, where) != rope:
            log.warning("%s: rope_parameters and rope_scaling differ; rope_scaling counts, as for transformers", where)
        if config.get("rope_theta") not in (None, rope.theta):
            log.warning("%s: rope_theta is %s, but %s counts, as for transformers", where, config["rope_theta"], rope)
        return rope

    def spelled(self) -> dict[str, Any]:
        """The fields of config.json, for every reader."""
        settings = {"rope_type": self.kind, **self.settings}
        old = {"type": self.kind, **settings} if self.kind != DEFAULT else None
        return {
            "rope_parameters": {**settings, "rope_theta": self.theta},
            "rope_theta": self.theta,
            "rope_scaling": old,
        }

    def factors(self, head: int) -> list[float]:
        """What each frequency of a head of this width is divided by, for programs that do not know llama3 by name.
        Slow turns by `factor`, quick ones not at all, those between in between (Meta's formula)."""
        said = self.settings
        low, high, factor = said["low_freq_factor"], said["high_freq_factor"], said["factor"]
        found = []
        for index in range(0, head, 2):
            # turns within the positions that the model was first made for
            turns = said[LENGTH] / (2 * math.pi * self.theta ** (index / head))
            smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
            found.append(1 / ((1 - smooth) / factor + smooth))
        return found

    def __str__(self) -> str:
        return f"{self.kind} with a base of {self.theta:g}"


def _object(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: {name} is {value!r:.40}, no object; {_MEND}")
    return value


_MEND = "correct config.json, or give another model"


def _rope(config: Mapping[str, Any], given: Mapping[str, Any], where: str) -> Rope:
    kind = given.get("rope_type") or given.get("type") or DEFAULT
    if not isinstance(kind, str) or kind not in _REQUIRED:
        raise InputError(
            f"{where}: config.json stretches the rotary positions ({kind!s:.40}), which is not done; "
            f"{', '.join(_REQUIRED)} are: give another model"
        )
    if given.get("type", kind) not in (None, kind):
        raise InputError(f"{where}: its rope is of type {given['type']!s:.40} and of type {kind}; {_MEND}")
    where = f"{where}: config.json stretches the rotary positions ({kind})" if kind != DEFAULT else where
    theta = _number(given.get("rope_theta", config.get("rope_theta", THETA)), "rope_theta", where)
    settings: dict[str, Any] = {}
    for name in _REQUIRED[kind]:
        settings[name] = _number(given.get(name), name, where, least=1.0 if name == "factor" else 0.0)
    for name in _OPTIONAL.get(kind, ()):
        if given.get(name) is not None:
            value = given[name]
            settings[name] = value if isinstance(value, bool) else _number(value, name, where)
            if isinstance(value, bool) != (name == "truncate"):
                raise InputError(f"{where}: {name} of its rope is {value!r:.40}; {_MEND}")
    if kind in ("yarn", "llama3"):
        # transformers takes the one beside rope_parameters first, and without both the model's own
        own = config.get("max_position_embeddings")
        length = config.get(LENGTH) or given.get(LENGTH) or own
        settings[LENGTH] = int(_number(length, LENGTH, where, whole=True))
    elif kind in ("linear", "dynamic") or given.get(LENGTH) == config.get("max_position_embeddings"):
        # LLaMA-Factory writes it for dynamic, where every engine goes by the model's own
        given = {name: value for name, value in given.items() if name != LENGTH}
    if kind == "llama3" and settings["low_freq_factor"] >= settings["high_freq_factor"]:
        raise InputError(f"{where}: low_freq_factor of its rope is not below high_freq_factor; {_MEND}")
    for name, value in given.items():
        known = name in settings or name in _HARMLESS or value is None or value == _WITHOUT_EFFECT.get(name)
        if not known:
            raise InputError(
                f"{where}: config.json sets {name:.80} of the rotary positions, which is not done; {_MEND}"
            )
    if config.get("partial_rotary_factor") not in (None, 1):
        raise InputError(f"{where}: config.json sets partial_rotary_factor, which is not done; {_MEND}")
    return Rope(kind, theta, settings)


def _number(value: Any, name: str, where: str, least: float = 0.0, whole: bool = False) -> float:
    """Finite, above zero and not below `least`."""
    right = type(value) in (int, float) and 0 < value < math.inf and least <= value < 1e12
    if not right or (whole and value != int(value)):
        said = f"a {'whole' if whole else 'positive'} number" if not least else f"a number of {least:g} or more"
        raise InputError(f"{where}: {name} of its rope is {value!r:.20}, and {said} is needed; {_MEND}")
    return float(value)
