"""Documents of a tokenizer that puts no BOS before a text: their ids and EOS, as engines then read them."""

import json
from itertools import islice
from pathlib import Path

import pytest

from components.prepare_dataset.options import PrepareDataset
from components.prepare_dataset.preparer import prepare_dataset
from tests.byte_level_bases import CHATML
from tests.texts import chinese_sentences
from zhllama.artifacts.open import open_artifact
from zhllama.data.packed import TRAIN, PackedDataset
from zhllama.data.packed_view import shown_block
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.prompt import DEFAULT, question_of
from zhllama.tokenizer.vocabulary import load_encoder

ITEMS = [
    {"instruction": f"翻译：{text}", "input": "", "output": ("\n" if at % 3 == 0 else "") + text[:9]}
    for at, text in enumerate(islice(chinese_sentences(4), 12))
]


@pytest.fixture(params=["qwen", "smollm2"])
def tokenizer(request, tmp_path, byte_level_files) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    for name, content in byte_level_files[request.param].items():
        (folder / name).write_bytes(content)
    return folder


def prepare(tmp_path: Path, tokenizer: Path, **options) -> PackedDataset:
    options = {"store": str(tmp_path / "store"), "tokenizer": str(tokenizer), "validation_fraction": 0.0, **options}
    return PackedDataset(open_artifact(run_stage(PrepareDataset(**options), prepare_dataset).reference), TRAIN)


def segments(dataset: PackedDataset) -> list[list[int]]:
    return [
        dataset.tokens(block)[start:end].tolist()
        for block in range(len(dataset))
        for start, _, end in dataset.segments(block).tolist()
    ]


def test_a_document_is_its_ids_and_eos(tmp_path, tokenizer):
    texts = [*islice(chinese_sentences(), 40), "a <|im_start|> stays text"]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    encoder = load_encoder(open_artifact(str(tokenizer)), "")
    dataset = prepare(tmp_path, tokenizer, text=str(tmp_path / "text.txt"))
    assert sorted(segments(dataset)) == sorted([*encoder.encode(text), encoder.eos] for text in texts)
    shown = [one for block in range(len(dataset)) for one in shown_block(dataset, block, encoder)]
    # nothing foretells the first id
    assert sorted(one.learned for one in shown) == sorted(texts)
    assert all(one.learned_from == one.start + 1 for one in shown)
    assert all(one.begins and one.ends for one in shown)


@pytest.mark.parametrize("template", ["own", "alpaca"])
def test_an_item_has_the_ids_that_it_is_asked_with(tmp_path, tokenizer, template):
    (tmp_path / "items.json").write_text(json.dumps(ITEMS))
    encoder = load_encoder(open_artifact(str(tokenizer)), "")
    chat, wanted = Chat(encoder, CHATML if template == "own" else DEFAULT.template), []
    for item in ITEMS:
        asked, (said,) = chat.answered(question_of(item), [item["output"]])
        wanted.append([*asked, *said])
    found = segments(prepare(tmp_path, tokenizer, instructions=str(tmp_path / "items.json"), template=template))
    # ChatML's end is EOS here
    assert sorted(found) == sorted(wanted)


def test_what_tells_lines_apart_by_bos_is_refused(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"--packing faithful: .*puts no BOS before a text.*; give --packing best-fit"):
        prepare(tmp_path, tokenizer, text=str(tmp_path / "text.txt"), packing="faithful")
