"""The stage: what is in the dataset is what was in the data, prompts masked, splits apart, contract attached."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from components.prepare_dataset.options import PrepareDataset
from components.prepare_dataset.preparer import prepare_dataset
from zhllama import storage
from zhllama.artifacts.open import open_artifact
from zhllama.data.corpus import read_documents
from zhllama.data.instructions import read_instructions
from zhllama.data.packed import IGNORED, PackedDataset
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.prompt import DEFAULT, RECIPE, question_of
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.vocabulary import Encoder, load_encoder
from zhllama.training.inputs import vocabulary_of
from zhllama.weights.fit import require_equal

ITEMS = [
    {
        "instruction": f"把第{number}句翻译成英文",
        "input": "你好" if number % 2 else "",
        "output": f"Hello, number {number}!",
    }
    for number in range(60)
]


@pytest.fixture
def tokenizer(tmp_path, llama_tokenizer):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(llama_tokenizer)
    return str(tmp_path / "tokenizer")


@pytest.fixture
def encoder(llama_tokenizer) -> Encoder:
    return SentencePieceEncoder(llama_tokenizer)


@pytest.fixture
def english(tmp_path, english_text):
    """300 documents, some of them much longer than a block."""
    path = tmp_path / "english.txt"
    path.write_text("\n".join(english_text[:290] + [" ".join(english_text[290 + i : 330 + i]) for i in range(10)]))
    return str(path)


@pytest.fixture
def items(tmp_path):
    path = tmp_path / "items.json"
    path.write_text(json.dumps(ITEMS, ensure_ascii=False))
    return str(path)


def prepare(store, tokenizer, **options):
    options = {"block_size": 64, "validation_fraction": 0.1} | options
    manifest = run_stage(PrepareDataset(store=str(store), tokenizer=tokenizer, **options), prepare_dataset)
    return open_artifact(manifest.reference)


def documents_of(dataset, encoder):
    """The texts of a split's segments that are whole documents (BOS … EOS)."""
    found = []
    for index in range(len(dataset)):
        for start, _, end in dataset.segments(index):
            ids = dataset.tokens(index)[start:end].tolist()
            if ids[0] == encoder.bos and ids[-1] == encoder.eos:
                found.append(encoder.decode(ids[1:-1]))
    return found


def test_every_document_is_in_the_dataset_once(store, tokenizer, encoder, english):
    artifact = prepare(store, tokenizer, text=english, block_size=512)
    texts = list(read_documents(open_artifact(english)))
    whole = [text for text in texts if len(encoder.encode(text)) + 2 <= 512]
    found = [
        text for split in ("train", "validation") for text in documents_of(PackedDataset(artifact, split), encoder)
    ]
    assert sorted(found) == sorted(whole)
    assert len(whole) < len(texts)
    facts = artifact.manifest.facts
    assert facts["documents"] + facts["held_out"] == len(texts)


def test_each_token_of_a_long_document_is_learned_once(tmp_path, tokenizer, encoder, english_text):
    (tmp_path / "long.txt").write_text(" ".join(english_text[:60]))
    artifact = prepare(tmp_path / "store", tokenizer, text=str(tmp_path / "long.txt"), validation_fraction=0)
    labels = [label for item in PackedDataset(artifact) for label in item["labels"].tolist() if label != IGNORED]
    ids = [*encoder.encode(" ".join(english_text[:60])), encoder.eos]
    assert sorted(labels) == sorted(ids)
    assert artifact.manifest.facts["splits"]["train"]["learned"] == len(ids)


def test_blocks_are_full_and_take_two_bytes_a_token(tmp_path, tokenizer, english):
    artifact = prepare(tmp_path / "store", tokenizer, text=english)
    split = artifact.manifest.facts["splits"]["train"]
    assert split["fill"] == artifact.manifest.metrics["fill"] > 0.95
    assert artifact.file("train-00000.bin").size == split["blocks"] * 64 * 2


