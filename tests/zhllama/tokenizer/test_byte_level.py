"""A byte-level tokenizer gives the ids of `tokenizers`, transformers and llama.cpp; all else is refused by name."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.byte_level_bases import SHAPES
from tests.texts import chinese_sentences, mixed_lines
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.tokenizer.byte_alphabet import BYTE_OF
from zhllama.tokenizer.byte_level import ByteLevelEncoder
from zhllama.tokenizer.chat import Chat, asked
from zhllama.tokenizer.special_ids import special_ids
from zhllama.tokenizer.vocabulary import Relation, has_tokenizer, load_encoder

MORE = [
    "a<|im_end|>b<|eot_id|>c <|begin_of_text|>",
    "x<tool_call>{}</tool_call> 好<tool_call>",
    "e\u0301 か\u3099 한글 \u1112\u1161\u11ab",
]
MORE += [
    "豈更 Å Ω",
    "it's IT'S we'LL ſ's",
    "1234567 ٣٤٥ Ⅳ〇",
    " \n\n x \n\ty\r\n\r\nz  ",
    "\x04\x06\x14 ctrl \x7f",
    "‘quoted’ — “so”…",
]


def written(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def loaded(folder: Path) -> ByteLevelEncoder:
    encoder = load_encoder(open_artifact(str(folder)), "--model")
    assert isinstance(encoder, ByteLevelEncoder)
    return encoder


@pytest.fixture(params=SHAPES)
def folder(request, tmp_path, byte_level_files) -> Path:
    """The tokenizer files of a base of each kind."""
    return written(tmp_path / "base", byte_level_files[request.param])


@pytest.fixture
def qwen(tmp_path, byte_level_files) -> Path:
    return written(tmp_path / "qwen", byte_level_files["qwen"])


@pytest.fixture
def llama3(tmp_path, byte_level_files) -> Path:
    return written(tmp_path / "llama3", byte_level_files["llama 3"])


@pytest.fixture
def smollm2(tmp_path, byte_level_files) -> Path:
    return written(tmp_path / "smollm2", byte_level_files["smollm2"])


def changed(folder: Path, name: str = "tokenizer.json", **fields) -> Path:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | fields))
    return folder


# --- one tokenisation -------------------------------------------------------------------------------------------------


def differing(folder: Path, lines: list[str]) -> list[str]:
    """The lines that `tokenizers` or transformers read otherwise: specials as text, and BOS where they put it."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    encoder = loaded(folder)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = True
    theirs = AutoTokenizer.from_pretrained(folder)(lines, split_special_tokens=True)["input_ids"]
    found = zip(
        lines, encoder.encode_batch(lines), plain.encode_batch(lines, add_special_tokens=False), theirs, strict=True
    )
    return [line for line, ids, one, other in found if not ids == one.ids == other[len(encoder.begin) :]]


def test_every_kind_of_line_has_the_libraries_ids(folder):
    assert not differing(folder, [*mixed_lines(1200), *MORE])


@pytest.mark.slowest
def test_twenty_thousand_lines_have_the_libraries_ids(folder):
    assert not differing(folder, [*mixed_lines(20_000), *MORE])


def test_one_text_has_the_ids_that_it_has_among_many(folder):
    encoder, lines = loaded(folder), [*mixed_lines(200), *MORE]
    assert [encoder.encode(line) for line in lines] == encoder.encode_batch(lines)


@settings(max_examples=150)
@given(
    st.lists(
        st.text(st.sampled_from("ab Z9'’.,，。！好的酒店x\n\t é\u0301\u3099か한\u1161<|>\u2028ſ"), max_size=30),
        max_size=4,
    )
)
def test_made_up_texts_have_their_ids_and_come_back(byte_level_files, texts):
    for files in byte_level_files.values():
        described = {"tokenizer_config.json": json.loads(files["tokenizer_config.json"])}
        encoder = ByteLevelEncoder.described(files["tokenizer.json"], described, "x")
        assert encoder.encode_batch(texts) == [encoder.encode(text) for text in texts]
        if not encoder.rules.nfc:
            assert [encoder.decode(encoder.encode(text)) for text in texts] == texts


