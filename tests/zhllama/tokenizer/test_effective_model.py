"""What a folder names as a token is a piece of its SentencePiece model, with the id that it names; or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.tokenizer.fast_tokenizer import load_fast
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import parse_model
from zhllama.tokenizer.special_ids import special_ids
from zhllama.tokenizer.vocabulary import Encoder, Relation, has_tokenizer, load_encoder

START, END = "<|im_start|>", "<|im_end|>"
CHATML = {START: 800, END: 801}
DECODER = {"800": {"content": START, "special": True}, "801": {"content": END, "special": True}}
FAST = {"added_tokens": [{"id": int(index), **one} for index, one in DECODER.items()]}


@pytest.fixture
def folder(tmp_path: Path, llama_tokenizer: bytes) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(llama_tokenizer)
    return tmp_path


def write(folder: Path, **files: Any) -> Encoder:
    """The encoder of the folder with `name` (without .json) → content in it."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return load_encoder(open_artifact(str(folder)), "--model")


@pytest.mark.parametrize(
    "files",
    [{"added_tokens": CHATML}, {"tokenizer_config": {"added_tokens_decoder": DECODER}}, {"tokenizer": FAST}],
    ids=["added_tokens.json", "tokenizer_config.json", "tokenizer.json"],
)
def test_named_tokens_are_pieces_behind_the_models_own(folder, llama_tokenizer, files):
    base = SentencePieceEncoder(llama_tokenizer)
    encoder = write(folder, **files)
    assert encoder.pieces == [*base.pieces, START, END]
    assert [piece.type for piece in parse_model(encoder.model).pieces][800:] == [3, 3]
    assert encoder.vocabulary(also_at=[800]).relation_to(base.vocabulary()) is Relation.EXTENDS


def test_a_folder_that_names_nothing_has_its_models_own_bytes_and_contract(folder, llama_tokenizer):
    for name, content in SentencePieceEncoder(llama_tokenizer).files().items():
        (folder / name).write_bytes(content)
    encoder = write(folder, special_tokens_map={"unk_token": {"content": "<unk>"}, "bos_token": ""})
    assert encoder.model == llama_tokenizer
    assert encoder.vocabulary() == SentencePieceEncoder(llama_tokenizer).vocabulary()


def test_what_extending_published_keeps_its_bytes(extended_model):
    artifact = open_artifact(extended_model)
    assert load_encoder(artifact, "").model == artifact.read("tokenizer.model")


def test_eos_and_padding_are_those_that_the_folder_names(folder):
    named = {"eos_token": END, "pad_token": {"content": "<pad>"}}
    encoder = write(folder, added_tokens={**CHATML, "<pad>": 802}, tokenizer_config=named)
    assert (encoder.bos, encoder.eos, encoder.pad) == (1, 801, 802)


@pytest.mark.parametrize(("pad", "index"), [("</s>", 2), ("<unk>", 0), ("<s>", 1)])
def test_padding_that_is_another_special_token_as_well_is_named_on_and_pads_no_training(
    folder, llama_tokenizer, pad, index
):
    from transformers import PreTrainedTokenizerFast

    encoder = write(folder, tokenizer_config={"pad_token": pad})
    assert (encoder.pad, encoder.named_pad) == (None, index)
    assert encoder.vocabulary() == SentencePieceEncoder(llama_tokenizer).vocabulary()
    assert special_ids(encoder, {"config.json": {"pad_token_id": index}}, "").pad == index
    (folder / "out").mkdir()
    for name, content in encoder.files().items():
        (folder / "out" / name).write_bytes(content)
    assert PreTrainedTokenizerFast.from_pretrained(folder / "out").pad_token_id == index
    assert load_encoder(open_artifact(str(folder / "out")), "").model == encoder.model


