"""A byte-level model is extended: old rows stay, spare ones are filled first, new ones are of the base's own ids."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from components.extend_tokenizer.extender import extend_tokenizer
from components.extend_tokenizer.options import ExtendTokenizer
from components.train_tokenizer.options import TrainTokenizer
from components.train_tokenizer.sentencepiece_trainer import train_tokenizer
from tests.byte_level_bases import SHAPES
from tests.texts import chinese_sentences, mixed_lines
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.models.architecture import EMBEDDING, HEAD
from zhllama.stage.run import run_stage
from zhllama.tokenizer.vocabulary import Relation, load_encoder
from zhllama.weights.safetensors_io import Checkpoint

NEW = 60
ROWS = {"llama 3": 1756, "qwen": 1536, "smollm2": 1500}
"""Of the models' tables: Qwen's have more than there are tokens."""


@pytest.fixture(scope="module")
def models(tmp_path_factory, byte_level_files) -> dict[str, Path]:
    """A small random model of each kind, as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    found = {}
    for kind, files in byte_level_files.items():
        folder = found[kind] = tmp_path_factory.mktemp(kind.replace(" ", ""))
        torch.manual_seed(1)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=ROWS[kind], tie_word_embeddings=kind == "smollm2", **sizes)
        LlamaForCausalLM(config).half().save_pretrained(folder)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return found


@pytest.fixture(scope="module")
def merges(tmp_path_factory, models) -> dict[str, str]:
    """What train_tokenizer learned for each."""
    store = tmp_path_factory.mktemp("merges")
    (store / "text.txt").write_text("\n".join(islice(chinese_sentences(), 400)))
    options = {"store": str(store / "store"), "text": str(store / "text.txt"), "vocab_size": NEW}
    return {
        kind: run_stage(TrainTokenizer(base=str(model), **options), train_tokenizer).reference
        for kind, model in models.items()
    }


def extend(store: Path, model: Path, **options) -> Artifact:
    options = {"store": str(store), "model": str(model), **options}
    return open_artifact(run_stage(ExtendTokenizer(**options), extend_tokenizer).reference)


@pytest.fixture(params=SHAPES)
def kind(request) -> str:
    return request.param


@pytest.fixture
def extended(tmp_path, models, merges, kind) -> Artifact:
    return extend(tmp_path / "store", models[kind], chinese_tokenizer=merges[kind])


def test_new_pieces_come_after_all_and_their_rows_are_of_the_bases_segmentation(extended, models, kind):
    base = open_artifact(str(models[kind]))
    before, after = load_encoder(base, ""), load_encoder(extended, "")
    padding = kind != "qwen"  # has padding of its own
    assert after.size == before.size + NEW + padding
    assert after.pieces[: before.size] == before.pieces
    old, new = (Checkpoint(one) for one in (base, extended))
    for table in (EMBEDDING,) if kind == "smollm2" else (EMBEDDING, HEAD):
        rows, was = new.read(table).float(), old.read(table).float()
        assert torch.equal(rows[: before.size], was[: before.size])
        mean = was[before.segmented(after.pieces[before.size + 9])].mean(0)
        torch.testing.assert_close(torch.cosine_similarity(rows[before.size + 9], mean, dim=0), torch.tensor(1.0))
    assert json.loads(extended.read("config.json"))["vocab_size"] == len(rows)
    facts = extended.manifest.facts
    assert (facts["unreachable"], facts["parity"]["differ"], facts["pieces_before"]) == (0, 0, before.size)
    assert extended.manifest.vocabulary.relation_to(before.vocabulary()) is Relation.EXTENDS


def test_spare_rows_are_filled_first_and_those_left_stay(tmp_path, models, merges):
    from components.train_tokenizer.options import TrainTokenizer

    (tmp_path / "text.txt").write_text("\n".join(islice(chinese_sentences(), 100)))
    options = {"store": str(tmp_path / "store"), "text": str(tmp_path / "text.txt"), "base": str(models["qwen"])}
    few = run_stage(TrainTokenizer(vocab_size=20, **options), train_tokenizer).reference
    artifact = extend(tmp_path / "store", models["qwen"], chinese_tokenizer=few)
    old, new = Checkpoint(open_artifact(str(models["qwen"]))).read(HEAD), Checkpoint(artifact).read(HEAD)
    assert new.shape == old.shape
    assert torch.equal(new[1525:], old[1525:])
    assert not torch.equal(new[1524], old[1524])
    assert artifact.manifest.vocabulary.rows == ROWS["qwen"]
    more = extend(tmp_path / "store", models["qwen"], chinese_tokenizer=merges["qwen"], pad_to_multiple_of=64)
    assert Checkpoint(more).info(HEAD).shape[0] == 1600


def test_transformers_reads_it_as_training_does_and_english_has_its_logits(extended, models, kind, english_text):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    encoder, tokenizer = load_encoder(extended, ""), AutoTokenizer.from_pretrained(extended.root)
    lines = [*mixed_lines(300), "a<|im_end|>b"]
    assert encoder.differing(lines, tokenizer(lines, split_special_tokens=True)["input_ids"]) == 0
    before, after = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32) for one in (models[kind], extended.root)
    )
    ids = tokenizer(english_text[0], return_tensors="pt")["input_ids"]
    old = load_encoder(open_artifact(str(models[kind])), "").size
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits[..., :old], before(ids).logits[..., :old])


def test_padding_alone_is_appended_where_there_is_none(tmp_path, models):
    artifact = extend(tmp_path / "store", models["llama 3"])
    encoder = load_encoder(artifact, "")
    assert encoder.pieces[encoder.pad] == "[PAD]"
    assert encoder.pad == encoder.size - 1 == 1756
    with pytest.raises(InputError, match="nothing to append: there is padding already"):
        extend(tmp_path / "store", models["qwen"])


def test_what_does_not_belong_to_it_is_refused(tmp_path, models, merges, chinese_tokenizer, tiny_model):
    (tmp_path / "chinese.model").write_bytes(chinese_tokenizer)
    said = "it does not extend the model's byte-level vocabulary; give what train_tokenizer --base made"
    for wrong in (str(tmp_path / "chinese.model"), merges["llama 3"], str(models["qwen"])):
        with pytest.raises(InputError, match=said):
            extend(tmp_path / "store", models["qwen"], chinese_tokenizer=wrong)
    with pytest.raises(InputError, match=r"no tokenizer.model in it \(its tokenizer.json is byte-level\)"):
        extend(tmp_path / "store", tiny_model, chinese_tokenizer=merges["qwen"])
    for options, name in (({"scores": "zero"}, "--scores zero"), ({"pieces": "all"}, "--pieces all")):
        with pytest.raises(InputError, match=f"{name}: a byte-level vocabulary has none to choose"):
            extend(tmp_path / "store", models["qwen"], chinese_tokenizer=merges["qwen"], **options)
    with pytest.raises(InputError, match="a byte-level base is extended by one; give one"):
        extend(tmp_path / "store", models["qwen"], chinese_tokenizer=f"{merges['qwen']},{merges['qwen']}")
