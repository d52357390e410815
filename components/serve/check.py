"""Whether a published model is fit to be served: what a serving pod's init container runs before vLLM starts.

`python -m components.serve.check --model REF --context-length N`. No weight is read and no torch needed: the manifest
against what is stored, every shard's header, the embedding's rows against the tokenizer, and the tokenizer that engines
use against SentencePiece's ids. Exit 0: fit; 2: not, with one line that says what is wrong.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zhllama import storage
from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.inference.load import check_model
from zhllama.stage.options import Ref
from zhllama.stage.program import bounded
from zhllama.tokenizer.prompt import wrap
from zhllama.tokenizer.sentencepiece_model import BPE, new_model
from zhllama.tokenizer.vocabulary import Encoder, Relation, Vocabulary

log = logging.getLogger("check")

TOKENIZER_FILES = ("config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json")
LINES = (
    "你好，世界！今天天气不错。",
    "The quick brown fox, 3.14 and more.",
    "  两个  空格，制表\t和换行\n之后",
    "全角１２３，生僻字𠀀，表情🀄，重音é",
    "for i in range(10):\n    print(i)",
    "",
)
"""What the served tokenizer is tried on."""
RENDERING = 10.0
"""Seconds that a chat template may take for one message."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Say whether a published model is fit to be served."""

    model: Ref
    """Reference to the model."""
    context_length: int = 0
    """Tokens of prompt and answer together that it will be served with; 0: as many as it has."""


def checked(model: str, context_length: int = 0) -> tuple[Artifact, Encoder]:
    """The model and its encoder; InputError when it is not fit to be served."""
    artifact = open_artifact(model, "--model").require_kind("hf-model", option="--model")
    where = f"--model {artifact.root}"
    encoder, positions = check_weights(artifact)
    if context_length > positions:
        raise InputError(f"{where}: the model has {positions} positions; --context-length {context_length} is more")
    with tempfile.TemporaryDirectory(prefix="zhllama-check-") as folder:
        artifact.fetch(Path(folder), [name for name in TOKENIZER_FILES if name in artifact])
        check_tokenizer(Path(folder), encoder, where)
    return artifact, encoder


