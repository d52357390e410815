"""Small values from every process of a training to every other, as JSON.

torch's own way (all_gather_object) sends pickles, and gloo's connections ask nobody who he is: whoever reached one ran
code in the training.
"""

import json
from typing import Any

import torch
import torch.distributed as dist

from zhllama.errors import InputError, StorageFault

_ERRORS = {one.__name__: one for one in (InputError, StorageFault, ValueError)}


def values_of_all(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value, on all ranks: text, number, boolean, None, or an error (which comes as InputError,
    StorageFault, or else ValueError, with its text). group: gloo's; None: this process is alone."""
    if group is None:
        return [value]
    content = torch.frombuffer(bytearray(json.dumps(_said(value)).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([len(content)]), group=group)
    room = max(int(size) for size in sizes)
    boxes = [torch.zeros(room, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(boxes, torch.nn.functional.pad(content, (0, room - len(content))), group=group)
    return [_meant(json.loads(bytes(box[: int(size)].tolist()))) for box, size in zip(boxes, sizes)]


def _said(value: Any) -> Any:
    if isinstance(value, Exception):
        kind = next((name for name, one in _ERRORS.items() if isinstance(value, one)), "ValueError")
        return {kind: str(value)}
    return value


def _meant(value: Any) -> Any:
    if isinstance(value, dict):
        ((kind, text),) = value.items()
        return _ERRORS[kind](text)
    return value
