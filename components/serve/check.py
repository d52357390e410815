"""Whether a published model is fit to be served: what a serving pod's init container runs before vLLM starts.

`python -m components.serve.check --model REF --context-length N`. No weight is read and no torch needed: the manifest
against what is stored, every shard's header, the embedding's rows against the tokenizer, and the tokenizer that engines
use against the ids of training. Exit 0: fit; 2: not, with one line that says what is wrong.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from components.serve import vllm_guard
from components.serve.gguf_ids import ids_of
from zhllama import storage
from zhllama.artifacts.in_memory import in_memory
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.inference.load import check_model
from zhllama.kubernetes.model_server import GUARD
from zhllama.models import by_gguf
from zhllama.stage.options import Ref
from zhllama.stage.program import bounded
from zhllama.storage.private import temporary_folder
from zhllama.tokenizer.chat import Chat, asked
from zhllama.tokenizer.effective_model import DESCRIBED
from zhllama.tokenizer.gguf_tokenizer import tokenizer_files_of
from zhllama.tokenizer.vocabulary import Encoder, Relation, Vocabulary, load_encoder
from zhllama.weights.chat_template import default_of, is_template, template_in
from zhllama.weights.gguf_file import GgufHeader
from zhllama.weights.model_config import model_config
from zhllama.weights.safetensors_io import Checkpoint

log = logging.getLogger("check")

TOKENIZER_FILES = ("config.json", "tokenizer.model", *DESCRIBED)
"""With the chat templates beside them, what engines encode by."""
LINES = (
    "你好，世界！今天天气不错。",
    "The quick brown fox, 3.14 and more.",
    "  两个  空格，制表\t和换行\n之后",
    "全角１２３，生僻字𠀀，表情🀄，重音é",
    "for i in range(10):\n    print(i)",
    "",
)
"""What the served tokenizer is tried on; the first two as questions too."""
RENDERING = 10.0
"""Seconds that a chat template may take for one message."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Say whether a published model is fit to be served."""

    model: Ref
    """Reference to the model."""
    context_length: int = 0
    """Tokens of prompt and answer together that it will be served with; 0: as many as it has."""
    key_file: str = ""
    """The file with the API key that the server will ask for; it must be there, and not be empty."""
    guard: str = ""
    """A folder that gets what stands before vLLM's server and asks for that key (components/serve/vllm_guard.py)."""


def checked(model: str, context_length: int = 0) -> tuple[Artifact, Encoder, Chat]:
    """The model, its encoder, and how it is asked; InputError when it is not fit to be served."""
    artifact = open_artifact(model, "--model").require_kind("hf-model", option="--model")
    where = f"--model {artifact.root}"
    encoder, positions = check_weights(artifact)
    chat = chat_of(artifact, encoder)
    if context_length > positions:
        raise InputError(f"{where}: the model has {positions} positions; --context-length {context_length} is more")
    with temporary_folder() as folder:
        names = [name for name in artifact.names if name in TOKENIZER_FILES or is_template(name)]
        artifact.fetch(Path(folder), names)
        check_tokenizer(Path(folder), encoder, where, chat)
    return artifact, encoder, chat


def chat_of(artifact: Artifact, encoder: Encoder) -> Chat:
    """How a model is asked: by the chat template that engines find in its folder. InputError when there is none."""
    template = default_of(template_in(artifact, "--model"))
    if not template:
        said = "tokenizer_config.json has no chat template"
        raise InputError(f"--model {artifact.root}: {said}; serve a model that was published with its tokenizer files")
    return Chat(encoder, template)


def check_weights(artifact: Artifact) -> tuple[Encoder, int]:
    """The model's encoder, and its tokens of prompt and answer together. InputError when a file is not as the manifest
    says, and as check_model."""
    where = f"--model {artifact.root}"
    if artifact.verified:
        wanted = {name: artifact.file(name).size for name in artifact.names}
        for name, size in storage.not_as_wanted(artifact.root, wanted):
            found = "not there" if size is None else f"{size} bytes"
            said = f"{name} is {found}, the manifest says {wanted[name]} bytes"
            raise InputError(f"{where}: {said}; publish the model again")
    encoder, _ = check_model(artifact, "--model")
    return encoder, int(model_config(Checkpoint(artifact))["max_position_embeddings"])


def check_tokenizer(folder: Path, encoder: Encoder, where: str, chat: Chat) -> None:
    """InputError unless the folder's tokenizer gives the ids of training, for text and for a question."""
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            raise InputError(f"{where}: no {name} in it; serve a model that was published with its tokenizer files")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mend = "publish the model again; with tied scores (--scores zero) no served tokenizer can agree"
    for line in LINES:
        if tokenizer(line)["input_ids"] != [*encoder.begin, *encoder.encode(line)]:
            raise InputError(f"{where}: tokenizer.json gives other ids than training for {line!r}; {mend}")
    for messages, wanted in conversations(chat, where, mend):
        with _template(where, mend):
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
        if list(ids) != wanted:
            raise InputError(f"{where}: tokenizer.json gives other ids than training for a question; {mend}")