def gguf_of(encoder: ByteLevelEncoder, path: Path, pre: str) -> Path:
    """A GGUF of the vocabulary alone."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([piece.encode() for piece in encoder.pieces])
    writer.add_token_types(
        [3 if piece in encoder.special else 4 if piece in encoder.added else 1 for piece in encoder.pieces]
    )
    writer.add_token_merges([" ".join(merge) for merge in encoder.merges])
    writer.add_add_bos_token(encoder.bos is not None)
    for name, index in encoder.named.items():
        if name != "pad":
            getattr(writer, f"add_{name}_token_id")(index)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


PRE = {"llama 3": "llama-bpe", "qwen": "qwen2", "smollm2": "smollm"}


@pytest.mark.gguf
@pytest.mark.parametrize("count", [600, pytest.param(20_000, marks=pytest.mark.slowest)])
@pytest.mark.parametrize("kind", SHAPES)
def test_llama_cpp_has_the_same_ids(tmp_path, byte_level_files, kind, count):
    import llama_cpp

    encoder = loaded(written(tmp_path / "base", byte_level_files[kind]))
    model = llama_cpp.Llama(
        str(gguf_of(encoder, tmp_path / "vocabulary.gguf", PRE[kind])), vocab_only=True, verbose=False
    )
    # llama.cpp normalises nothing, and takes null for the end
    lines = [
        line
        for line in mixed_lines(count)
        if line and "\0" not in line and not (encoder.rules.nfc and "\u0301" in line)
    ]
    found = (model.tokenize(line.encode(), add_bos=True, special=False) for line in lines)
    assert encoder.differing(lines, found) == 0
    model.close()


def test_a_special_token_in_a_text_stays_text(folder):
    encoder = loaded(folder)
    for text, index in encoder.special.items():
        assert index not in encoder.encode(f"a {text} b")
        assert index not in encoder.encode_batch([f"a{text}b"])[0]
        assert Chat(encoder).encode(f"a{text}b")[1:-1] == [index]


def test_a_token_that_is_added_and_not_special_is_read_as_itself(qwen):
    encoder = loaded(qwen)
    index = encoder.pieces.index("<tool_call>")
    assert encoder.encode_batch(["好<tool_call>好"])[0].count(index) == 1
    assert encoder.decode([index, *encoder.encode("x")]) == "<tool_call>x"


def test_a_conversation_has_transformers_ids(folder):
    from transformers import AutoTokenizer

    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), loaded(folder)
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    messages = [*asked("你好 <|im_end|>"), {"role": "assistant", "content": "Good day"}, *asked("再见, it's late")]
    wanted = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert Chat(encoder, template).ids(messages) == list(wanted)
    assert Chat(encoder, template).end == encoder.eos


def test_ids_are_written_as_transformers_writes_them(folder):
    from transformers import AutoTokenizer

    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), loaded(folder)
    for line in [*mixed_lines(60), "半个字：龘"]:
        ids = [*encoder.begin, *encoder.encode(line)]
        for some in (ids, ids[:-1], ids[1:]):
            assert encoder.written(some) == tokenizer.decode(some, clean_up_tokenization_spaces=False)
            assert encoder.decode(some) == tokenizer.decode(some, True, clean_up_tokenization_spaces=False)


# --- what it says of itself -------------------------------------------------------------------------------------------


def test_bos_is_what_a_text_begins_with(llama3, qwen, smollm2):
    begins, never, named = loaded(llama3), loaded(qwen), loaded(smollm2)
    ids, lengths = begins.encode_flat(["a b", ""], begin=True, end=True)
    assert ids.tolist() == [begins.bos, *begins.encode("a b"), begins.eos, begins.bos, begins.eos]
    assert lengths.sum() == len(ids)
    for encoder in (never, named):
        assert encoder.bos is None
        assert encoder.begin == []
        assert encoder.context == [encoder.eos]
        ids, lengths = encoder.encode_flat(["a b", "", "好"], begin=True, end=True)
        assert ids.tolist() == [*encoder.encode("a b"), encoder.eos, encoder.eos, *encoder.encode("好"), encoder.eos]
        assert ids.dtype == np.int32
    assert named.pieces[special_ids(named, {}, "x").bos] == "<|im_start|>"
    assert special_ids(never, {}, "x").config["bos_token_id"] is None


def test_padding_that_is_eos_is_none_and_is_named(qwen, smollm2):
    assert loaded(qwen).pieces[loaded(qwen).pad] == "<|endoftext|>"
    assert loaded(smollm2).pad is None
    assert loaded(smollm2).named_pad == loaded(smollm2).eos


def test_several_ends_are_known(llama3):
    encoder = loaded(llama3)
    more = [encoder.pieces.index(text) for text in ("<|end_of_text|>", "<|eom_id|>")]
    ids = special_ids(encoder, {"generation_config.json": {"eos_token_id": [encoder.eos, *more]}}, "x")
    assert ids.stops == (encoder.eos, *more)


def test_bytes_without_a_piece_are_counted(smollm2, qwen):
    assert loaded(smollm2).unknown_bytes(["a\x04b\x06", "好"]) == [2, 0]
    assert loaded(qwen).unknown_bytes(["a\x04b"]) == [0]


def test_the_kind_of_rule_is_read_off_the_merges(llama3, qwen, smollm2):
    assert [loaded(one).by_rank for one in (llama3, qwen, smollm2)] == [True, False, False]


def test_pieces_are_their_bytes(folder):
    encoder = loaded(folder)
    for piece, content in zip(encoder.pieces, encoder.piece_bytes, strict=True):
        assert content == (piece.encode() if piece in encoder.added else bytes(BYTE_OF[letter] for letter in piece))


def test_published_files_give_the_same_ids_and_the_same_contract(folder, tmp_path):
    before = loaded(folder)
    again = written(tmp_path / "again", before.files(512, "{{ bos_token }}x"))
    assert loaded(again).vocabulary() == before.vocabulary()
    assert not differing(again, mixed_lines(200))
    settings = json.loads((again / "tokenizer_config.json").read_text())
    assert (settings["model_max_length"], settings["chat_template"]) == (512, "{{ bos_token }}x")
    assert (again / "merges.txt").exists() == (folder / "merges.txt").exists()


def test_vocab_json_and_merges_txt_are_the_same_tokenizer(qwen, tmp_path):
    from tokenizers import Tokenizer, models

    folder = written(tmp_path / "made", loaded(qwen).extended([("å", "¥")]).files())
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lines = mixed_lines(300)
    wanted = [one.ids for one in fast.encode_batch(lines, add_special_tokens=False)]
    fast.model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    assert [one.ids for one in fast.encode_batch(lines, add_special_tokens=False)] == wanted


def test_another_list_of_merges_or_another_cut_is_another_vocabulary(qwen, tmp_path):
    before, fast = loaded(qwen), json.loads((qwen / "tokenizer.json").read_text())
    merges = fast["model"]["merges"]
    for name, other in {
        "merges": fast | {"model": fast["model"] | {"merges": [*merges[:-2], merges[-1], merges[-2]]}},
        "normalizer": fast | {"normalizer": None},
        "whole": fast | {"model": fast["model"] | {"ignore_merges": True}},
    }.items():
        files = before.files() | {"tokenizer.json": json.dumps(other).encode()}
        after = loaded(written(tmp_path / name, files))
        assert after.vocabulary().relation_to(before.vocabulary()) is Relation.FOREIGN


def test_an_extension_extends_and_another_order_is_foreign(folder):
    before = loaded(folder)
    merges = [("å", "¥"), ("å¥", "½")]
    after, other = before.extended(merges), before.extended([("ä", "½"), *merges])
    assert after.pieces[: before.size] == before.pieces
    assert after.pieces[before.size :] == ["å¥", "å¥½"]
    contract = after.vocabulary(also_at=[before.size])
    assert contract.relation_to(before.vocabulary()) is Relation.EXTENDS
    assert before.vocabulary().relation_to(contract) is Relation.SHRINKS
    assert other.vocabulary(also_at=[after.size]).relation_to(after.vocabulary(also_at=[])) is Relation.FOREIGN
    assert after.named == before.named
    assert after.by_rank == before.by_rank


# --- what other files say ---------------------------------------------------------------------------------------------


def test_tokens_that_only_other_files_name_are_pieces(qwen):
    size = loaded(qwen).size
    (qwen / "added_tokens.json").write_text(json.dumps({"<|more|>": size}))
    said = {str(size + 1): {"content": "<extra>", "special": False}}
    changed(qwen, "tokenizer_config.json", added_tokens_decoder=said, pad_token="[PAD]")
    (qwen / "config.json").write_text(json.dumps({"vocab_size": size + 8}))
    encoder = loaded(qwen)
    assert encoder.pieces[size:] == ["<|more|>", "<extra>", "[PAD]"]
    assert [encoder.added[text] for text in encoder.pieces[size:]] == [True, False, True]
    assert encoder.pad == size + 2
    from transformers import AutoTokenizer

    assert not differing(written(qwen.parent / "again", encoder.files()), ["a<extra>b<|more|>[PAD]"])
    assert len(AutoTokenizer.from_pretrained(qwen.parent / "again")) == size + 3


def test_padding_without_a_row_is_left_out_and_said(llama3, caplog):
    size = loaded(llama3).size
    changed(llama3, "tokenizer_config.json", pad_token="[PAD]")
    (llama3 / "config.json").write_text(json.dumps({"vocab_size": size}))
    assert loaded(llama3).size == size
    assert "[PAD] is named, and has no row" in caplog.text


def test_eos_is_config_jsons_where_no_tokenizer_file_names_it(llama3):
    (llama3 / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"nothing says which token ends a text; name eos_token in tokenizer_config"):
        loaded(llama3)
    (llama3 / "config.json").write_text(json.dumps({"vocab_size": 9999, "eos_token_id": [1501, 1502]}))
    encoder = loaded(llama3)
    assert (encoder.eos, encoder.bos) == (1501, 1500)


def test_truncation_and_padding_are_not_ours(folder):
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    before = loaded(folder).encode("one two three four five")
    encoder = loaded(changed(folder, truncation=truncation))
    assert encoder.encode("one two three four five") == before
    assert json.loads(encoder.files()["tokenizer.json"])["truncation"] is None


def before(*steps: dict) -> dict:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
AFTER = {"type": "TemplateProcessing", "special_tokens": {}, "pair": []}
REFUSED = {
    "normalizer": ({"normalizer": {"type": "NFKC"}}, "the normalizer NFKC"),
    "one of two": ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}}, "Low"),
    "pre-tokenizer": (before({"type": "Whitespace"}, BYTES), "Whitespace"),
    "a cut that takes away": (
        before({"type": "Split", "pattern": {"Regex": " "}, "behavior": "Removed", "invert": False}, BYTES),
        "Split .*, Removed",
    ),
    "prefix": ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "add_prefix_space"),
    "bytes first": (before(BYTES, {"type": "Digits"}), "ByteLevel before"),
    "decoder": ({"decoder": {"type": "Sequence", "decoders": [BYTES, {"type": "Strip"}]}}, "the decoder Strip"),
    "EOS behind": ({"post_processor": AFTER | {"single": [SEQUENCE, {"SpecialToken": {"id": "x"}}]}}, "makes .*'x'"),
    "post-processor": ({"post_processor": {"type": "BertProcessing"}}, "BertProcessing"),
    "setting": ({"surprise": 1}, "a setting surprise"),
    "dropout": ({"model": {"dropout": 0.1}}, "model.dropout 0.1"),
    "suffix": ({"model": {"end_of_word_suffix": "</w>"}}, "model.end_of_word_suffix '</w>'"),
    "bytes as pieces": ({"model": {"byte_fallback": True}}, "model.byte_fallback True"),
    "unknown in the model": ({"model": {"surprise": 1}}, "a setting model.surp"),
    "another model": ({"model": {"type": "WordPiece"}}, "model.type WordPiece"),
    "stripping": ({"added_tokens": [{"id": 1502, "content": "<|im_end|>", "lstrip": True}]}, "lstrip of .*_end"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_done_is_refused_by_name(qwen, fields, said):
    fast = json.loads((qwen / "tokenizer.json").read_text())
    model = fast["model"] | fields.get("model", {})
    added = [one for one in fast["added_tokens"] if one["id"] != 1502] if "added_tokens" in fields else []
    fast |= fields | {"model": model}
    fast["added_tokens"] = fast["added_tokens"] + added
    (qwen / "tokenizer.json").write_text(json.dumps(fast))
    with pytest.raises(InputError, match=rf"--model .*tokenizer\.json: it has .*{said}.*, which is not supported"):
        loaded(qwen)


def test_damaged_files_are_named(qwen):
    fast = json.loads((qwen / "tokenizer.json").read_text())
    for damage, said in (
        ({"model": {"type": "BPE"}}, "does not say its tokens"),
        (
            {"added_tokens": [*fast["added_tokens"], fast["added_tokens"][0] | {"id": 1507, "content": "<x>"}]},
            "nothing is token 1505",
        ),
        ({"model": fast["model"] | {"merges": [["Q", "notthere"]]}}, "cannot be read"),
    ):
        (qwen / "tokenizer.json").write_text(json.dumps(fast | damage))
        with pytest.raises(InputError, match=said):
            loaded(qwen)


def test_lists_alone_do_not_say_how_text_is_cut(qwen):
    (qwen / "tokenizer.json").unlink()
    assert not has_tokenizer(open_artifact(str(qwen)))
    with pytest.raises(InputError, match=r"vocab\.json and merges\.txt alone do not say how text is cut"):
        loaded(qwen)


def test_chinese_is_cut_into_few_segments(byte_level_files):
    """Else nothing is quicker than the library: clauses are new each time, words are not."""
    files = byte_level_files["llama 3"]
    described = {"tokenizer_config.json": json.loads(files["tokenizer_config.json"])}
    encoder = ByteLevelEncoder.described(files["tokenizer.json"], described, "x")
    texts = list(islice(chinese_sentences(3), 800))
    encoder.encode_batch(texts[:400])
    known = len(encoder.segments._numbers)
    encoder.encode_batch(texts[400:])
    assert len(encoder.segments._numbers) < 1.5 * known
