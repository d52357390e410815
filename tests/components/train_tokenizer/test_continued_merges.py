"""A byte-level base's merges, continued: every piece is reached, and text without the scripts keeps its ids."""

import json
import unicodedata
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest

from components.train_tokenizer.continued_merges import Scripts, continued
from components.train_tokenizer.options import TrainTokenizer
from components.train_tokenizer.sentencepiece_trainer import train_tokenizer
from tests.byte_level_bases import SHAPES
from tests.texts import chinese_sentences, code_lines, mixed_lines
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.tokenizer.byte_alphabet import spelt
from zhllama.tokenizer.byte_level import ByteLevelEncoder
from zhllama.tokenizer.vocabulary import Relation, load_encoder

HAN = Scripts("Han")
KOREAN = [
    "오늘 아침에 친구가 도서관에서 책을 읽었다.",
    "내일 저녁에는 도서관 앞에서 친구를 만난다!",
    "친구의 책은 도서관에 있다.",
]
THAI = ["วันนี้อากาศดีมากจริงๆ", "พรุ่งนี้อากาศจะไม่ดีมาก", "เมื่อวานนี้อากาศดีจริง"]


@pytest.fixture(scope="module")
def bases(byte_level_files) -> dict[str, ByteLevelEncoder]:
    return {
        name: ByteLevelEncoder.described(
            files["tokenizer.json"], {"tokenizer_config.json": json.loads(files["tokenizer_config.json"])}, name
        )
        for name, files in byte_level_files.items()
    }


@pytest.fixture(scope="module")
def text() -> list[str]:
    return list(islice(chinese_sentences(), 1500))


@pytest.fixture(scope="module")
def extensions(bases, text) -> dict[str, ByteLevelEncoder]:
    """Each base with 700 pieces more."""
    return {name: base.extended(continued(base, text, 700, HAN, "--text x").merges) for name, base in bases.items()}


@pytest.fixture(params=SHAPES)
def pair(request, bases, extensions) -> tuple[ByteLevelEncoder, ByteLevelEncoder]:
    return bases[request.param], extensions[request.param]


def test_every_new_piece_is_reached(pair):
    base, after = pair
    assert after.size == base.size + 700
    assert [after.segmented(piece) for piece in after.pieces[base.size :]] == [
        [at] for at in range(base.size, after.size)
    ]


def test_no_english_line_and_no_code_gets_another_id(pair, english_text):
    base, after = pair
    lines = [
        *english_text,
        *islice(code_lines(), 6000),
        "“quoted” – it’s 5 € or £5…",
        "naïve café, Øre, ½ ×",
        "привет мир, שלום",
    ]
    lines += ["カタカナ ひらがな ｶﾅ ー", "한국어 텍스트", "ภาษาไทย ฿5", "。，、！（）「」ＡＢ"]
    assert after.encode_batch(lines) == base.encode_batch(lines)


@pytest.mark.slowest
def test_no_english_line_of_the_standard_library_gets_another_id(pair):
    base, after = pair
    lines = [line for line in code_lines() if not HAN.pattern.search(line)]
    assert len(lines) > 20_000
    assert after.encode_batch(lines) == base.encode_batch(lines)


def test_chinese_takes_a_third_of_the_tokens(pair, text):
    base, after = pair
    tokens = [sum(map(len, encoder.encode_batch(text))) for encoder in (base, after)]
    assert tokens[0] / tokens[1] > 3


def test_pieces_are_whole_characters_with_one_of_the_script_or_begin_one(pair):
    base, after = pair
    for content in after.piece_bytes[base.size :]:
        whole = content.decode(errors="ignore")
        assert HAN.pattern.search(whole) if whole.encode() == content else (not whole and content[0] >= 0xE4)