def conversations(chat: Chat, where: str, mend: str) -> Iterator[tuple[list[dict[str, str]], list[int]]]:
    """Questions, alone and behind an answer where the chat template takes one, and their ids. InputError where it
    takes none."""
    for line in LINES[:2]:
        for more in ([], [{"role": "assistant", "content": LINES[0]}, *asked(LINES[1])]):
            messages = [*asked(line), *more]
            try:
                yield messages, chat.ids(messages)
            except InputError as error:
                if not more:
                    raise InputError(f"{where}: {error}; {mend}") from error


def check_gguf(path: Path, contract: Vocabulary | None, where: str) -> tuple[Encoder, int, Chat]:
    """The encoder of a GGUF file, its positions, and how it is asked. InputError where ids in would not be the ids of
    training.

    A GGUF carries its tokenizer. It is put together again as the files that it came from, which then say what llama.cpp
    has to give: so a file of somebody else's is checked as well as one of our own, whose manifest says which vocabulary
    it must be. No weight is read.
    """
    with open(path, "rb") as stream:
        fields = GgufHeader(stream, path.stat().st_size, where).fields
    kind = by_gguf(str(fields.get("general.architecture")), where)
    encoder = load_encoder(in_memory(tokenizer_files_of(fields, where), where.removeprefix("--model ")), "--model")
    positions = fields.get(f"{kind.gguf}.context_length", 2048)
    if type(positions) is not int or positions < 1:
        raise InputError(f"{where}: it says that it has {positions!r:.20} positions; export or fetch it again")
    if contract is not None:
        found = encoder.vocabulary(also_at=(int(size) for size in contract.prefixes))
        if found.relation_to(contract) is not Relation.EQUAL:
            raise InputError(f"{where}: it has {found}, the manifest says {contract}; export the model again")
    if not (template := str(fields.get("tokenizer.chat_template") or "")):
        raise InputError(f"{where}: there is no chat template in it; export the model again")
    chat = Chat(encoder, template)
    _compare_gguf(path, encoder, chat, where)
    return encoder, positions, chat


def _compare_gguf(path: Path, encoder: Encoder, chat: Chat, where: str) -> None:
    """InputError where llama.cpp gives other ids than training, for text and for a question."""
    mend = "export the model again; with tied scores (--scores zero) no engine can agree"
    questions = [(chat.text(messages), wanted) for messages, wanted in conversations(chat, where, mend)]
    # an empty text is BOS alone; llama.cpp's own binding cannot be asked for it
    lines = [line for line in LINES if line]
    try:
        told = ids_of(path, [*((line, False) for line in lines), *((text, True) for text, _ in questions)])
    except ValueError as error:
        raise InputError(f"{where}: llama.cpp does not read it ({error}); export or fetch it again") from error
    for line, ids in zip(lines, told):
        if ids != [*encoder.begin, *encoder.encode(line)]:
            raise InputError(f"{where}: llama.cpp gives other ids than training for {line!r}; {mend}")
    if told[len(lines) :] != [wanted for _, wanted in questions]:
        raise InputError(f"{where}: llama.cpp gives other ids than training for a question; {mend}")


@contextmanager
def _template(where: str, mend: str) -> Iterator[None]:
    """InputError for a chat template that is none, fails, or goes on for longer than any conversation's takes."""
    import jinja2

    try:
        with bounded(RENDERING, f"{where}: its chat template does not end; {mend}"):
            yield
    except (jinja2.TemplateError, ArithmeticError, MemoryError, LookupError, RecursionError, TypeError) as error:
        raise InputError(f"{where}: its chat template cannot be read ({error}); {mend}") from error


def check_key(file: str) -> None:
    """InputError unless there is a key in the file."""
    try:
        there = bool(Path(file).read_bytes().strip())
    except OSError:
        there = False
    if not there:
        raise InputError(
            f"{file}: there is no API key to ask for; give the secret of the API key the key {Path(file).name} "
            "(openssl rand -hex 24 makes one)"
        )


def main() -> None:
    import sys

    from zhllama.stage.command_line import parse

    config = parse(Check, sys.argv[1:])
    if config.key_file:
        check_key(config.key_file)
    if config.guard:
        Path(config.guard).mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(vllm_guard.__file__, Path(config.guard) / f"{GUARD}.py")
    artifact, encoder, _ = checked(config.model, config.context_length)
    log.info("%s is fit to be served: %d files, %d pieces", artifact.root, len(artifact.names), encoder.size)


if __name__ == "__main__":
    from zhllama.stage.program import guarded

    guarded(main)
