"""Kinds of GPU, as data: gpus.yaml, or a file of the same form."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.sizes import read_yaml, record
from zhllama.errors import InputError
from zhllama.stage.command_line import nearest
from zhllama.training.hardware import peak_tflops

FILE = Path(__file__).with_name("gpus.yaml")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    name: str
    device: str
    """As CUDA calls it."""
    memory_mib: int
    """As NVML reports it."""
    tflops: float = 0
    """bfloat16, dense; left out: as a training takes the device to do."""
    bandwidth_tbs: float
    """Of its memory, in TB/s."""
    mfu: float
    """Assumed share of `tflops` in the model's own products."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tflops", self.tflops or peak_tflops(self.device))

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.memory_mib * 2**20


def gpus(path: Path = FILE) -> dict[str, Gpu]:
    """The kinds in a file, by name, smallest memory first. InputError for a file that is none of them."""
    value = read_yaml(path, str(path))
    if not isinstance(value, Mapping):
        raise InputError(f"{path}: no list of GPUs as pipelines/planner/gpus.yaml")
    found = [record(Gpu, fields, str(path), f"{name}.", name=name) for name, fields in value.items()]
    for gpu in found:
        if not gpu.tflops:
            raise InputError(f"{path}: {gpu.name}: what a {gpu.device} does is not known; give its tflops")
    return {gpu.name: gpu for gpu in sorted(found, key=lambda gpu: (gpu.memory_mib, gpu.tflops))}


def gpu_of(name: str, path: Path = FILE) -> Gpu:
    """The kind of that name. InputError names the nearest where there is none."""
    known = gpus(path)
    if name not in known:
        raise InputError(f"--gpu {name}: not known{nearest(name, known)}; {', '.join(known)} are")
    return known[name]
