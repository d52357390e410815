"""Options that cannot be meant are refused in one line, before torch is even imported."""

import json
import re

import pytest

from zhllama.errors import InputError
from zhllama.stage.options import configuration_of
from zhllama.training.options import (
    FinetuneOptions,
    PretrainOptions,
    deepspeed_settings,
    zero_stage,
)

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
        ({"lora_targets": "q_proj,lm_head"}, "lm_head is trained by rows, not by LoRA"),
        ({"stage": "embeddings", "embedding_rows": "new"}, "--embedding-rows new: --stage embeddings trains all rows"),
        ({"peak_tflops": -1.0}, "--peak-tflops -1.0"),
        ({"save_steps": -1}, "--save-steps -1"),
        ({"seed": -1}, "--seed -1"),
        ({"replay": "r", "replay_share": 1.0}, "--replay-share 1.0: a share below 1 is needed"),
        ({"replay": "r", "replay_share": -0.1}, "--replay-share -0.1: a number of at least 0 is needed"),
        ({"replay_share": 0.2}, "--replay-share 0.2: there is no replay text to do it with; give --replay"),
        ({"forgetting_budget": 0.03}, "--forgetting-budget 0.03: there is no replay text"),
        ({"forgetting_base": "b"}, "--forgetting-base b: there is no replay text"),
        ({"replay": "r", "forgetting_budget": 0.03, "eval_steps": 0}, "--eval-steps 0: a number above 0 is needed to"),
        ({"replay": "r", "faithful": True}, "--faithful True: --replay is none of the recipe's"),
        ({"ema": 1.0}, "--ema 1.0: a share below 1 is needed"),
        ({"seed": 2**32}, "--seed 4294967296: a number from 0 to 4294967295 is needed"),
        ({"deepspeed": "zero9"}, "--deepspeed zero9: no such file; give a JSON file, zero2, zero2_offload"),
    ],
)
def test_a_wrong_option_is_named(options, said):
    with pytest.raises(InputError, match=said):
        PretrainOptions(**{"stage": "lora", **PATHS, **options})


def test_what_is_not_replayed_or_averaged_leaves_the_key_as_it_was():
    kept = configuration_of(PretrainOptions(**PATHS, stage="lora"))
    assert kept.keys().isdisjoint({"replay", "replay_share", "forgetting_budget", "forgetting_base", "ema"})


def test_instruction_tuning_has_the_recipes_defaults():
    options = FinetuneOptions(**PATHS)
    assert (options.learning_rate, options.warmup_steps, options.weight_decay) == (1e-4, 0.03, 0.0)
    assert not options.train_embeddings


def test_a_deepspeed_file_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"--deepspeed zero9\.json: no such file; give a JSON file, zero2"):
        deepspeed_settings(FinetuneOptions(**PATHS, deepspeed="zero9.json"))


def test_rows_are_chosen_only_where_embeddings_are_trained():
    with pytest.raises(InputError, match="--embedding-rows new: nothing of the embeddings is trained"):
        FinetuneOptions(**PATHS, embedding_rows="new")


# --- DeepSpeed --------------------------------------------------------------------------------------------------------

RECIPE = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 100,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1e-10,
    },
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 1e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 1e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""The recipe's ds_zero2_no_offload.json."""


def test_zero2_has_every_field_of_the_recipes_configuration():
    """Beside it bf16, which the recipe does not know. DeepSpeed takes only whole numbers from 1 as min_loss_scale."""
    ours = deepspeed_settings(FinetuneOptions(**PATHS, deepspeed="zero2"))
    assert ours.pop("bf16") == {"enabled": "auto"}
    assert ours["fp16"].pop("min_loss_scale") == 1
    assert ours == {**RECIPE, "fp16": {k: v for k, v in RECIPE["fp16"].items() if k != "min_loss_scale"}}


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero2_offload", 2), ("zero3", 3), ("none", 0)])
def test_each_shipped_configuration_is_of_its_stage(name, stage):
    settings = deepspeed_settings(FinetuneOptions(**PATHS, deepspeed=name))
    assert zero_stage(settings) == stage
    assert (settings is None) == (name == "none")
    if settings is not None:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        read = DeepSpeedZeroConfig(**settings["zero_optimization"])
        assert (read.offload_optimizer is not None) == (name == "zero2_offload")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gradient_accumulation_steps": 7}, "is 7, but --gradient-accumulation-steps is 1; write auto there"),
        ({"train_micro_batch_size_per_gpu": 3}, "is 3, but --per-device-train-batch-size is 8"),
        ({"train_batch_size": 64}, "train_batch_size is 64, but the number of processes times their batch is auto"),
        ({"gradient_clipping": 0.5}, "is 0.5, but --max-grad-norm is 1.0"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true, but --precision is bfloat16"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is false, but --precision is bfloat16"),
        ({"optimizer": {"type": "AdamW"}}, "its optimizer would take the place of --learning-rate"),
        ({"scheduler": {"type": "WarmupLR"}}, "its scheduler would take the place"),
        ([], "a JSON object is needed"),
        ({"bf16": True}, "bf16 is true where an object is needed"),
        ({}, "zero_optimization names no stage of 1, 2 or 3; write one there, or give --deepspeed none"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization names no stage of 1, 2 or 3"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_options_is_refused(settings, said, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=re.escape(f"--deepspeed {path}: ") + ".*" + re.escape(said)):
        deepspeed_settings(FinetuneOptions(**PATHS, deepspeed=str(path), precision="bfloat16"))


def test_what_a_deepspeed_file_does_not_say_the_options_say(tmp_path):
    """DeepSpeed alone would end without batch sizes, not clip without a norm, and compute in float32."""
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": {"loss_scale_window": 50}}))
    assert deepspeed_settings(FinetuneOptions(**PATHS, deepspeed=str(path))) == {
        "zero_optimization": {"stage": 2},
        "fp16": {"loss_scale_window": 50, "enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def test_what_an_own_deepspeed_file_says_is_part_of_the_key(tmp_path):
    """Edited, it makes another training: nothing is skipped, and no checkpoint of the first is gone on from."""
    path = tmp_path / "own.json"
    options = PretrainOptions(**PATHS, stage="lora", deepspeed=str(path))
    said = []
    for stage in (2, 2, 3):
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}, indent=stage))
        said.append(options.more_inputs())
    assert said[0] == said[1] != said[2]
    assert said[0]["deepspeed"].reference == str(path)
    assert all(not FinetuneOptions(**PATHS, deepspeed=name).more_inputs() for name in ("none", "zero2", "zero3"))


def test_a_deepspeed_file_that_says_the_same_is_taken(tmp_path):
    path = tmp_path / "own.json"
    settings = {"gradient_accumulation_steps": 1, "bf16": {"enabled": True}, "gradient_clipping": 1.0}
    path.write_text(json.dumps({**settings, "zero_optimization": {"stage": 2}}))
    assert deepspeed_settings(FinetuneOptions(**PATHS, deepspeed=str(path), precision="bfloat16"))
