"""A tokenizer is trained on what the text holds, the same bytes every time, and says what it is worth."""

import json
import subprocess
import sys

import pytest

from components.train_tokenizer.options import TrainTokenizer
from components.train_tokenizer.sentencepiece_trainer import report_on, sampled, train_tokenizer
from zhllama import storage
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.tokenizer.vocabulary import load_encoder

VOCAB = 900


@pytest.fixture
def corpus(tmp_path, chinese_text):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "b.txt").write_text("\n".join(chinese_text[:300]) + "\n\n", "utf-8")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chinese_text[300:]))
    return folder


def trained(store, text, **options):
    manifest = run_stage(TrainTokenizer(store=str(store), text=str(text), **options), train_tokenizer)
    return open_artifact(manifest.reference)


@pytest.fixture
def tokenizer(tmp_path, corpus):
    return trained(tmp_path / "store", corpus, vocab_size=VOCAB)


def test_a_line_with_the_trainers_own_sign_is_trained_on_around_it(tmp_path, corpus):
    (corpus / "c.txt").write_text("甲虵▅鑫鑫▅\n" * 50, "utf-8")
    artifact = trained(tmp_path / "store", corpus, vocab_size=VOCAB, character_coverage=1.0)
    encoder = load_encoder(artifact, "")
    assert {"虵", "鑫"} <= set(encoder.pieces)
    assert encoder.decode(encoder.encode("虵▅鑫")) == "虵▅鑫"


def test_the_model_has_llamas_shape_and_spells_all_text(tokenizer, chinese_text):
    encoder = load_encoder(tokenizer, "--tokenizer")
    assert (encoder.size, encoder.bos, encoder.eos, encoder.pad) == (VOCAB, 1, 2, None)
    assert tokenizer.manifest.vocabulary == encoder.vocabulary()
    for text in [*chinese_text[:100], "Ωμέγα 🤗", "  two  spaces "]:
        assert encoder.decode(encoder.encode(text)) == text


def test_full_width_punctuation_keeps_its_form(tokenizer):
    assert {"，", "。", "！", "？", "：", "（", "）"} <= set(load_encoder(tokenizer, "").pieces)


def test_the_report_tells_what_it_is_worth(tokenizer, chinese_text):
    report = json.loads(tokenizer.read("report.json"))
    encoder = load_encoder(tokenizer, "")
    tokens = sum(map(len, encoder.encode_batch(chinese_text)))
    assert report["tokens_per_character"] == pytest.approx(tokens / sum(map(len, chinese_text)), abs=1e-5)
    assert report["tokens_per_character"] < 0.7
    assert report["coverage"] > 0.999
    assert "".join(report["examples"][0]["pieces"]).replace("▁", "") == report["examples"][0]["text"]
    assert tokenizer.manifest.metrics["tokens_per_character"] == report["tokens_per_character"]


def test_the_letters_of_byte_pieces_are_no_characters_with_a_piece(tokenizer):
    encoder = load_encoder(tokenizer, "")
    assert "<" not in encoder.pieces
    assert report_on(encoder, ["<"])["coverage"] == 0


def test_the_same_text_gives_the_same_bytes(tmp_path, corpus, tokenizer):
    again = trained(tmp_path / "elsewhere", corpus, vocab_size=VOCAB)
    assert again.read("tokenizer.model") == tokenizer.read("tokenizer.model")
    assert again.digest == tokenizer.digest


def test_a_corpus_in_s3_gives_what_the_folder_gives(s3_store, corpus, tokenizer):
    for name in ("a.jsonl", "b.txt"):
        storage.write_bytes(f"{s3_store}/text/{name}", (corpus / name).read_bytes())
    found = trained(f"{s3_store}/out", f"{s3_store}/text", vocab_size=VOCAB)
    assert found.read("tokenizer.model") == tokenizer.read("tokenizer.model")


def test_a_long_line_is_split_and_not_skipped(tmp_path, chinese_text):
    (tmp_path / "one.txt").write_text("".join(chinese_text), "utf-8")
    artifact = trained(tmp_path / "store", tmp_path / "one.txt", vocab_size=VOCAB)
    letters = {letter for letter in "".join(chinese_text) if "".join(chinese_text).count(letter) > 20}
    assert letters <= set(load_encoder(artifact, "").pieces)


def test_a_sample_is_as_large_as_asked_and_the_same_for_a_seed(chinese_text):
    kept, seen = sampled(iter(chinese_text), 50, seed=3)
    assert (len(kept), seen) == (50, 600)
    assert sampled(iter(chinese_text), 50, seed=3)[0] == kept
    assert sampled(iter(chinese_text), 50, seed=4)[0] != kept