def test_the_held_out_documents_are_the_validation_split(store, tokenizer, encoder, english):
    artifact = prepare(store, tokenizer, text=english, block_size=512)
    held = list(read_documents(artifact))
    assert len(held) == artifact.manifest.facts["held_out"] > 10
    validation = documents_of(PackedDataset(artifact, "validation"), encoder)
    assert set(validation) <= set(held)
    assert not set(held) & set(documents_of(PackedDataset(artifact), encoder))


def test_a_document_stays_on_its_side_whatever_stands_beside_it(tmp_path, tokenizer, english, english_text):
    before = prepare(tmp_path / "store", tokenizer, text=english)
    (tmp_path / "more.txt").write_text("\n".join(reversed(english_text[:600])))
    after = prepare(tmp_path / "store", tokenizer, text=str(tmp_path / "more.txt"))
    held_before, held_after = (set(read_documents(one)) for one in (before, after))
    common = set(english_text[:290])
    assert held_before & common == held_after & common


def test_special_strings_in_a_text_stay_text(tmp_path, tokenizer, encoder):
    text = "a </s> and a <s> and an <unk>"
    (tmp_path / "a.txt").write_text(text)
    artifact = prepare(tmp_path / "store", tokenizer, text=str(tmp_path / "a.txt"), validation_fraction=0)
    ids = PackedDataset(artifact).tokens(0).tolist()
    assert ids.count(encoder.bos) == 1
    assert ids[: ids.index(encoder.eos)] == [encoder.bos, *encoder.encode(text)]


def test_an_item_is_its_prompt_masked_and_its_answer_learned(store, tokenizer, encoder, items):
    artifact = prepare(store, tokenizer, instructions=items, block_size=512, validation_fraction=0)
    assert artifact.manifest.facts["prompt"] == "alpaca-newline"
    dataset = PackedDataset(artifact)
    expected = {
        (tuple(prompt), tuple(answer))
        for item in ITEMS
        for prompt, (answer,) in [Chat(encoder, DEFAULT.template).answered(question_of(item), [item["output"]])]
    }
    found = set()
    for index in range(len(dataset)):
        item = dataset[index]
        for start, learned_from, end in dataset.segments(index).tolist():
            prompt, answer = item["input_ids"][start:learned_from], item["input_ids"][learned_from:end]
            assert (item["labels"][start:learned_from] == IGNORED).all()
            assert (item["labels"][learned_from:end] == answer).all()
            found.add((tuple(prompt.tolist()), tuple(answer.tolist())))
    assert found == expected
    assert len(dataset) < len(ITEMS)


def test_faithful_items_have_a_block_each_padded(tmp_path, tokenizer, encoder, items):
    artifact = prepare(
        tmp_path, tokenizer, instructions=items, packing="faithful", block_size=512, validation_fraction=0
    )
    dataset = PackedDataset(artifact)
    assert artifact.manifest.facts["prompt"] == "alpaca"
    assert len(dataset) == len(ITEMS)
    for index, item in enumerate(ITEMS):
        prompt = [encoder.bos, *encoder.encode(RECIPE.wrap(question_of(item)))]
        answer = [*encoder.encode(item["output"]), encoder.eos]
        padding = 512 - len(prompt) - len(answer)
        assert dataset[index]["input_ids"].tolist() == prompt + answer + [encoder.eos] * padding
        assert dataset[index]["labels"].tolist() == [IGNORED] * len(prompt) + answer + [IGNORED] * padding


def test_faithful_text_is_the_recipes_blocks(tmp_path, tokenizer, encoder):
    lines = ["one line", "", "another line, longer than the one before", "x"] * 30
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n")
    artifact = prepare(tmp_path, tokenizer, text=str(tmp_path / "lines.txt"), packing="faithful", validation_fraction=0)
    joined = [token for line in lines for token in [encoder.bos, *encoder.encode(line)]]
    dataset = PackedDataset(artifact)
    assert len(dataset) == len(joined) // 64
    assert [dataset.tokens(index).tolist() for index in range(len(dataset))] == [
        joined[at : at + 64] for at in range(0, len(joined) - 63, 64)
    ]
    assert dataset[0]["labels"][1:].tolist() == joined[1:64]


