import math
from dataclasses import dataclass
from typing import ClassVar

from zhllama.errors import InputError
from zhllama.stage.options import Later, Ref, Refs, StageOptions, split_references


@dataclass(frozen=True, kw_only=True)
class MergeAdapters(StageOptions):
    """Merge one or several LoRA adapters into a model, in the order given."""

    cache_version: ClassVar[int] = 3
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "sentencepiece")

    model: Ref
    """Reference to the Hugging Face model."""
    adapters: Refs
    """References to the adapters, comma-separated, in the order in which they were trained: references, folders, or
    repositories of the Hugging Face hub (hf://owner/name, or owner/name)."""
    prove: bool = False
    """Ask the model with its adapters, and the merged model, the same prompts, and put the difference into the report.
    For models that this machine's memory holds in float32."""

    scale: Later[float] = 1.0
    """Of what each adapter changes: 1 as it was trained, 0.5 half of it, of LoRA and of whatever comes in the place of
    the model's (W + scale · (trained − W)). Rows that the model has not stay as they come."""

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise InputError(f"--scale {self.scale:g}: give a number above 0, as 0.7; 1 merges what was trained")
        if not split_references(self.adapters):
            raise InputError("--adapters: no adapter given; give one or several references, comma-separated")