def test_special_tokens_without_an_id_have_the_next_rows_as_transformers_gives_them(folder, llama_tokenizer):
    from transformers import AutoTokenizer

    for name, content in SentencePieceEncoder(llama_tokenizer).files().items():
        if name != "tokenizer_config.json":
            (folder / name).write_bytes(content)
    named = {"eos_token": END, "pad_token": "[PAD]", "additional_special_tokens": ["<x>"], "mask_token": "<m>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", **named}
    encoder = write(folder, tokenizer_config=config, config={"vocab_size": 808})
    assert (encoder.eos, encoder.pad) == (800, 801)
    (folder / "config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert encoder.pieces[800:] == tokenizer.convert_ids_to_tokens(range(800, len(tokenizer)))


def test_one_without_an_id_and_without_a_row_is_left_out_and_said(folder, llama_tokenizer, caplog):
    encoder = write(
        folder, special_tokens_map={"pad_token": "[PAD]", "eot_token": "▁<EOT>"}, config={"vocab_size": 800}
    )
    assert encoder.model == llama_tokenizer
    assert "[PAD], ▁<EOT> is named, and has no row" in caplog.text


def test_alpacas_padding_row_is_the_padding(folder):
    assert write(folder, added_tokens={"[PAD]": 800}).pad == 800


def test_an_eos_that_is_an_ordinary_piece_becomes_one_that_no_text_gives(folder, llama_tokenizer):
    encoder = write(folder, tokenizer_config={"eos_token": "▁the"})
    assert encoder.pieces[encoder.eos] == "▁the"
    assert encoder.eos not in encoder.encode("the")


def test_text_that_looks_like_a_special_token_stays_text(folder):
    encoder = write(folder, added_tokens=CHATML)
    text = f"a {START}b{END}"
    assert not {800, 801} & set(encoder.encode(text))
    assert encoder.decode(encoder.encode(text)) == text
    flat, _ = encoder.encode_flat([text])
    assert flat.tolist() == encoder.encode(text)


def test_a_token_that_is_not_special_is_read_in_text_alike_by_both_tokenizers(folder):
    tool = {"id": 800, "content": "<tool>", "special": False}
    encoder = write(folder, tokenizer={"added_tokens": [tool]})
    texts = ["look <tool>up", "<tool>", "a<tool><tool> b", " plain text"]
    assert [800 in encoder.encode(text) for text in texts] == [True, True, True, False]
    fast = load_fast(encoder.files())
    assert [found.ids for found in fast.encode_batch(texts)] == [[1, *encoder.encode(text)] for text in texts]
    flat, counts = encoder.encode_flat(texts)
    assert flat.tolist() == [index for text in texts for index in encoder.encode(text)]
    assert counts.tolist() == [len(encoder.encode(text)) for text in texts]


def test_what_is_published_of_them_is_read_by_transformers(folder, tmp_path):
    from transformers import AutoTokenizer

    encoder = write(folder, added_tokens=CHATML, tokenizer_config={"eos_token": END})
    (tmp_path / "out").mkdir()
    for name, content in encoder.files().items():
        (tmp_path / "out" / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(f"{START}user\nhi{END}\n")["input_ids"] == [
        1,
        800,
        *encoder.encode("user\nhi"),
        801,
        *encoder.encode("\n"),
    ]
    assert (tokenizer.eos_token_id, len(tokenizer)) == (801, 802)
    assert load_encoder(open_artifact(str(tmp_path / "out")), "").model == encoder.model


REFUSED = {
    "a hole": ({"added_tokens": {END: 802}}, r"names <\|im_end\|> as token 802, and nothing as token 800"),
    "another's id": ({"added_tokens": {END: 5}}, r"names <\|im_end\|> as token 5, and <0x02>"),
    "another id": ({"added_tokens": {"</s>": 800}}, "names </s> as token 800, and </s> at 2"),
    "two of one id": (
        {"added_tokens": CHATML, "tokenizer": {"added_tokens": [{"id": 800, "content": "x"}]}},
        "token 800",
    ),
    "no row": ({"added_tokens": CHATML, "config": {"vocab_size": 800}}, r"no rows for \(<\|im_start\|>, <\|im_end\|>;"),
    "no id": ({"added_tokens": {END: "x"}}, "added_tokens.json does not say"),
    "true": ({"added_tokens": {END: True}}, "added_tokens.json does not say"),
    "white space": ({"added_tokens": {"  ": 800}}, "reads no spaces in a token"),
    "a space in a text": (
        {"tokenizer": {"added_tokens": [{"id": 800, "content": "<a b>", "special": False}]}},
        "names '<a b>' as token 800, and SentencePiece reads no spaces",
    ),
    "an end without a row": (
        {"tokenizer_config": {"eos_token": END}, "config": {"vocab_size": 800}},
        r"eos_token is <\|im_end\|>, which no file gives an id, and the model no row",
    ),
    "no list": (
        {"special_tokens_map": {"additional_special_tokens": 5}},
        "additional_special_tokens of .* is 5, no list",
    ),
    "a list": ({"added_tokens": [END]}, "added_tokens.json"),
    "other pieces": ({"tokenizer": {"model": {"vocab": {"<unk>": 0, "more": 800}}}}, "two tokenizers"),
}


@pytest.mark.parametrize(("files", "line"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_a_piece_is_refused_by_name(folder, files, line):
    with pytest.raises(InputError, match=line):
        write(folder, **files)


@pytest.mark.parametrize("text", ["[PAD]", "<pad>"])
def test_padding_that_has_no_row_is_left_out_and_said(folder, llama_tokenizer, caplog, text):
    assert write(folder, added_tokens={text: 800}, config={"vocab_size": 800}).model == llama_tokenizer
    assert f"{text} is named, and has no row" in caplog.text


def test_a_file_without_a_vocabulary_is_none(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"pre_tokenizer": {"type": "ByteLevel"}}')
    artifact = open_artifact(str(tmp_path))
    assert not has_tokenizer(artifact)
    with pytest.raises(InputError, match=r"no tokenizer\.json with a vocabulary"):
        load_encoder(artifact, "--model")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"tokenizer_config": {"legacy": False}}, True),
        ({"tokenizer": FAST | {"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}}, True),
        ({"tokenizer": FAST, "tokenizer_config": {"legacy": False}}, False),
        ({"tokenizer_config": {}}, False),
    ],
    ids=["not legacy", "first", "legacy after all", "nothing said"],
)
def test_a_tokenizer_that_puts_no_mark_after_a_special_token_is_said(folder, caplog, files, told):
    write(folder, added_tokens=CHATML, **files)
    assert ("puts no space mark before a text that follows a special token" in caplog.text) == told