def test_faithful_text_holds_blocks_out(tmp_path, tokenizer, encoder, english):
    artifact = prepare(tmp_path / "store", tokenizer, text=english, packing="faithful")
    held = " ".join(read_documents(artifact))
    block = PackedDataset(artifact, "validation").tokens(0).tolist()
    line = block[block.index(encoder.bos) + 1 :]
    assert encoder.decode(line[: line.index(encoder.bos)] if encoder.bos in line else line) in held


def test_a_prompt_that_fills_the_block_is_counted_and_left_out(tmp_path, tokenizer, encoder):
    room = 512 - len(encoder.encode(DEFAULT.wrap("x"))) - 1
    long = [{"instruction": "word " * room, "input": "", "output": "yes"}, ITEMS[0]]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in long))
    artifact = prepare(
        tmp_path, tokenizer, instructions=str(tmp_path / "items.jsonl"), block_size=512, validation_fraction=0
    )
    assert artifact.manifest.facts["left_out"]["fully_masked"] == 1
    assert artifact.manifest.facts["splits"]["train"]["segments"] == 1


def test_an_answer_is_cut_on_the_right(tmp_path, tokenizer, encoder):
    item = {"instruction": "Count.", "output": " ".join(map(str, range(900)))}
    (tmp_path / "item.json").write_text(json.dumps([item]))
    artifact = prepare(
        tmp_path, tokenizer, instructions=str(tmp_path / "item.json"), block_size=256, validation_fraction=0
    )
    whole = [encoder.bos, *encoder.encode(DEFAULT.wrap("Count.") + item["output"])]
    assert len(PackedDataset(artifact)) == 1
    assert PackedDataset(artifact).tokens(0).tolist() == whole[:256]


def test_held_out_items_are_read_as_instructions(store, tokenizer, items):
    artifact = prepare(store, tokenizer, instructions=items, block_size=512)
    held = list(read_instructions(artifact))
    assert len(held) == artifact.manifest.facts["held_out"] > 0
    assert all(item in ITEMS for item in held)
    with pytest.raises(InputError, match="holds no text back; prepare it from --text"):
        list(read_documents(artifact))


def test_what_is_in_the_validation_set_is_not_trained_on(tmp_path, tokenizer, encoder, english, english_text):
    (tmp_path / "validation.txt").write_text("\n".join([*english_text[:20], "A line that stands nowhere else."]))
    artifact = prepare(
        tmp_path / "s", tokenizer, text=english, validation=str(tmp_path / "validation.txt"), block_size=512
    )
    assert artifact.manifest.facts["left_out"]["in_validation_too"] == 20
    assert artifact.manifest.facts["held_out"] == 21
    assert not set(english_text[:20]) & set(documents_of(PackedDataset(artifact), encoder))
    assert len(list(read_documents(artifact))) == 21


def test_without_a_fraction_nothing_is_held_out(tmp_path, tokenizer, english):
    artifact = prepare(tmp_path / "store", tokenizer, text=english, validation_fraction=0)
    assert list(artifact.manifest.facts["splits"]) == ["train"]
    with pytest.raises(InputError, match="no validation split"):
        PackedDataset(artifact, "validation")
    with pytest.raises(InputError, match="holds no text back"):
        list(read_documents(artifact))


def test_sources_are_mixed_by_weight(tmp_path, tokenizer, english, chinese_text):
    (tmp_path / "zh").mkdir()
    (tmp_path / "zh" / "a.txt").write_text("\n".join(chinese_text), "utf-8")
    artifact = prepare(tmp_path / "store", tokenizer, text=f"{tmp_path}/zh:0.75,{english}:0.25")
    chinese, english_source = artifact.manifest.facts["sources"]
    assert chinese["tokens"] / english_source["tokens"] == pytest.approx(3, rel=0.1)
    assert chinese["used_up"] != english_source["used_up"]
    artifact = prepare(tmp_path / "store", tokenizer, text=f"{tmp_path}/zh:1,{english}:1")
    chinese, english_source = artifact.manifest.facts["sources"]
    assert chinese["tokens"] == pytest.approx(english_source["tokens"], rel=0.1)


