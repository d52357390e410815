"""Kinds of GPU, as data: gpus.yaml, or a file of the same form."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

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
    """bfloat16, dense; 0: as a training takes the device to do."""
    bandwidth_tbs: float
    """Of its memory, in TB/s."""
    mfu: float
    """Assumed share of `tflops` in the model's own products."""

    def __post_init__(self) -> None:
        if not self.tflops:
            object.__setattr__(self, "tflops", peak_tflops(str(self.device)))

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.memory_mib * 2**20


def gpus(path: Path = FILE) -> dict[str, Gpu]:
    """The kinds in a file, by name, smallest memory first. InputError for a file that is none of them."""
    import yaml

    try:
        value = yaml.safe_load(path.read_text())
        found = [Gpu(name=name, **fields) for name, fields in value.items()]
        for gpu in found:
            for field in dataclasses.fields(Gpu):
                given = getattr(gpu, field.name)
                numeric = field.type in (int, float)
                if numeric and (isinstance(given, bool) or not isinstance(given, int | float) or given <= 0):
                    raise InputError(f"{path}: {gpu.name}: {field.name} is {given!r}, a number above 0 is needed")
    except (OSError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: no list of GPUs as pipelines/planner/gpus.yaml ({error})") from error
    return {gpu.name: gpu for gpu in sorted(found, key=lambda gpu: (gpu.memory_mib, gpu.tflops))}


def gpu_of(name: str, path: Path = FILE) -> Gpu:
    """The kind of that name. InputError names the nearest where there is none."""
    known = gpus(path)
    if name not in known:
        raise InputError(f"--gpu {name}: not known{nearest(name, known)}; {', '.join(known)} are")
    return known[name]
