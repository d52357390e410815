"""Options that cannot be meant are refused in one line, before torch is even imported."""

import pytest

from components.shared.errors import InputError
from components.shared.training.options import FinetuneOptions, PretrainOptions, deepspeed_file

PATHS = {"store": "s", "model": "m", "dataset": "d"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_steps": 0}, "--max-steps 0: give a number of steps"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0"),
        ({"warmup_steps": 1.5}, "--warmup-steps 1.5: give whole steps"),
        ({"warmup_steps": -1.0}, "--warmup-steps -1.0"),
        ({"per_device_train_batch_size": 0}, "--per-device-train-batch-size 0"),
        ({"lora_dropout": 1.0}, "--lora-dropout 1.0"),
        ({"lora_targets": " , "}, "--lora-targets"),
        ({"stage": "embeddings", "adapter": "a"}, "--adapter a: --stage embeddings trains no adapter"),
        ({"also_lm_head": True}, "--also-lm-head"),
    ],
)
def test_a_wrong_option_is_named(options, said):
    with pytest.raises(InputError, match=said):
        PretrainOptions(**{"stage": "lora", **PATHS, **options})


def test_instruction_tuning_has_the_recipes_defaults():
    options = FinetuneOptions(**PATHS)
    assert (options.learning_rate, options.warmup_steps, options.weight_decay) == (1e-4, 0.03, 0.0)
    assert not options.train_embeddings


def test_a_shipped_deepspeed_configuration_goes_by_its_name(tmp_path):
    assert deepspeed_file("none") is None
    shipped = deepspeed_file("zero2")
    assert shipped is not None
    assert shipped.is_file()
    own = tmp_path / "mine.json"
    own.write_text("{}")
    assert deepspeed_file(str(own)) == own
    with pytest.raises(InputError, match="no such file"):
        deepspeed_file("zero9")
