"""Whether a published model is fit to be served: what a serving pod's init container runs before vLLM starts.

`python -m components.serve.check --model REF --context-length N`. No weight is read and no torch needed: the manifest
against what is stored, every shard's header, the embedding's rows against the tokenizer, and the tokenizer that engines
use against SentencePiece's ids. Exit 0: fit; 2: not, with one line that says what is wrong.
"""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

from components.serve.served_folder import check_sizes, check_tokenizer, positions_of
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.inference.check import check_model
from zhllama.stage.options import Ref
from zhllama.tokenizer.vocabulary import Encoder

log = logging.getLogger("check")

TOKENIZER_FILES = ("config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class Check:
    """Say whether a published model is fit to be served."""

    model: Ref
    """Reference to the model."""
    context_length: int = 0
    """Tokens of prompt and answer together that it will be served with; 0: as many as it has."""


def check(config: Check) -> None:
    """InputError, in one line, when it is not."""
    artifact, encoder = checked(config.model, config.context_length)
    log.info("%s is fit to be served: %d files, %d pieces", artifact.root, len(artifact.names), encoder.size)


def checked(model: str, context_length: int = 0) -> tuple[Artifact, Encoder]:
    """The model and its encoder; InputError when it is not fit to be served."""
    artifact = open_artifact(model, "--model").require_kind("hf-model", option="--model")
    where = f"--model {artifact.root}"
    check_sizes(artifact, where)
    encoder, _ = check_model(artifact, "--model")
    positions = positions_of(artifact)
    if context_length > positions:
        raise InputError(f"{where}: the model has {positions} positions; --context-length {context_length} is more")
    with tempfile.TemporaryDirectory(prefix="zhllama-check-") as folder:
        artifact.fetch(Path(folder), [name for name in TOKENIZER_FILES if name in artifact])
        check_tokenizer(Path(folder), encoder, where)
    return artifact, encoder


if __name__ == "__main__":
    import sys

    from zhllama.stage.command_line import parse
    from zhllama.stage.program import guarded

    guarded(lambda: check(parse(Check, sys.argv[1:])))
