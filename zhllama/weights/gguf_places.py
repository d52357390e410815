"""Stand-in for zhllama.models until that is merged: LLaMA alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zhllama.errors import InputError
from zhllama.weights.meta_format import EMBEDDING, HEAD
from zhllama.weights.model_config import _shapes


@dataclass(frozen=True)
class Place:
    hf: str
    shape: tuple[int, ...]
    kind: str
    gguf: str
    heads: int = 0


class _Llama:
    model_type = gguf = "llama"
    flags = frozenset({"attention_bias", "mlp_bias"})

    def places(self, config: Mapping[str, Any]) -> Iterator[Place]:
        from gguf import MODEL_ARCH, get_tensor_name_map

        names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        kinds = {EMBEDDING: "embedding", HEAD: "head"}
        for name, shape in _shapes(config).items():
            module, _, suffix = name.rpartition(".")
            kind = kinds.get(name) or ("linear" if len(shape) > 1 else "norm")
            gguf = f"{names.get_name(module)}.{suffix}"
            yield Place(name, shape, kind, gguf, heads.get(module.rpartition(".")[2], 0))


def by_gguf(name: Any, where: str) -> _Llama:
    if name != "llama":
        raise InputError(f"{where} is of a {name!s:.40} model (general.architecture); only LLaMA models are done here")
    return _Llama()
