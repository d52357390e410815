"""The planner's counts for the models that people start from, against transformers' own classes, on the meta device."""

import shlex
from typing import Any

import pytest
import torch

from components.launch_training.command import FinetuneArguments as Finetune
from components.launch_training.command import PretrainArguments as Pretrain
from pipelines.planner import memory
from pipelines.planner.estimate import flops_per_token
from pipelines.sizes import Architecture, record
from zhllama.errors import InputError
from zhllama.stage.command_line import parse
from zhllama.training.inputs import LoraShape, new_shape

MODELS: dict[str, tuple[Architecture, int]] = {
    "llama3.1-8b": (
        Architecture(width=4096, layers=32, heads=32, feed_forward=14_336, key_value_heads=8, rows=128_256),
        8_030_261_248,
    ),
    "llama3.2-1b": (
        Architecture(width=2048, layers=16, heads=32, feed_forward=8192, key_value_heads=8, rows=128_256, tied=True),
        1_235_814_400,
    ),
    "qwen3-8b": (
        Architecture(type="qwen3", width=4096, layers=36, heads=32, feed_forward=12_288, key_value_heads=8,
                     head_width=128, rows=151_936),
        8_190_735_360,
    ),
    "qwen3-0.6b": (
        Architecture(type="qwen3", width=1024, layers=28, heads=16, feed_forward=3072, key_value_heads=8,
                     head_width=128, rows=151_936, tied=True),
        596_049_920,
    ),
    "qwen2.5-7b": (
        Architecture(type="qwen2", width=3584, layers=28, heads=28, feed_forward=18_944, key_value_heads=4,
                     rows=152_064),
        7_615_616_512,
    ),
    "mistral-7b": (
        Architecture(type="mistral", width=4096, layers=32, heads=32, feed_forward=14_336, key_value_heads=8),
        7_241_732_096,
    ),
    "smollm2-135m": (
        Architecture(width=576, layers=30, heads=9, feed_forward=1536, key_value_heads=3, rows=49_152, tied=True),
        134_515_008,
    ),
}  # fmt: skip
TRAININGS = {
    "embeddings": "--stage embeddings",
    "lora": "--stage lora",
    "new rows": "--stage lora --embedding-rows new",
    "sft": "",
}
MORE = 1000
"""Pieces that a model is extended by."""


def transformers_model(made: Architecture, **more: Any) -> Any:
    """Of this shape, packed as it is trained, without memory."""
    import transformers

    from zhllama.training.model import packed

    said = {name: value for name, value in (made.config() | more).items() if value is not None}
    config = transformers.AutoConfig.for_model(**said)
    with torch.device("meta"):
        model = packed(made.kind.transformers)(config).requires_grad_(False)
        if made.tied:
            model.tie_weights()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_transformers_class_and_of_the_published_model(name: str) -> None:
    made, published = MODELS[name]
    setting = memory.Setting(model=made, pieces=made.rows, trains="", batch=1, block=1)
    counted = sum(weight.numel() for weight in transformers_model(made).parameters())
    assert setting.base_parameters == counted == published
    assert made.kind.parameters(made.config()) == published


def test_a_size_says_them_and_another_architecture_is_refused_by_name() -> None:
    said = {"type": "qwen3", "width": 1024, "layers": 28, "heads": 16, "feed_forward": 3072, "key_value_heads": 8,
            "head_width": 128, "rows": 151_936, "tied": True}  # fmt: skip
    assert record(Architecture, said, "x.yaml", "model.") == MODELS["qwen3-0.6b"][0]
    with pytest.raises(InputError, match=r"x\.yaml: model\.type: 'gemma2'; use llama or mistral or qwen2 or qwen3"):
        record(Architecture, said | {"type": "gemma2"}, "x.yaml", "model.")


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_trained_and_computed_is_what_the_training_counts(name: str, training: str) -> None:
    from zhllama.training.metrics import flops_per_token as logged
    from zhllama.training.model import add_lora, train_embeddings_only, trainable

    made, _ = MODELS[name]
    made = Architecture(**{**vars(made), "layers": 2})
    rows, words = made.rows + MORE, TRAININGS[training]
    given = ["--model", "-", "--dataset", "-", "--store", "-", *shlex.split(words)]
    options: Any = parse(Pretrain if words else Finetune, given)
    setting = memory.Setting.of(options, None, model=made, pieces=rows, new_rows=MORE, processes=1, block=512)
    model = transformers_model(made, vocab_size=rows)
    with torch.device("meta"):
        if training == "embeddings":
            model = train_embeddings_only(model, also_lm_head=False)
        else:
            shape: LoraShape = new_shape(options, made.kind.lora_modules, tuple(range(made.rows, rows)))
            model = add_lora(model, shape)
    assert sum(weight.numel() for weight in trainable(model).values()) == setting.trained
    assert flops_per_token(setting)[0] == pytest.approx(logged(model, 1.0), rel=2e-3)
