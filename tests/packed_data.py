"""Packed data for the tiny model: text, and instructions with short answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.packed import KIND, TRAIN, VALIDATION, Blocks, PackedWriter, Segments, packed_facts
from zhllama.tokenizer.prompt import RECIPE
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.vocabulary import Vocabulary

BLOCK = 64


class Segment(NamedTuple):
    """A document, or a piece of one, as it goes into a block: its ids, and how many of them are prompt."""

    ids: np.ndarray
    prompt: int = 0


def in_arrays(segments: Sequence[Segment]) -> Segments:
    """These segments in arrays."""
    ids = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in segments)])
    lengths = np.array([len(ids) for ids, _ in segments], np.int64)
    return Segments(ids, lengths, np.array([prompt for _, prompt in segments], np.int64))


def blocks_of(*blocks: Sequence[Segment]) -> Blocks:
    """These blocks in arrays."""
    segments = in_arrays([segment for block in blocks for segment in block])
    return Blocks(segments, np.array([len(block) for block in blocks], np.int64))


def quantise(model: Path) -> None:
    """Makes integers of the matrices, as bitsandbytes stores them."""
    import torch
    from safetensors.torch import load_file, save_file

    path = model / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    save_file({name: (t * 100).to(torch.int8) if t.dim() == 2 else t for name, t in tensors.items()}, path)


def packed(store: str, key: str, segments: Sequence[Segment], vocabulary: Vocabulary, held_out: int) -> Manifest:
    """Segments in order, as many to a block as fit; the first `held_out` blocks are the validation split."""
    blocks: list[list[Segment]] = [[]]
    for segment in segments:
        if sum(len(one.ids) for one in blocks[-1]) + len(segment.ids) > BLOCK:
            blocks.append([])
        blocks[-1].append(segment)
    out = ArtifactWriter(store, "prepare_dataset", key)
    with PackedWriter(out, TRAIN, BLOCK, vocabulary.size, 0) as train:
        for block in blocks[held_out:]:
            train.write_blocks(blocks_of(block))
    with PackedWriter(out, VALIDATION, BLOCK, vocabulary.size, 0) as validation:
        for block in blocks[:held_out]:
            validation.write_blocks(blocks_of(block))
    out.vocabulary = vocabulary
    out.facts = packed_facts(BLOCK, vocabulary.size, 0, [train, validation])
    return out.publish(KIND)


def contract_of(model: str) -> Vocabulary:
    found = open_artifact(model).manifest.vocabulary
    assert found is not None
    return found


@pytest.fixture(scope="session")
def packed_text(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: str, llama_tokenizer: bytes, english_text: list[str]
) -> str:
    """The reference of 200 English lines in blocks of 64, five of them held out."""
    encoder = SentencePieceEncoder(llama_tokenizer)
    ids = [[encoder.bos, *encoder.encode(line), encoder.eos][:BLOCK] for line in english_text[:200]]
    segments = [Segment(np.array(one)) for one in ids]
    store = str(tmp_path_factory.mktemp("packed"))
    return packed(store, "text", segments, contract_of(tiny_model), held_out=5).reference


@pytest.fixture(scope="session")
def packed_instructions(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, llama_tokenizer: bytes) -> str:
    """The reference of 120 questions that have the answer Yes or No."""
    encoder = SentencePieceEncoder(llama_tokenizer)
    whole: list[Any] = []
    for number in range(120):
        # the end of the recipe's prompt: all of it would not fit a block
        prompt = [encoder.bos, *encoder.encode(RECIPE.wrap(f"Is {number} even?")[-36:])]
        answer = [*encoder.encode("No" if number % 2 else "Yes"), encoder.eos]
        whole.append(Segment(np.array(prompt + answer), prompt=len(prompt)))
    store = str(tmp_path_factory.mktemp("packed"))
    return packed(store, "instructions", whole, contract_of(tiny_model), held_out=4).reference


@pytest.fixture(scope="session")
def packed_chinese(tmp_path_factory: pytest.TempPathFactory, extended_model: str, chinese_text: list[str]) -> str:
    """The reference of 200 Chinese sentences in the extended model's vocabulary, four blocks held out."""
    encoder = SentencePieceEncoder(open_artifact(extended_model).read("tokenizer.model"))
    ids = [[encoder.bos, *encoder.encode(line), encoder.eos][:BLOCK] for line in chinese_text[:200]]
    store = str(tmp_path_factory.mktemp("packed"))
    segments = [Segment(np.array(one)) for one in ids]
    return packed(store, "chinese", segments, contract_of(extended_model), held_out=4).reference
