"""Every flag of the recipe's launch scripts has its row in docs/recipe-flags.md, and the options named there exist."""

import dataclasses
import re
from pathlib import Path

import pytest

from components.prepare_dataset.options import PrepareDataset
from zhllama.training.options import FinetuneOptions, PretrainOptions

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "recipe-flags.md"
FLAGS = [
    "block_size",
    "data_cache_dir",
    "dataset_dir",
    "ddp_find_unused_parameters",
    "ddp_timeout",
    "deepspeed",
    "do_eval",
    "do_train",
    "eval_steps",
    "evaluation_strategy",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "learning_rate",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "lora_alpha",
    "lora_dropout",
    "lora_rank",
    "lr_scheduler_type",
    "max_seq_length",
    "model_name_or_path",
    "modules_to_save",
    "num_train_epochs",
    "output_dir",
    "overwrite_output_dir",
    "peft_path",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "preprocessing_num_workers",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "seed",
    "tokenizer_name_or_path",
    "torch_dtype",
    "trainable",
    "validation_file",
    "validation_split_percentage",
    "warmup_ratio",
    "weight_decay",
]
"""Of run_pt.sh and run_sft.sh."""


def options_of(*kinds: type) -> set[str]:
    return {f"--{field.name.replace('_', '-')}" for kind in kinds for field in dataclasses.fields(kind)}


OPTIONS = {
    "pretrain": options_of(PretrainOptions),
    "finetune": options_of(FinetuneOptions),
    "prepare_dataset": options_of(PrepareDataset),
    "": options_of(PretrainOptions) & options_of(FinetuneOptions),
}


def rows() -> dict[str, tuple[str, str]]:
    """Flag → what stands for it here, in English and in Chinese."""
    found = re.findall(r"^\| `--(\w+)` \| (.+) \| (.+) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    return {flag: (english, chinese) for flag, english, chinese in found}


def test_every_flag_has_a_row_and_no_other_has():
    assert sorted(rows()) == FLAGS


@pytest.mark.parametrize("flag", FLAGS)
def test_the_options_in_a_row_exist(flag):
    for command in re.findall(r"`([^`]+)`", rows()[flag][0]):
        stage = command.split()[0] if not command.startswith("--") else ""
        for option in re.findall(r"--[\w-]+", command):
            assert option in OPTIONS[stage], command


def test_both_languages_name_the_same_options():
    options = {flag: [re.findall(r"`[^`]*--[^`]+`", text) for text in texts] for flag, texts in rows().items()}
    # 同左: as on the left
    assert [flag for flag, (one, other) in options.items() if rows()[flag][1] != "同左" and one != other] == []


def test_the_example_of_a_line_is_one_that_is_written():
    from zhllama.progress import duration

    (line,) = re.findall(r"^    (step .+)$", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE)
    form = r"step \d+/\d+: loss [\d.]+, lr [\d.e-]+, [\d,]+ tokens/s, MFU [\d.]+%, peak [\d.]+ GB, (.+) left"
    assert re.fullmatch(form, line)[1] == duration(720)