def check_weights(artifact: Artifact) -> tuple[Encoder, int]:
    """The model's encoder, and its tokens of prompt and answer together. InputError when a file is not as the manifest
    says, config.json does not say how many those are, and as check_model."""
    where = f"--model {artifact.root}"
    if artifact.verified:
        there = {item.name: item.size for item in storage.listing(artifact.root)}
        for name in artifact.names:
            size = artifact.file(name).size
            if there.get(name) != size:
                found = f"{there[name]} bytes" if name in there else "not there"
                raise InputError(f"{where}: {name} is {found}, the manifest says {size} bytes; publish the model again")
    encoder, _ = check_model(artifact, "--model")
    try:
        return encoder, int(read_object(artifact, "config.json")["max_position_embeddings"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: config.json has no max_position_embeddings ({error}); publish it again") from error


def check_tokenizer(folder: Path, encoder: Encoder, where: str) -> None:
    """InputError unless the folder's tokenizer gives SentencePiece's ids, for text and for a question."""
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            raise InputError(f"{where}: no {name} in it; serve a model that was published with its tokenizer files")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mend = "publish the model again; with tied scores (--scores zero) no served tokenizer can agree"
    for line in LINES:
        if tokenizer(line)["input_ids"] != [encoder.bos, *encoder.encode(line)]:
            raise InputError(f"{where}: tokenizer.json gives other ids than tokenizer.model for {line!r}; {mend}")
    if not tokenizer.chat_template:
        raise InputError(f"{where}: tokenizer_config.json has no chat template; {mend}")
    for line in LINES[:2]:
        asked = [{"role": "user", "content": line}]
        with _template(where, mend):
            ids = tokenizer.apply_chat_template(asked, tokenize=True, return_dict=False)
        if list(ids) != [encoder.bos, *encoder.encode(wrap(line))]:
            raise InputError(f"{where}: its chat template is not the training prompt; {mend}")


def check_gguf(path: Path, contract: Vocabulary | None, where: str) -> tuple[Encoder, int]:
    """The encoder of a GGUF file, and its positions. InputError where ids in would not be the ids of training.

    A GGUF carries its pieces, scores and types. They are put together again as the SentencePiece model that they came
    from, which then says what llama.cpp has to give; so a file of somebody else's is checked as well as one of our own,
    whose manifest says in addition which vocabulary it must be. No weight is read.
    """
    from gguf import GGUFReader

    try:
        fields = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise InputError(f"{where}: not a GGUF file, or cut short ({error}); export or fetch it again") from error
    if fields.get("tokenizer.ggml.model") != "llama":
        raise InputError(f"{where}: its tokenizer is not SentencePiece's; export the model again with export_model")
    encoder = Encoder(_sentencepiece(fields), where)
    if contract is not None:
        found = encoder.vocabulary(also_at=(int(size) for size in contract.prefixes))
        if found.relation_to(contract) is not Relation.EQUAL:
            raise InputError(f"{where}: it has {found}, the manifest says {contract}; export the model again")
    _compare_gguf(path, encoder, str(fields.get("tokenizer.chat_template", "")), where)
    return encoder, int(fields.get("llama.context_length", 2048))


def _sentencepiece(fields: Mapping[str, Any]) -> bytes:
    """The bytes of the tokenizer.model that these pieces, scores and types are of. Types have the same numbers."""
    rows = zip(*(fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")), strict=True)
    pieces = [{"piece": text, "score": score, "type": kind} for text, score, kind in rows]
    ids = {
        "unk_id": int(fields.get("tokenizer.ggml.unknown_token_id", 0)),
        "bos_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_id": -1,
    }
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    model = new_model(
        pieces=pieces,
        trainer_spec={"model_type": BPE, "byte_fallback": True, "vocab_size": len(pieces), **ids},
        normalizer_spec={"name": "identity", "add_dummy_prefix": prefix, "remove_extra_whitespaces": False},
    )
    return bytes(model.SerializeToString())


def _compare_gguf(path: Path, encoder: Encoder, template: str, where: str) -> None:
    """InputError where llama.cpp, or the chat template in the file, gives other ids than training."""
    import jinja2.sandbox
    import llama_cpp

    mend = "export the model again; with tied scores (--scores zero) no engine can agree"
    with closing(llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)) as model:
        for line in (*LINES, wrap(LINES[0])):
            # an empty text is BOS alone; llama.cpp's own binding cannot be asked for it
            if line and model.tokenize(line.encode(), add_bos=True) != [encoder.bos, *encoder.encode(line)]:
                raise InputError(f"{where}: llama.cpp gives other ids than SentencePiece for {line!r}; {mend}")
    if not template:
        raise InputError(f"{where}: there is no chat template in it; export the model again")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    special = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    with _template(where, "export the model again"):
        rendered = environment.from_string(template).render(messages=[{"role": "user", "content": LINES[0]}], **special)
    if rendered.removeprefix("<s>") != wrap(LINES[0]):
        raise InputError(f"{where}: its chat template is not the training prompt; export the model again")


@contextmanager
def _template(where: str, mend: str) -> Iterator[None]:
    """InputError for a chat template that is none, fails, or goes on for longer than any conversation's takes."""
    import jinja2

    try:
        with bounded(RENDERING, f"{where}: its chat template does not end; {mend}"):
            yield
    except (jinja2.TemplateError, ArithmeticError, MemoryError, LookupError, RecursionError, TypeError) as error:
        raise InputError(f"{where}: its chat template cannot be read ({error}); {mend}") from error


def main() -> None:
    import sys

    from zhllama.stage.command_line import parse

    config = parse(Check, sys.argv[1:])
    artifact, encoder = checked(config.model, config.context_length)
    log.info("%s is fit to be served: %d files, %d pieces", artifact.root, len(artifact.names), encoder.size)


if __name__ == "__main__":
    from zhllama.stage.program import guarded

    guarded(main)
