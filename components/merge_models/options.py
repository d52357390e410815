import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from zhllama.errors import InputError
from zhllama.stage.options import Ref, StageOptions

Method = Literal["linear", "slerp", "chat-vector"]


@dataclass(frozen=True, kw_only=True)
class MergeModels(StageOptions):
    """Merge two models of one shape into one between them, or add the difference of two to a third."""

    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "sentencepiece")

    model: Ref
    """Reference to the model that is changed: the result has its dtype, its settings and its files."""
    other: Ref
    """Reference to the model that it is merged with; for a chat vector, the instruct model."""
    base: Ref = ""
    """For a chat vector alone: reference to the base that --other was made of."""
    method: Method = "linear"
    """linear: (1 − weight) · model + weight · other. slerp: as far along the arc between the two, tensor by tensor.
    chat-vector: model + weight · (other − base)."""
    weight: float | None = None
    """How much of --other: 0 is --model, 1 is --other. 0.5 where nothing is said, of a chat vector the whole, 1."""
    embeddings: float | None = None
    """That of embedding and head, where it is another one."""
    attention: float | None = None
    """That of attention: its projections with their biases, and the norms of queries and keys."""
    feed_forward: float | None = None
    """That of the feed-forward halves of the layers, with their biases. The norms between have --weight."""

    def __post_init__(self) -> None:
        chat = self.method == "chat-vector"
        if chat and not self.base:
            raise InputError("--method chat-vector: the difference is between --other and its --base; give --base too")
        if self.base and not chat:
            raise InputError(f"--base: --method {self.method} merges two models; leave it out, or take chat-vector")
        for group, weight in self.weights.items():
            option = "--weight" if group == "norms" else f"--{group.replace('_', '-')}"
            if not (math.isfinite(weight) if chat else 0 <= weight <= 1):
                raise InputError(f"{option} {weight:g}: give a number{'' if chat else ' from 0 to 1'}, as 0.3")
        if not any(self.weights.values()):
            raise InputError("--weight 0: every weight is 0, and nothing would be merged; give one above it")

    @property
    def weights(self) -> Mapping[str, float]:
        """By the groups of tensors (zhllama/weights/blend.py)."""
        weight = (1.0 if self.method == "chat-vector" else 0.5) if self.weight is None else self.weight
        given = {"embeddings": self.embeddings, "attention": self.attention, "feed_forward": self.feed_forward}
        return {"norms": weight} | {group: weight if own is None else own for group, own in given.items()}
