from dataclasses import dataclass
from typing import ClassVar, Literal

from zhllama.artifacts.manifest import Input, digest_of
from zhllama.errors import InputError
from zhllama.stage.options import NotKeyed, Ref, StageOptions


@dataclass(frozen=True, kw_only=True)
class ConvertWeights(StageOptions):
    """Convert Meta's checkpoint, a GGUF or another's Hugging Face folder to a Hugging Face model of ours."""

    cache_version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "sentencepiece")

    weights: Ref
    """Reference to Meta's files (consolidated.NN.pth, params.json, tokenizer.model), to a GGUF, or to a folder of
    transformers' (safetensors or .bin)."""
    max_positions: int = 2048
    """Positions that the model was trained on. Meta's files do not say; LLaMA has 2,048, LLaMA 2 4,096. Of Llama 3,
    2,048 stands for its own (8,192; 131,072 from 3.1 on); a GGUF says it itself."""
    # in the key where it is set (more_inputs): what was converted without it stays what it is
    dtype: NotKeyed[Literal["", "float16", "bfloat16", "float32"]] = ""
    """Of what a GGUF or a folder is converted to. Empty: a folder's own; of a GGUF what holds every value, float32 if
    it is quantised (bfloat16 is half that)."""

    def __post_init__(self) -> None:
        if self.max_positions < 1:
            raise InputError(f"--max-positions {self.max_positions}: give the positions the model knows, as 2048")

    def more_inputs(self) -> dict[str, Input]:
        return {"dtype": Input(self.dtype, digest_of(self.dtype))} if self.dtype else {}
