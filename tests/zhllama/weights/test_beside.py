"""What names tokens beside an adapter of a model without a SentencePiece model must name that model's."""

import json
from pathlib import Path
from typing import Any

import pytest

from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.vocabulary import Encoder
from zhllama.weights.beside import require_known_tokens, tokens_of


def folder(path: Path, files: dict[str, Any]) -> Path:
    path.mkdir()
    for name, content in {"config.json": {}, **files}.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture(scope="module")
def encoder(llama_tokenizer: bytes) -> Encoder:
    return SentencePieceEncoder(llama_tokenizer)


@pytest.fixture
def check(tmp_path: Path, encoder: Encoder) -> Any:
    """`check(files beside the adapter, files beside the model)`"""

    def run(beside: dict[str, Any], model: dict[str, Any] | None = None, rows: int = 800) -> None:
        own = tokenizer_json(encoder) if model is None else model
        both = folder(tmp_path / "model", own), folder(tmp_path / "adapter", beside)
        require_known_tokens(*(open_artifact(str(path)) for path in both), rows)

    return run


def tokenizer_json(encoder: Encoder, *more: str, kind: str = "BPE") -> dict[str, Any]:
    pieces = [*encoder.pieces, *more]
    vocabulary: Any = {piece: index for index, piece in enumerate(pieces)}
    if kind == "Unigram":
        vocabulary = [[piece, 0.0] for piece in pieces]
    return {
        "tokenizer.json": {"model": {"type": kind, "vocab": vocabulary}, "added_tokens": [{"id": 1, "content": "<s>"}]}
    }


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_the_models_own_vocabulary_passes(check: Any, encoder: Encoder, kind: str) -> None:
    check(tokenizer_json(encoder, kind=kind))


def test_a_folder_without_a_tokenizer_says_nothing(check: Any) -> None:
    check({"adapter_config.json": {}})


def test_what_the_model_names_beyond_its_pieces_is_its_own(check: Any, encoder: Encoder) -> None:
    more = {"added_tokens.json": {"<|im_start|>": 800, "<|im_end|>": 801}}
    check(tokenizer_json(encoder, "<|im_start|>", "<|im_end|>"), tokenizer_json(encoder) | more, 802)


@pytest.mark.parametrize(
    "more",
    [
        {"added_tokens.json": {"[PAD]": 800}},
        {"added_tokens.json": {"<pad>": 800}, "special_tokens_map.json": {"pad_token": "<pad>"}},
        {"tokenizer_config.json": {"pad_token": "<p>", "added_tokens_decoder": {"800": {"content": "<p>"}}}},
    ],
)
@pytest.mark.parametrize("model", [None, {}], ids=["a tokenizer", "no tokenizer"])
def test_padding_needs_no_row(check: Any, encoder: Encoder, model: Any, more: Any) -> None:
    check(tokenizer_json(encoder) | more, model)


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        (lambda e: tokenizer_json(e, "的", "了"), r"has '的' as token 800 \(of 802\), and the model none \(of 800\)"),
        (lambda e: {"added_tokens.json": {"[PAD]": 801}}, r"has '\[PAD\]' as token 801"),
        (lambda e: {"added_tokens.json": {"<|im_end|>": 800}}, r"has '<\|im_end\|>' as token 800"),
        (lambda e: {"tokenizer_config.json": {"added_tokens_decoder": {"800": {"content": "<x>"}}}}, "has '<x>' as"),
        (lambda e: {"added_tokens.json": {"<|end|>": 2}}, r"has '<\|end\|>' as token 2 .* the model '</s>'"),
        (lambda e: {"tokenizer.json": {"model": {"vocab": {"<unk>": 0}}}}, "has none as token 1 .* the model '<s>'"),
        (lambda e: {"tokenizer.json": "version https://git-lfs.github.com/spec/v1\n"}, "tokenizer.json is damaged"),
        (lambda e: {"tokenizer.json": {"model": None}}, "tokenizer.json is damaged"),
        (lambda e: {"added_tokens.json": {"x": "many"}}, "added_tokens.json is damaged"),
    ],
)
def test_another_vocabulary_is_refused(check: Any, encoder: Encoder, beside: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check(beside(encoder))


def test_a_model_without_a_tokenizer_has_rows(check: Any, encoder: Encoder) -> None:
    with pytest.raises(InputError, match=r"as token 700 \(of 800\), and the model none \(of 700\)"):
        check(tokenizer_json(encoder), {}, 700)


def test_the_last_name_of_an_id_counts() -> None:
    files: Any = {"tokenizer.json": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 0, "content": "b"}]}}
    assert tokens_of(files, "") == {0: "b"}
