"""Base models: one short module an architecture, and the one place that knows which there are."""

from collections.abc import Mapping
from typing import Any

from zhllama.errors import InputError
from zhllama.models.architecture import Architecture as Architecture
from zhllama.models.llama import LLAMA
from zhllama.models.mistral import MISTRAL
from zhllama.models.qwen2 import QWEN2
from zhllama.models.qwen3 import QWEN3

ARCHITECTURES = {one.model_type: one for one in (LLAMA, MISTRAL, QWEN2, QWEN3)}
"""By the model_type of config.json; of those that share a GGUF's architecture the first is what a GGUF is of."""


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Of a model with this config.json. InputError, by name, for what is not done. `where` begins the message."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise InputError(f"{where} is of a {kind!s:.40} model (model_type); only {_done('model_type')} are done here")
    return ARCHITECTURES[kind]


def by_gguf(name: str, where: str) -> Architecture:
    """Of a GGUF of this architecture. InputError as architecture."""
    found = next((one for one in ARCHITECTURES.values() if one.gguf == name), None)
    if found is None:
        said = f"a {name!s:.40} model (general.architecture)"
        raise InputError(f"{where} is of {said}; only {_done('gguf')} are done here")
    return found


def _done(name: str) -> str:
    titles = [one.title for one in ARCHITECTURES.values()]
    names = dict.fromkeys(getattr(one, name) for one in ARCHITECTURES.values())
    return f"{', '.join(titles[:-1])}{' and ' if titles[1:] else ''}{titles[-1]} models ({', '.join(names)})"