def test_bad_lines_are_counted_and_left_out_on_request(tmp_path, tokenizer, encoder):
    (tmp_path / "a.txt").write_bytes(b"good one\nbad \xff one\ngood two\n")
    with pytest.raises(InputError, match=r"a\.txt: line 2 is not UTF-8 .*--skip-bad"):
        prepare(tmp_path / "store", tokenizer, text=str(tmp_path / "a.txt"), validation_fraction=0)
    artifact = prepare(
        tmp_path / "store", tokenizer, text=str(tmp_path / "a.txt"), validation_fraction=0, skip_bad=True
    )
    assert sorted(documents_of(PackedDataset(artifact), encoder)) == ["good one", "good two"]
    assert artifact.manifest.facts["left_out"]["bad"] == 1
    assert "a.txt: line 2" in artifact.manifest.facts["first_bad"][0]
    assert "left out: 1 bad" in artifact.manifest.facts["summary"]


def test_near_duplicates_are_left_out_on_request(tmp_path, tokenizer, encoder, chinese_text):
    longer = ["".join(chinese_text[at : at + 4]) for at in range(0, 400, 4)]
    edited = [text[:30] + "改" + text[31:] for text in longer[:40]]
    (tmp_path / "a.txt").write_text("\n".join(longer + edited), "utf-8")
    options = {"text": str(tmp_path / "a.txt"), "block_size": 512, "validation_fraction": 0}
    assert prepare(tmp_path / "s", tokenizer, **options).manifest.facts["documents"] == 140
    artifact = prepare(tmp_path / "s", tokenizer, drop_near_duplicates=True, **options)
    assert artifact.manifest.facts["left_out"]["near_duplicates"] == 40
    assert set(documents_of(PackedDataset(artifact), encoder)) <= set(longer)
    again = prepare(tmp_path / "elsewhere", tokenizer, drop_near_duplicates=True, **options)
    assert again.digest == artifact.digest


def test_what_is_nearly_in_the_validation_set_is_left_out_on_request(tmp_path, tokenizer, chinese_text):
    longer = ["".join(chinese_text[at : at + 4]) for at in range(0, 400, 4)]
    (tmp_path / "v.txt").write_text("\n".join(text[:30] + "改" + text[31:] for text in longer[:25]), "utf-8")
    (tmp_path / "a.txt").write_text("\n".join(longer), "utf-8")
    options = {"text": str(tmp_path / "a.txt"), "validation": str(tmp_path / "v.txt"), "block_size": 512}
    facts = prepare(tmp_path / "s", tokenizer, drop_near_duplicates=True, **options).manifest.facts
    assert (facts["left_out"]["near_duplicates"], facts["documents"], facts["held_out"]) == (25, 75, 25)


def test_what_an_evaluation_holds_is_left_out_of_text_and_items(tmp_path, tokenizer, encoder, chinese_text):
    asked = chinese_text[:30]
    exam = [{"instruction": "这句话的意思是什么？", "input": text, "output": "好"} for text in asked]
    (tmp_path / "exam.json").write_text(json.dumps(exam))
    (tmp_path / "a.txt").write_text("\n".join(f"前面的话{text}后面的话" for text in chinese_text), "utf-8")
    options = {"evaluation": str(tmp_path / "exam.json"), "block_size": 512, "validation_fraction": 0}
    artifact = prepare(tmp_path / "s", tokenizer, text=str(tmp_path / "a.txt"), **options)
    left = " ".join(documents_of(PackedDataset(artifact), encoder))
    assert artifact.manifest.facts["left_out"]["in_evaluation"] >= 30
    assert not any(text in left for text in asked)
    items = [{"instruction": "这句话的意思是什么？", "input": text, "output": "坏"} for text in chinese_text]
    (tmp_path / "items.json").write_text(json.dumps(items))
    artifact = prepare(tmp_path / "s", tokenizer, instructions=str(tmp_path / "items.json"), **options)
    assert 30 <= artifact.manifest.facts["left_out"]["in_evaluation"] < 500


