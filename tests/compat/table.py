"""The table of results: Markdown, a section a program."""

from collections.abc import Mapping, Sequence

from tests.compat.comparison import Row
from tests.compat.programs import Program

HEAD = """# Other programs

`make compat` installs each program of this page from PyPI into a virtual environment of its own (`COMPAT_VENVS`,
default `build/compat/venvs`; torch 2.13.0 by constraint), gives it what our stages published, takes back what it saved,
and writes this page; it ends with exit code 1 where something differs without a word. `ONLY="trl mergekit"` tries some,
and leaves the others' rows as they are.

What it gives: `merged` (an extended vocabulary, two adapters merged in, float32), `tied` (one table for embedding and
head, float16), `stretched` (rope linear, factor 4, float16), the adapters `rows` (LoRA, embeddings and head in full)
and `lora`, `llama3` and `qwen` (byte-level BPE of the shapes of Llama 3's, with 256 special tokens, and of Qwen's, with
more rows than tokens, their merges continued; float32), and GGUF of all models. Two layers, 128 wide, 1,125 pieces, the
byte-level ones 1,957 and 1,705: what is compared is arithmetic.

- ids: lines of Chinese, English, both, white space, emoji, whose ids are ours. chats: conversations of one
  and two turns, by the template that the program finds in the folder. spoken, answers: greedy answers, text and ids;
  bytes that are no character have a mark in some programs, and none in others.
- probe: the ids of over 2,000 more lines, of the byte-level models: Chinese, English, code, white space, digits, emoji,
  rare signs, lines of 1,000 signs, special tokens spelt in a text, which engines read as those tokens.
- logits: the largest difference to ours, which stand in units of some 10. next: of the log probabilities after a text;
  chosen: of those of an answer; likelihood: lm-eval's sums. A quantised model (q8_0) may answer otherwise.
- our merge: the tensors of `merge_models` beside the program's, both in float32.
- "→": what the program saved, through our own commands, beside the program's own logits: `merge_adapters` rounds to the
  dtype of its base, float16 where that is `tied` or `stretched`.
- `marked` is `merged` with `{% generation %}` markers in its chat template, which transformers from 4.45 on, vLLM,
  mistral.rs, llama.cpp's server and llama-cpp-python take.
"""


def section(program: Program, versions: Mapping[str, str], rows: Sequence[Row]) -> str:
    told = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines = [f"## {program.name}", ""]
    lines += [part + "\n" for part in (told and f"Versions: {told}.", program.mended) if part]
    lines += ["| tried | result |", "|---|---|"]
    for row in rows:
        result = f"**differs**: {row.result}" if row.differs else row.result
        lines.append(f"| {_cell(row.tried)} | {_cell(result)} |")
    return "\n".join(lines) + "\n"


def page(sections: Sequence[str]) -> str:
    return "\n".join([HEAD, *sections])


def sections(page: str) -> dict[str, str]:
    """Program → its section of a page that was written before."""
    found = page.split("\n## ")[1:]
    return {one.split("\n", 1)[0]: f"## {one.rstrip()}\n" for one in found}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