def naive(base: ByteLevelEncoder, lines: list[str], wanted: int) -> list[tuple[str, str]]:
    """The same, written down plainly: all pairs counted anew each time."""
    pretokens = Counter(piece for line in lines for piece in base.pretokens(line))
    words = {piece: base.segmented(piece) for piece in pretokens if HAN.pattern.search(decoded(base, piece))}
    contents, merges = list(base.piece_bytes), []
    while len(merges) < wanted:
        counts = Counter()
        for piece, ids in words.items():
            for two in pairwise(ids):
                counts[two] += pretokens[piece]
        allowed = (two for two in counts if HAN.allow(joined(contents, two)) and joined(contents, two) not in contents)
        best = min(allowed, key=lambda two: (-counts[two], two))
        contents.append(joined(contents, best))
        merges.append(tuple(spelt(contents[at]) for at in best))
        for piece, ids in words.items():
            at, made = 0, []
            while at < len(ids):
                both = tuple(ids[at : at + 2]) == best
                made.append(len(contents) - 1 if both else ids[at])
                at += 1 + both
            words[piece] = made
    return merges


def joined(contents: list[bytes], pair: tuple[int, int]) -> bytes:
    return contents[pair[0]] + contents[pair[1]]


def decoded(base: ByteLevelEncoder, piece: str) -> str:
    return base._bytes_of(piece).decode(errors="replace")


@pytest.mark.parametrize("kind", ["qwen", "smollm2"])
def test_they_are_those_of_the_plain_procedure(bases, kind):
    lines = [*islice(chinese_sentences(9), 120), "哈哈哈哈哈 哈哈哈", "看看看 A股A股 2〇二四年"]
    assert continued(bases[kind], lines, 150, HAN, "x").merges == naive(bases[kind], lines, 150)


