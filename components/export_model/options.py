"""The options of export_model."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from zhllama.artifacts.manifest import Input
from zhllama.errors import InputError
from zhllama.stage.options import Ref, StageOptions


@dataclass(frozen=True, kw_only=True)
class ExportModel(StageOptions):
    """Export a Hugging Face model to another format."""

    cache_version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("torch",)

    model: Ref
    """Reference to the Hugging Face model."""
    format: Literal["meta", "gguf"] = "meta"
    """meta: Meta's checkpoint (consolidated.NN.pth, params.json). gguf: llama.cpp's file."""
    shards: int = 0
    """meta: files that the model is cut into. 0: as many as Meta's own of this size (7B 1, 13B 2, 30B 4, 65B 8; else
    1)."""
    quantization: str = ""
    """gguf: types, comma-separated, a file each: f16, bf16, f32, q8_0, q6_k, q5_k_m, q4_k_m … Empty: the model's own
    precision."""
    name: str = "zhllama"
    """gguf: the model's name, as programs show it."""

    def __post_init__(self) -> None:
        from components.export_model.gguf_export import quantised, split_kinds
        from components.export_model.llama_cpp_tools import installed

        if not 0 <= self.shards <= 64:
            raise InputError(f"--shards {self.shards}: give 1 to 64, or 0 for as many as Meta's own files")
        if self.format == "gguf" and self.shards:
            raise InputError(f"--shards {self.shards}: a GGUF is one file; leave it out")
        if self.format == "meta" and self.quantization:
            raise InputError(f"--quantization {self.quantization}: Meta's format has none; give --format gguf")
        kinds = split_kinds(self.quantization)
        if self.format == "gguf" and quantised(kinds) and not installed():
            raise InputError(
                f"--quantization {self.quantization}: the package llama-cpp-python, which makes {quantised(kinds)[0]}, "
                "is not installed; install zhllama[gguf], with a C++ compiler at hand, or give f16"
            )

    def more_inputs(self) -> dict[str, Input]:
        """llama.cpp quantises, and says how many ids differ: another version's is another work."""
        from components.export_model.llama_cpp_tools import installed

        there = self.format == "gguf" and installed()
        return {"llama.cpp": Input("llama-cpp-python", there)} if there else {}
