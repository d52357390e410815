"""The programs: what pip is told, what their pins are set aside for, and the script that runs inside."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Program:
    name: str
    script: str
    """In `inside/`."""
    pip: tuple[str, ...]
    """Arguments of one `pip install` after another, each with the constraint `torch==2.13.0`."""
    mended: str = ""
    """Pins left aside and hand-mending, for the table."""
    limit: int = 900
    """Seconds that the script may take."""


PROGRAMS = (
    Program(
        "transformers-4.45", "with_transformers.py", ("transformers==4.45.2 peft==0.13.2 accelerate sentencepiece",)
    ),
    Program("transformers", "with_transformers.py", ("transformers peft accelerate",)),
    Program("trl", "with_trl.py", ("trl transformers peft accelerate datasets",)),
    Program("llama-cpp-python", "with_llama_cpp.py", ("llama-cpp-python",), "Compiled, in some minutes."),
)