def ranked(encoder: ByteLevelEncoder, piece: str) -> list[int]:
    """tiktoken's rule: of all neighbours that are a piece together the lowest rank, the leftmost of equals."""
    ids = {text: at for at, text in enumerate(encoder.pieces) if text not in encoder.added}
    parts = [piece] if piece in ids else list(piece)
    while len(parts) > 1:
        found = [(ids[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not found:
            break
        _, at = min(found)
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return [ids[part] for part in parts]


def test_ranks_alone_give_the_same_ids(bases, extensions, text):
    base, after = bases["llama 3"], extensions["llama 3"]
    assert after.by_rank
    pretokens = {
        piece
        for line in [*text[:300], *mixed_lines(300), "哈哈哈哈哈哈哈"]
        for piece in base.pretokens(line)
        if len(piece) < 200
    }
    differ = [piece for piece in pretokens if after.segmented(piece) != ranked(after, piece)]
    assert [piece for piece in differ if base.segmented(piece) == ranked(base, piece)] == []


def test_pieces_that_engines_could_split_otherwise_are_left_out_where_ranks_count(bases):
    base = bases["llama 3"]
    # where no old piece lies across two of them
    laugh = next(char for char in map(chr, range(0x4E00, 0x9FA0)) if base.encode(char * 3) == base.encode(char) * 3)
    lines = [laugh * 2, laugh * 3, laugh * 5] * 50 + ["天气很好，我们去公园。"] * 9
    found = continued(base, lines, 9, HAN, "x")
    made = [left + right for left, right in found.merges]
    assert found.ambiguous > 0
    assert spelt((laugh * 2).encode()) in made
    assert spelt((laugh * 3).encode()) not in made


def test_equal_text_gives_equal_merges_in_whatever_order(bases, text):
    one, other = (continued(bases["qwen"], lines, 120, HAN, "x").merges for lines in (text[:300], text[:300][::-1]))
    assert one == other


@pytest.mark.parametrize(
    ("script", "lines"), [("Hangul", KOREAN), ("Thai", THAI), ("Hangul,Han", [*KOREAN, "你好你好"])]
)
def test_other_scripts_are_added_alike(bases, script, lines, english_text):
    for base in bases.values():
        after = base.extended(continued(base, lines * 3, 25, Scripts(script), "x").merges)
        assert sum(map(len, after.encode_batch(lines))) < sum(map(len, base.encode_batch(lines)))
        assert after.encode_batch(english_text[:500]) == base.encode_batch(english_text[:500])
        for content in after.piece_bytes[base.size :]:
            assert Scripts(script).allow(content)


def test_half_a_character_is_a_piece_where_all_letters_that_begin_so_are_of_the_script():
    assert HAN.allow("你".encode()[:2])
    assert not HAN.allow("é".encode()[:1])
    # katakana and CJK punctuation begin like ideographs of extension A do, further on
    assert not HAN.allow(b"\xe3\x82")
    assert not HAN.allow(b"\xe2\x80")
    assert HAN.allow(b"\xe3\x90")
    assert not HAN.allow("你".encode()[1:])
    assert not HAN.allow(" 你".encode()[:2])
    assert HAN.allow("𠀀".encode()[:2])
    assert not HAN.allow(b"\xf0\x9f")


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path, text) -> str:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "text.txt").write_text("\n".join(text[:400]) + "\n")
    return str(folder)


@pytest.fixture
def base(tmp_path, byte_level_files) -> str:
    folder = tmp_path / "base"
    folder.mkdir()
    for name, content in byte_level_files["qwen"].items():
        (folder / name).write_bytes(content)
    return str(folder)


def trained(tmp_path: Path, **options) -> str:
    return run_stage(TrainTokenizer(store=str(tmp_path / "store"), **options), train_tokenizer).reference


def test_the_stage_publishes_the_bases_tokenizer_with_its_new_pieces(tmp_path, corpus, base):
    artifact = open_artifact(trained(tmp_path, text=corpus, base=base, vocab_size=200))
    encoder, before = load_encoder(artifact, "--tokenizer"), load_encoder(open_artifact(base), "--base")
    assert encoder.size == before.size + 200
    assert artifact.manifest.vocabulary.relation_to(before.vocabulary()) is Relation.EXTENDS
    assert sorted(artifact.names) == ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    facts = artifact.manifest.facts
    assert facts["tokens_after"] < facts["tokens_before"] / 1.5
    assert facts["summary"].startswith("1,505 → 1,705 pieces")


def test_without_a_base_nothing_of_the_key_has_changed():
    from zhllama.stage.options import configuration_of

    assert not {"base", "scripts"} & configuration_of(TrainTokenizer(store="s", text="t")).keys()
    assert configuration_of(TrainTokenizer(store="s", text="t", base="b", scripts="Thai"))["scripts"] == "Thai"


def test_what_cannot_be_is_refused(tmp_path, corpus, base, llama_tokenizer):
    with pytest.raises(InputError, match=r"--text .*: the text gives \d+ pieces at most, 50000 were asked for"):
        trained(tmp_path, text=corpus, base=base, vocab_size=50_000)
    with pytest.raises(InputError, match=r"--scripts Hann: .*give names of Unicode's"):
        trained(tmp_path, text=corpus, base=base, vocab_size=20, scripts="Hann")
    with pytest.raises(InputError, match=r"--vocab-size 20: too small"):
        TrainTokenizer(store="s", text="t", vocab_size=20)
    (tmp_path / "sentencepiece").mkdir()
    (tmp_path / "sentencepiece" / "tokenizer.model").write_bytes(llama_tokenizer)
    with pytest.raises(InputError, match=r"--base .*: its tokenizer is SentencePiece's.*leave --base out"):
        trained(tmp_path, text=corpus, base=str(tmp_path / "sentencepiece"))


def test_text_is_normalised_as_the_base_does_it(bases):
    line = unicodedata.normalize("NFD", "가까운 거리, 가까운 나라")
    merges = continued(bases["qwen"], [line] * 5, 3, Scripts("Hangul"), "x").merges
    assert any(unicodedata.is_normalized("NFC", part) for part in map("".join, merges))
