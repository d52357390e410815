"""The sizes hold the recipe's values, and a wrong file is refused by name and field."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from pipelines import sizes
from pipelines.planner.memory import Setting
from zhllama.errors import InputError


@pytest.mark.parametrize("name", sizes.names())
def test_every_size_loads_and_its_stages_agree_on_the_block(name):
    size = sizes.load(name)
    assert size.name == name
    assert {size.training(stage).processes_per_node > 0 for stage in sizes.STAGES} == {True}


def test_the_recipes_names_are_in_order_of_size_and_come_first():
    assert sizes.names()[:5] == ["tiny", "7b", "13b", "33b", "65b"]
    assert set(sizes.names()[5:]) == TODAY.keys()


TODAY = {
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
}
"""Bases of today → the parameters that their makers publish."""


@pytest.mark.parametrize("name", sizes.names())
def test_a_size_has_as_many_parameters_as_transformers_class_of_its_shape(name):
    shape = sizes.load(name).model
    given = {field: value for field, value in shape.config().items() if value is not None}
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    with torch.device("meta"):
        counted = AutoModelForCausalLM.from_config(config).num_parameters()
    planned = Setting(model=shape, pieces=shape.rows, trains="", batch=1, block=1).base_parameters
    assert planned == counted == TODAY.get(name, counted)


def test_llama_3_and_qwen_keep_their_vocabularies_and_the_others_are_extended():
    kept = {name for name in sizes.names() if sizes.load(name).tokenizer == "keep"}
    assert kept == {"llama3.1-8b", "llama3.2-1b", "qwen2.5-7b", "qwen3-8b"}
    assert sizes.load("smollm2-135m").tokenizer == "continue"


@pytest.mark.parametrize(("name", "served"), [("7b", "llama-7b"), ("qwen2.5-7b", "qwen2-5-7b")])
def test_a_size_is_served_under_a_name_that_kubernetes_takes(name, served):
    assert sizes.load(name).served_as == served


@pytest.mark.parametrize("name", ["7b", "13b", "33b", "65b"])
def test_the_recipes_rates_and_global_batches(name):
    size = sizes.load(name)
    assert [size.training(stage).learning_rate for stage in sizes.STAGES] == [2e-4, 1e-4, 1e-4]
    assert [size.training(stage).global_batch for stage in sizes.STAGES] == [1024, 1024, 512]
    assert [size.training(stage).warmup_ratio for stage in sizes.STAGES] == [0.05, 0.05, 0.03]
    assert (size.adapter.rank, size.adapter.alpha, size.adapter.dropout) == (8, 32, 0.05)
    assert (size.block_size, size.vocab_size) == (512, 20_000)


@pytest.mark.parametrize(("name", "shards"), [("7b", 1), ("13b", 2), ("33b", 4), ("65b", 8)])
def test_metas_shard_counts(name, shards):
    assert sizes.load(name).shards == shards


def test_7b_has_the_steps_and_gpus_of_the_wiki():
    size = sizes.load("7b")
    assert (size.embeddings.steps, size.embeddings.processes) == (3000, 8)
    assert (size.lora.steps, size.lora.processes) == (6000, 16)
    assert 6000 <= size.sft.steps <= 10_000
    assert size.sft.processes == 16


def test_tiny_needs_no_gpu_and_two_processes():
    tiny = sizes.load("tiny")
    assert [tiny.training(stage).processes for stage in sizes.STAGES] == [2, 2, 2]
    assert {tiny.training(stage).gpu for stage in sizes.STAGES} == {""}


@pytest.mark.parametrize("name", sizes.names())
def test_the_trainings_of_a_size_run_on_the_same_machines(name):
    """The pipeline has one set of parameters for them."""
    size = sizes.load(name)
    fields = (
        "processes_per_node", "gpu", "cpu", "memory", "shared_memory", "ephemeral_storage", "deadline_seconds",
    )  # fmt: skip
    machines = {tuple(getattr(size.training(stage), field) for field in fields) for stage in sizes.STAGES}
    assert len(machines) == 1


@pytest.mark.parametrize("name", sizes.names())
def test_an_evaluation_has_the_room_for_the_models_that_it_compares(name):
    recipe = {"tiny": 0.01, "7b": 6.9, "13b": 13.3, "33b": 33, "65b": 66}
    parameters = recipe.get(name) or TODAY[name] / 1e9
    work = sizes.load(name).work.evaluation
    disk, memory = (float(text.removesuffix("Gi")) * 2**30 for text in (work.ephemeral_storage, work.memory))
    assert disk > 4 * 2e9 * parameters
    assert memory > (2e9 if work.gpu else 4e9) * parameters
    assert not work.gpu or 2e9 * parameters < 80e9


def test_30b_is_the_other_name_of_33b():
    assert sizes.load("30B").name == "33b"


def test_an_unknown_size_names_the_nearest():
    with pytest.raises(InputError, match=r"no size '14b' \(did you mean 13b\?\); the sizes are tiny, 7b, 13b"):
        sizes.load("14b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_sice": 512}, r"bad.yaml: there is no field block_sice \(did you mean block_size\?\)"),
        ({"block_size": "long"}, "bad.yaml: block_size: 'long' where a whole number is needed"),
        ({"block_size": True}, "bad.yaml: block_size: True where a whole number is needed"),
        ({"block_size": 0}, "bad.yaml: block_size: 0 where a positive number is needed"),
        ({"validation_fraction": 1.5}, r"bad.yaml: validation_fraction: 1.5 is not in \[0, 1\)"),
        (
            {"work": {"control": {"cpu": "1", "memory": "lots", "ephemeral_storage": "1Gi", "deadline_seconds": 1}}},
            "work.control.memory: 'lots' is not a Kubernetes",
        ),
        ({"work": {"control": {"cpu": "1", "memory": "1Gi"}}}, "the field work.control.ephemeral_storage is missing"),
        ({"work": 3}, "bad.yaml: work: 3 where a mapping is needed"),
        ({"name": "other"}, "bad.yaml: name: 'other' where the file's name says 'bad'"),
    ],
    ids=["unknown", "type", "boolean", "zero", "ratio", "quantity", "missing", "mapping", "name"],
)
def test_a_wrong_field_is_named(tmp_path, change, message):
    value = yaml.safe_load((sizes.FOLDER / "tiny.yaml").read_text()) | {"name": "bad"} | change
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(value))
    with pytest.raises(InputError, match=message):
        sizes.read(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gpu", "a GPU", "sft.gpu: 'a GPU' is not a resource name"),
        ("deepspeed", "zero9", "sft.deepspeed: 'zero9'; use zero2 or zero2_offload or zero3 or none"),
        ("learning_rate", "fast", "sft.learning_rate: 'fast' where a number is needed"),
    ],
)
def test_a_wrong_field_of_a_training_is_named(tmp_path, field, value, message):
    whole = yaml.safe_load((sizes.FOLDER / "tiny.yaml").read_text()) | {"name": "bad"}
    whole["sft"] = {**whole["sft"], field: value}
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(whole))
    with pytest.raises(InputError, match=message):
        sizes.read(path)


def test_broken_yaml_is_one_line(tmp_path: Path):
    path = tmp_path / "bad.yaml"
    path.write_text("name: [")
    with pytest.raises(InputError, match=r"bad\.yaml: not a readable YAML file"):
        sizes.read(path)
