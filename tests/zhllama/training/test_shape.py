"""A continued adapter keeps its own shape; an option that says otherwise is refused, one that agrees is not."""

import json

import pytest

from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.models.llama import LLAMA
from zhllama.training.inputs import EMBEDDINGS, LoraShape, lora_shape, new_rows
from zhllama.training.options import FinetuneOptions, PretrainOptions, TrainingOptions

HAVE = {
    "r": 4,
    "lora_alpha": 12.0,
    "lora_dropout": 0.1,
    "target_modules": ["v_proj", "q_proj"],
    "modules_to_save": ["embed_tokens", "lm_head"],
}


def tuning(**options) -> TrainingOptions:
    return FinetuneOptions(**{"store": "s", "model": "m", "dataset": "d", "adapter": "a", **options})


@pytest.fixture
def adapter(tmp_path):
    """`adapter(**changes)`: an adapter folder whose settings are HAVE with changes."""

    def make(**changes) -> Artifact:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**HAVE, **changes}))
        return open_artifact(str(tmp_path))

    return make


@pytest.fixture
def model(extended_model) -> Artifact:
    return open_artifact(extended_model)


def test_nothing_said_is_the_adapters_own_shape(model, adapter):
    assert lora_shape(tuning(), model, adapter()) == LoraShape(4, 12.0, 0.1, ["q_proj", "v_proj"], "all")


def test_what_agrees_is_taken(model, adapter):
    options = tuning(
        lora_r=4,
        lora_alpha=12.0,
        lora_dropout=0.1,
        lora_targets="q_proj, v_proj",
        train_embeddings=True,
        embedding_rows="all",
    )
    assert lora_shape(options, model, adapter()).r == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_r": 8}, "--lora-r 8: the adapter .* has 4; leave the option out, or start a new adapter"),
        ({"lora_alpha": 32.0}, "--lora-alpha 32: the adapter .* has 12;"),
        ({"lora_dropout": 0.05}, r"--lora-dropout 0\.05: the adapter .* has 0\.1;"),
        ({"lora_targets": "q_proj"}, "--lora-targets q_proj: the adapter .* has q_proj,v_proj;"),
        ({"embedding_rows": "new"}, "--embedding-rows new: the adapter .* has all;"),
    ],
    ids=["rank", "alpha", "dropout", "targets", "rows"],
)
def test_what_contradicts_is_refused(options, said, model, adapter):
    with pytest.raises(InputError, match=said):
        lora_shape(tuning(**options), model, adapter())


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("all-linear", sorted(LLAMA.lora_modules)),
        (r"(?:.*?(?:self_attn|attention).*?(?:q_proj|v_proj).*?)", ["q_proj", "v_proj"]),
        (r".*layers\.0\..*q_proj", ["q_proj"]),
    ],
    ids=["peft's word", "an expression as Unsloth writes it", "an expression for one layer"],
)
def test_an_expression_for_layers_is_their_names(given, names, model, adapter):
    assert lora_shape(tuning(), model, adapter(target_modules=given)).targets == names


def test_embeddings_cannot_be_added_to_an_adapter_without(model, adapter):
    with pytest.raises(InputError, match=r"--train-embeddings: the adapter .* has no trained embeddings"):
        lora_shape(tuning(train_embeddings=True), model, adapter(modules_to_save=None))


@pytest.mark.parametrize(
    "given",
    [{name: [7, 9] for name in EMBEDDINGS}, {"model.embed_tokens": [7, 9]}, [7, 9], {"lm_head": [7, 9]}],
    ids=["both", "its whole name", "a list", "the head"],
)
def test_the_rows_of_a_continued_adapter_are_its_own(model, adapter, given):
    shape = lora_shape(tuning(), model, adapter(modules_to_save=None, trainable_token_indices=given))
    assert (shape.embeddings, shape.rows) == ("new", (7, 9))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bias": "all"}, "sets bias='all', which is not done here"),
        ({"peft_type": "IA3"}, "a IA3 adapter; only LoRA"),
        ({"r": "eight"}, r"no LoRA configuration \(r is eight.*\); fetch it again"),
    ],
    ids=[
        "bias",
        "kind",
        "r",
    ],
)
def test_what_cannot_be_continued_is_said(changes, said, model, adapter):
    with pytest.raises(InputError, match=said):
        lora_shape(tuning(), model, adapter(**changes))


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "Expecting"), ("[1]", "a list stands"), ("{}", "it has no r")],
    ids=["cut", "list", "empty"],
)
def test_a_configuration_that_is_none_is_named(content, said, model, tmp_path):
    (tmp_path / "adapter_config.json").write_text(content)
    broken = open_artifact(str(tmp_path))
    with pytest.raises(InputError, match=rf"--adapter .*adapter_config\.json is no LoRA configuration \({said}"):
        lora_shape(tuning(), model, broken)


# --- a new adapter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "embeddings"),
    [
        (PretrainOptions(store="s", model="m", dataset="d", stage="lora"), "all"),
        (PretrainOptions(store="s", model="m", dataset="d", stage="lora", embedding_rows="new"), "new"),
        (FinetuneOptions(store="s", model="m", dataset="d"), ""),
        (FinetuneOptions(store="s", model="m", dataset="d", train_embeddings=True), "all"),
        (FinetuneOptions(store="s", model="m", dataset="d", train_embeddings=True, embedding_rows="new"), "new"),
    ],
    ids=["pretrain", "pretrain, new rows", "finetune", "finetune, embeddings", "finetune, new rows"],
)
def test_a_new_adapter_is_the_recipes_unless_told(options, embeddings, model):
    shape = lora_shape(options, model, None, LLAMA.lora_modules)
    assert (shape.r, shape.alpha, shape.dropout, len(shape.targets)) == (8, 32.0, 0.05, 7)
    assert shape.embeddings == embeddings
    assert bool(shape.rows) == (embeddings == "new")


def test_new_rows_are_those_that_the_extension_added(model, tiny_model):
    before = open_artifact(tiny_model).manifest.vocabulary.size
    assert new_rows(model) == tuple(range(before, model.manifest.vocabulary.size))


def test_new_rows_of_a_model_without_a_history_are_told_by_its_contract(model, tmp_path):
    out = ArtifactWriter(str(tmp_path), "merge_adapters", "key")
    out.copy(model, "config.json")
    out.vocabulary = model.manifest.vocabulary
    merged = open_artifact(out.publish("hf-model").reference)
    assert new_rows(merged) == new_rows(model)


def test_a_model_that_was_not_extended_has_no_new_rows(tiny_model):
    with pytest.raises(InputError, match=r"--embedding-rows new: .* does not say which rows"):
        new_rows(open_artifact(tiny_model))