def test_text_from_every_kind_of_file_is_the_same_dataset(tmp_path, tokenizer, english_text):
    texts = english_text[:200]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_text("\n".join(texts))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.txt.gz").write_bytes(gzip.compress("\n".join(texts[:80]).encode()))
    parquet.write_table(pyarrow.table({"text": texts[80:]}), tmp_path / "packed" / "b.parquet")
    plain, packed = (prepare(tmp_path / "s", tokenizer, text=str(tmp_path / name)) for name in ("plain", "packed"))
    for name in plain.names:
        assert plain.read(name) == packed.read(name)


# --- keyed by content and settings ------------------------------------------------------------------------------------


def test_an_unchanged_input_is_not_tokenised_twice(tmp_path, tokenizer, english, caplog):
    caplog.set_level("INFO")
    first = prepare(tmp_path / "s", tokenizer, text=english)
    blocks = Path(first.root) / "train-00000.bin"
    written = blocks.stat().st_mtime_ns
    moved = Path(english).rename(tmp_path / "elsewhere.txt")
    again = prepare(tmp_path / "s", tokenizer, text=str(moved.rename(english)))
    assert again.root == first.root
    assert blocks.stat().st_mtime_ns == written
    assert "already done" in caplog.text


@pytest.mark.parametrize(
    "changed",
    [
        {"block_size": 63},
        {"packing": "faithful"},
        {"seed": 21},
        {"validation_fraction": 0.2},
        {"skip_bad": True},
        {"drop_near_duplicates": True},
        {"evaluation": "EVALUATION"},
        {"validation": "EVALUATION"},
        {"tokenizer": "OTHER"},
        {"text": "OTHER"},
    ],
    ids=lambda changed: f"{next(iter(changed))}",
)
def test_what_decides_the_result_is_in_the_key(tmp_path, tokenizer, english, english_text, chinese_tokenizer, changed):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.model").write_bytes(chinese_tokenizer)
    (tmp_path / "other.txt").write_text(Path(english).read_text(encoding="utf-8") + "\none line more")
    (tmp_path / "evaluation.txt").write_text("\n".join(english_text[:20]))
    given = {"tokenizer": tokenizer, "text": english}
    first = prepare(tmp_path / "s", **given)
    replacement = {
        "EVALUATION": str(tmp_path / "evaluation.txt"),
        "OTHER": str(tmp_path / ("other" if "tokenizer" in changed else "other.txt")),
    }
    changed = {
        name: replacement.get(value, value) if isinstance(value, str) else value for name, value in changed.items()
    }
    second = prepare(tmp_path / "s", **given | changed)
    assert second.root != first.root
    if "tokenizer" in changed:
        assert second.manifest.vocabulary != first.manifest.vocabulary


def test_the_contract_is_the_models(tmp_path, extended_model, english):
    artifact = prepare(tmp_path / "store", extended_model, text=english)
    model = open_artifact(extended_model)
    require_equal(artifact.manifest.vocabulary, model.manifest.vocabulary, "--dataset", "--model")
    assert artifact.manifest.facts["pad_id"] == load_encoder(model, "").pad


def test_the_contract_has_the_tokens_that_the_models_folder_names(tmp_path, chatml_model, english):
    model = open_artifact(str(chatml_model))
    artifact = prepare(tmp_path / "store", str(chatml_model), text=english)
    require_equal(artifact.manifest.vocabulary, vocabulary_of(model, "--model"), "--dataset", "--model")
    assert artifact.manifest.vocabulary.eos == 801
    assert any(801 in item["input_ids"].tolist() for item in PackedDataset(artifact))