def test_a_sample_takes_late_lines_as_often_as_early_ones():
    kept = [line for seed in range(200) for line in sampled(map(str, range(100)), 10, seed)[0]]
    late = sum(int(line) >= 50 for line in kept)
    assert late == pytest.approx(1000, abs=100)


def test_a_sample_is_stated(tmp_path, corpus):
    artifact = trained(tmp_path / "store", corpus, vocab_size=700, sample_lines=400)
    report = json.loads(artifact.read("report.json"))
    assert report["corpus"] == {
        "lines": 600, "lines_trained_on": 400, "sampled": True, "seed": 20, "bad_lines": 0
    }  # fmt: skip
    assert "from a sample of 400 of 600 lines" in artifact.manifest.facts["summary"]
    other = trained(tmp_path / "store", corpus, vocab_size=700, sample_lines=400, seed=21)
    assert other.read("tokenizer.model") != artifact.read("tokenizer.model")


def test_several_texts_are_one_corpus(tmp_path, corpus, tokenizer, chinese_text):
    for name, texts in (("one", chinese_text[300:]), ("two", chinese_text[:300])):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts), "utf-8")
    both = trained(tmp_path / "store", f"{tmp_path}/one.txt:0.9,{tmp_path}/two.txt:0.1", vocab_size=VOCAB)
    assert both.read("tokenizer.model") == tokenizer.read("tokenizer.model")


def test_bad_lines_are_counted_on_request(tmp_path, corpus, tokenizer):
    (corpus / "c.txt").write_bytes(b"\xff\xfe\n")
    artifact = trained(tmp_path / "store", corpus, vocab_size=VOCAB, skip_bad=True)
    assert artifact.read("tokenizer.model") == tokenizer.read("tokenizer.model")
    assert artifact.manifest.facts["bad_lines"] == 1


def test_more_pieces_than_the_text_can_give_says_how_many_it_gives(tmp_path):
    (tmp_path / "short.txt").write_text("好的好的\n" * 3, "utf-8")
    with pytest.raises(InputError, match=r"gives \d+ pieces at most, 5000 were asked for; lower --vocab-size"):
        trained(tmp_path / "store", tmp_path / "short.txt", vocab_size=5000)
    assert not storage.listing(str(tmp_path / "store"))


def test_fewer_pieces_than_characters_says_how_many_there_are(tmp_path, corpus):
    with pytest.raises(InputError, match=r"characters alone take \d+ pieces, 300 were asked for; raise --vocab-size"):
        trained(tmp_path / "store", corpus, vocab_size=300)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\n\n  \n", "the text files are empty"),
        ("a.bin", b"text", r"no \.txt or \.jsonl file"),
        ("a.txt", b"good\nbad \xff\n", "line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": 5}\n', "line 1 has a int where text is needed"),
    ],
    ids=["empty", "no text file", "not UTF-8", "no text field"],
)
def test_a_bad_corpus_is_named(tmp_path, name, content, said):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        trained(tmp_path / "store", tmp_path / "text")


@pytest.mark.parametrize(
    "options",
    [{"vocab_size": 10}, {"character_coverage": 1.5}, {"sample_lines": 0}],
    ids=lambda given: next(iter(given)),
)
def test_an_option_out_of_range_is_named(options):
    with pytest.raises(InputError, match=f"--{next(iter(options)).replace('_', '-')}"):
        TrainTokenizer(store="s", text="t", **options)


def test_the_command_publishes_and_skips_what_is_done(tmp_path, corpus):
    command = [sys.executable, "-m", "components.train_tokenizer", "--store", str(tmp_path / "store")]
    command += ["--text", str(corpus), "--vocab-size", str(VOCAB), "--reference", str(tmp_path / "ref")]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    reference = (tmp_path / "ref").read_text()
    assert open_artifact(reference).manifest.kind == "tokenizer"
    assert "done in" in first.stderr
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "already done" in second.stderr
    assert (tmp_path / "ref").read_text() == reference


def test_the_command_ends_with_2_and_one_line_for_bad_input(tmp_path):
    (tmp_path / "a.txt").write_text("好", "utf-8")
    command = [sys.executable, "-m", "components.train_tokenizer", "--store", str(tmp_path / "store")]
    done = subprocess.run([*command, "--text", str(tmp_path / "a.txt")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: --text")
