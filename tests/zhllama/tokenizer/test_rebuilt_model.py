"""A folder with tokenizer.json alone has the SentencePiece model that it was made of; other kinds are refused."""

import json
from pathlib import Path

import pytest

from tests.texts import mixed_lines
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import parse_model
from zhllama.tokenizer.vocabulary import load_encoder


def with_chatml(model: bytes) -> bytes:
    proto = parse_model(model)
    proto.pieces.add(piece="<|im_start|>", type=3)
    proto.pieces.add(piece="<|im_end|>", type=3)
    proto.trainer_spec.eos_piece = "<|im_end|>"
    return bytes(proto.SerializeToString())


def with_tools(model: bytes) -> bytes:
    """With tokens that are read in a text; their signs mean something in a regular expression."""
    proto = parse_model(model)
    for text in ("<tool|a>", "[tool]", "\\tool"):
        proto.pieces.add(piece=text, type=4)
    return bytes(proto.SerializeToString())


@pytest.fixture(params=["LLaMA's", "ChatML's", "one with tools", "an extended one"])
def model(request, llama_tokenizer, extended_model) -> bytes:
    if request.param == "an extended one":
        return open_artifact(extended_model).read("tokenizer.model")
    made = {"ChatML's": with_chatml, "one with tools": with_tools}
    return made.get(request.param, bytes)(llama_tokenizer)


def require_same(folder: Path, model: bytes) -> None:
    found, wanted = load_encoder(open_artifact(str(folder)), "--model"), SentencePieceEncoder(model)
    assert not (folder / "tokenizer.model").exists()
    assert found.vocabulary() == wanted.vocabulary()
    lines = [*mixed_lines(1500), "a<tool|a> [tool][tool]b\\tool"]
    assert found.encode_batch(lines) == wanted.encode_batch(lines)
    assert [piece.type for piece in parse_model(found.model).pieces] == [
        piece.type for piece in parse_model(model).pieces
    ]
    # and what is published again gives the same ids
    again = json.loads(SentencePieceEncoder(found.model).files()["tokenizer.json"])
    assert (
        again["model"]["vocab"] == json.loads(SentencePieceEncoder(model).files()["tokenizer.json"])["model"]["vocab"]
    )


def test_what_a_library_saves_of_our_folder_is_our_tokenizer(model, tmp_path):
    from transformers import AutoTokenizer

    ours, saved = tmp_path / "ours", tmp_path / "saved"
    ours.mkdir()
    for name, content in SentencePieceEncoder(model).files().items():
        (ours / name).write_bytes(content)
    AutoTokenizer.from_pretrained(ours).save_pretrained(saved)
    require_same(saved, model)


def test_what_a_library_saves_of_llamas_own_folder_is_llamas_tokenizer(llama_tokenizer, tmp_path):
    from transformers import LlamaTokenizer

    saved = tmp_path / "saved"
    model = json.loads(SentencePieceEncoder(llama_tokenizer).files()["tokenizer.json"])["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    LlamaTokenizer(vocab=model["vocab"], merges=merges).save_pretrained(saved)
    require_same(saved, llama_tokenizer)


def test_llama_2s_own_form_of_the_file_is_its_tokenizer(llama_tokenizer, tmp_path):
    """As transformers 4 converted it: a normalizer that prepends, white space's merges interleaved, long ones first."""
    fast = json.loads(SentencePieceEncoder(llama_tokenizer).files()["tokenizer.json"])
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    fast["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    fast["pre_tokenizer"] = None
    white = [pair for pair in fast["model"]["merges"] if not "".join(pair).strip("▁")]
    others = [pair for pair in fast["model"]["merges"] if "".join(pair).strip("▁")]
    white.sort(key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
    fast["model"]["merges"] = [" ".join(pair) for pair in others + white]
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast))
    require_same(tmp_path, llama_tokenizer)


def change(model: bytes, folder: Path, **parts: object) -> None:
    fast = json.loads(SentencePieceEncoder(model).files()["tokenizer.json"])
    for name, value in parts.items():
        where = fast if name in fast else fast["model"]
        where[name] = value
    (folder / "tokenizer.json").write_text(json.dumps(fast))


REFUSED = {
    "another kind": ({"type": "WordPiece"}, "it is WordPiece, not BPE"),
    "another unknown": ({"unk_token": "[UNK]"}, r"\[UNK\] is not in its vocabulary"),
    "no pieces": ({"vocab": {}}, "no SentencePiece model can be made of it"),
    "no merges": ({"merges": [["a"]]}, "no SentencePiece model can be made of it"),
    "other ids": ({"normalizer": {"type": "Lowercase"}}, "gives other ids for"),
    "dropout": ({"dropout": 0.1}, "it has dropout"),
    "no settings": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": 5}}, "cannot be read"),
    "a list": ({"pre_tokenizer": [1], "decoder": [1]}, "cannot be read"),
}


@pytest.mark.parametrize(("parts", "line"), REFUSED.values(), ids=REFUSED)
def test_what_sentencepiece_did_not_write_is_refused(llama_tokenizer, tmp_path, parts, line):
    change(llama_tokenizer, tmp_path, **parts)
    with pytest.raises(InputError, match=line):
        load_encoder(open_artifact(str(tmp_path)), "--model")
