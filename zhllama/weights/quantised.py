"""Models whose weights are quantised, integers with scales beside them: nothing that computes with weights takes them.

Read as the numbers that they are not, they would merge, export and extend without a complaint, to a model that is
noise. transformers loads them through the library that made them; everything here wants the weights in floating point.
"""

from collections.abc import Iterable

from zhllama.errors import InputError
from zhllama.weights.safetensors_io import Checkpoint

_FLOATING = ("float16", "bfloat16", "float32", "float64")


def refuse_quantised(checkpoint: Checkpoint, where: str, names: Iterable[str] | None = None) -> None:
    """InputError when one of these tensors (default: all) is no floating-point one; `where` begins the message.

    From the headers: no weight is read.
    """
    for name in checkpoint.tensors if names is None else names:
        dtype = checkpoint.info(name).dtype
        if dtype not in _FLOATING:
            raise InputError(
                f"{where}: {name} is {dtype}, a quantised weight; give the model in float16, bfloat16 or float32"
            )