def test_the_same_data_gives_the_same_digest_and_other_settings_another_place(tmp_path, tokenizer, english):
    first = prepare(tmp_path / "a", tokenizer, text=english)
    assert prepare(tmp_path / "b", tokenizer, text=english).digest == first.digest
    longer = prepare(tmp_path / "a", tokenizer, text=english, block_size=128)
    assert longer.root != first.root
    assert PackedDataset(longer).block_size == 128


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[{", "not JSON"),
        ('{"a": 1}', "a dict where a list of objects"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', r"item 2: field 'output' is missing"),
        ('[{"instruction": "a", "output": 5}]', r"item 1: field 'output' is not text"),
        ("[]", "no item in it"),
    ],
    ids=["no JSON", "no list", "no output", "no text", "empty"],
)
def test_bad_items_are_named(tmp_path, tokenizer, content, said):
    (tmp_path / "items.json").write_text(content)
    with pytest.raises(InputError, match=said):
        prepare(tmp_path / "store", tokenizer, instructions=str(tmp_path / "items.json"))
    assert not any("manifest" in file.name for file in storage.listing(str(tmp_path / "store")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give --text or --instructions"),
        ({"text": "a", "instructions": "b"}, "give --text or --instructions"),
        ({"text": "a", "block_size": 2}, "--block-size 2"),
        ({"text": "a", "validation_fraction": 1.0}, "--validation-fraction 1.0"),
        ({"text": "a:0,b:1"}, "weight 0"),
        ({"text": "a:0.5,b:0.5", "packing": "faithful"}, "faithful reads its sources as they are"),
        ({"text": "a", "packing": "faithful", "drop_near_duplicates": True}, "faithful packs every line"),
        ({"text": "a", "packing": "faithful", "evaluation": "b"}, "faithful packs every line"),
    ],
    ids=["no data", "both", "block", "fraction", "weight", "weighted faithful", "faithful near", "faithful overlap"],
)
def test_options_that_do_not_fit_are_named(options, said):
    with pytest.raises(InputError, match=said):
        PrepareDataset(store="s", tokenizer="t", **options)


def test_a_share_that_holds_nothing_out_says_so(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one line\n")
    with pytest.raises(InputError, match=r"none of 1 documents was held out; raise --validation-fraction"):
        prepare(tmp_path / "store", tokenizer, text=str(tmp_path / "a.txt"), validation_fraction=1e-6)


def test_a_validation_set_that_is_the_training_set_leaves_nothing(tmp_path, tokenizer, english):
    with pytest.raises(InputError, match=r"nothing is left to train on \(left out: 300 in validation too\)"):
        prepare(tmp_path / "store", tokenizer, text=english, validation=english)


def test_the_command_needs_no_torch_and_no_transformers(tmp_path, tokenizer, english):
    program = (
        "import sys\n"
        "from components.prepare_dataset.options import PrepareDataset\n"
        "from components.prepare_dataset.preparer import prepare_dataset\n"
        "from zhllama.stage.run import run_stage\n"
        f"run_stage(PrepareDataset(store={str(tmp_path / 'store')!r}, tokenizer={tokenizer!r}, text={english!r}), "
        "prepare_dataset)\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_publishes_and_takes_kfps_texts(tmp_path, tokenizer, items):
    command = [sys.executable, "-m", "components.prepare_dataset", "--store", str(tmp_path / "store")]
    command += ["--tokenizer", tokenizer, "--text", "", "--instructions", items, "--validation", ""]
    command += ["--reference", str(tmp_path / "ref"), "--executor-output", str(tmp_path / "metrics.json")]
    done = subprocess.run([*command, "--validation-fraction", "0.2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert open_artifact((tmp_path / "ref").read_text()).manifest.kind == "packed-dataset"
    metadata = json.loads((tmp_path / "metrics.json").read_text())["artifacts"]["metrics"]["artifacts"][0]["metadata"]
    assert 0 < metadata["fill"] <= 1
