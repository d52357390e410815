"""llama-cpp-python's view of a GGUF; our driver uses it too, for what it exports of a saved model."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def opened(path: str) -> Any:
    """With a cache of keys and values in float32, which is float16 otherwise."""
    from llama_cpp import GGML_TYPE_F32, Llama

    return Llama(path, n_ctx=512, logits_all=True, verbose=False, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)


def ids(model: Any, lines: Sequence[str]) -> list[list[int]]:
    return [model.tokenize(line.encode(), add_bos=True, special=True) for line in lines]


def logits(model: Any, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    found = []
    for text in texts:
        model.reset()
        model.eval(text)
        found.append(np.array(model.scores[: len(text)]))
    return found
