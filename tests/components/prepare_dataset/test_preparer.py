"""The stage: what is in the dataset is what was in the data, prompts masked, splits apart, contract attached."""

import json
import subprocess
import sys

import pytest

from components.prepare_dataset.preparer import PrepareDataset, prepare_dataset
from components.shared import storage
from components.shared.artifact import open_artifact
from components.shared.cli import run_stage
from components.shared.corpus import read_documents
from components.shared.errors import InputError
from components.shared.instructions import read_instructions
from components.shared.packed import IGNORED, PackedDataset
from components.shared.prompt import wrap
from components.shared.vocabulary import Encoder, load_encoder, require_equal

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
    return Encoder(llama_tokenizer)


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
    texts = [document.text for document in read_documents(open_artifact(english))]
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
    held = [document.text for document in read_documents(artifact)]
    assert len(held) == artifact.manifest.facts["held_out"] > 10
    validation = documents_of(PackedDataset(artifact, "validation"), encoder)
    assert set(validation) <= set(held)
    assert not set(held) & set(documents_of(PackedDataset(artifact), encoder))


def test_a_document_stays_on_its_side_whatever_stands_beside_it(tmp_path, tokenizer, english, english_text):
    before = prepare(tmp_path / "store", tokenizer, text=english)
    (tmp_path / "more.txt").write_text("\n".join(reversed(english_text[:600])))
    after = prepare(tmp_path / "store", tokenizer, text=str(tmp_path / "more.txt"))
    held_before, held_after = ({document.text for document in read_documents(one)} for one in (before, after))
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
    dataset = PackedDataset(prepare(store, tokenizer, instructions=items, block_size=512, validation_fraction=0))
    expected = {
        (
            (encoder.bos, *encoder.encode(wrap(item["instruction"], item["input"]))),
            (*encoder.encode(item["output"]), encoder.eos),
        )
        for item in ITEMS
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
    assert len(dataset) == len(ITEMS)
    for index, item in enumerate(ITEMS):
        prompt = [encoder.bos, *encoder.encode(wrap(item["instruction"], item["input"]))]
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
    held = " ".join(document.text for document in read_documents(artifact))
    block = PackedDataset(artifact, "validation").tokens(0).tolist()
    line = block[block.index(encoder.bos) + 1 :]
    assert encoder.decode(line[: line.index(encoder.bos)] if encoder.bos in line else line) in held


def test_a_prompt_that_fills_the_block_is_counted_and_left_out(tmp_path, tokenizer, encoder):
    room = 512 - len(encoder.encode(wrap("x", ""))) - 1
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
    whole = [encoder.bos, *encoder.encode(wrap("Count.")), *encoder.encode(item["output"])]
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


def test_the_contract_is_the_models(tmp_path, extended_model, english):
    artifact = prepare(tmp_path / "store", extended_model, text=english)
    model = open_artifact(extended_model)
    require_equal(artifact.manifest.vocabulary, model.manifest.vocabulary, "--dataset", "--model")
    assert artifact.manifest.facts["pad_id"] == load_encoder(model, "").pad


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
        ('{"instruction": "a"}', "a dict where a list of objects"),
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
    ],
    ids=["no data", "both", "block", "fraction", "weight", "weighted faithful"],
)
def test_options_that_do_not_fit_are_named(options, said):
    with pytest.raises(InputError, match=said):
        PrepareDataset(store="s", tokenizer="t", **options)


def test_a_share_that_holds_nothing_out_says_so(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one line\n")
    with pytest.raises(InputError, match=r"none of 1 documents was held out; raise --validation-fraction"):
        prepare(tmp_path / "store", tokenizer, text=str(tmp_path / "a.txt"), validation_fraction=1e-6)


def test_a_validation_set_that_is_the_training_set_leaves_nothing(tmp_path, tokenizer, english):
    with pytest.raises(InputError, match=r"nothing is left to train on \(300 in validation too\)"):
        prepare(tmp_path / "store", tokenizer, text=english, validation=english)


def test_the_command_needs_no_torch_and_no_transformers(tmp_path, tokenizer, english):
    program = (
        "import sys\n"
        "from components.prepare_dataset.preparer import PrepareDataset, prepare_dataset\n"
        "from components.shared.cli import run_stage\n"
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
