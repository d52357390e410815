"""The job's command: the training's own options, checked before there is a job."""

import json

import pytest

from components.launch_training.command import command_line, training_arguments
from components.launch_training.launcher import training_job
from components.launch_training.options import LaunchTraining
from zhllama.errors import InputError
from zhllama.kubernetes.job_manifest import pod_environment

PATHS = {"store": "s3://bucket/store", "model": "s3://bucket/m", "dataset": "s3://bucket/d"}


def arguments(*more: str, stage: str = "lora", adapter: str = "") -> list[str]:
    return training_arguments(stage=stage, **PATHS, adapter=adapter, output="s3://bucket/out.json", more=more)


def test_the_command_is_the_trainings_own():
    words = command_line("lora", arguments("--max-steps", "7"))
    assert words[:5] == ("python", "-m", "components.pretrain", "--stage", "lora")
    assert words[-2:] == ("--max-steps", "7")
    assert "--adapter" not in words
    assert command_line("sft", arguments(stage="sft"))[2] == "components.finetune"


def test_what_is_replayed_is_an_input_of_the_launcher():
    config = LaunchTraining(stage="lora", **PATHS, replay="s3://bucket/r", forgetting_base="s3://bucket/b")
    words = config.training_arguments("/out")
    assert words[words.index("--replay") + 1] == "s3://bucket/r"
    assert words[words.index("--forgetting-base") + 1] == "s3://bucket/b"
    with pytest.raises(InputError, match="training option --replay: it is launch_training's --replay; leave it out"):
        arguments("--replay", "s3://bucket/r")


def test_what_kfp_leaves_empty_is_not_given():
    given = arguments("--max-steps", "", "--lora-r", "4", "--lora-alpha", "", "--deepspeed=")
    assert given[-2:] == ["--lora-r", "4"]


@pytest.mark.parametrize("stage", ["embeddings", "lora", "sft"])
def test_a_step_may_pass_every_trainings_switches_when_they_are_off(stage):
    given = arguments("--train-embeddings", "false", "--also-lm-head", "False", stage=stage)
    assert ("--train-embeddings" in given) == (stage == "sft")
    assert ("--also-lm-head" in given) == (stage == "embeddings")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max-step", "3"), r"components\.pretrain: there is no option --max-step \(did you mean --max-steps\?\)"),
        (("--learning-rate", "fast"), "--learning-rate"),
        (("--model", "x"), "training option --model: it is launch_training's --model"),
        (("--output=x",), "training option --output: launch_training sets it"),
        (("--publish-checkpoint", "x"), "training option --publish-checkpoint: it trains nothing, so it needs no job"),
        (("--train-embeddings", "true"), "there is no option --train-embeddings"),
    ],
    ids=["misspelt", "no number", "the launcher's own", "set by the launcher", "no training", "another training's"],
)
def test_a_wrong_training_option_is_refused_at_once(words, said):
    with pytest.raises(InputError, match=said):
        LaunchTraining(stage="lora", training=words, **PATHS)


def test_a_deepspeed_file_that_was_edited_makes_another_job(tmp_path):
    own = tmp_path / "own.json"
    said = []
    for stage in (1, 2):
        own.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        said.append(
            LaunchTraining(stage="lora", training=("--deepspeed", str(own)), **PATHS).more_inputs()["deepspeed"]
        )
    assert said[0] != said[1]
    assert LaunchTraining(stage="lora", training=("--deepspeed", "zero2"), **PATHS).more_inputs() == {}


def test_options_come_as_one_text_too():
    config = LaunchTraining(stage="lora", arguments="--max-steps 9 --lora-targets 'q_proj, v_proj'", **PATHS)
    assert config.training_arguments("/out")[-4:] == ["--max-steps", "9", "--lora-targets", "q_proj, v_proj"]
    with pytest.raises(InputError, match="No closing quotation"):
        LaunchTraining(stage="lora", arguments="--lora-targets 'q_proj", **PATHS)


@pytest.mark.parametrize("model", ["hf://owner/name", "hf://owner/name@1a2b3c/folder", "owner/name", "s3://bucket/m"])
def test_a_reference_that_the_training_takes_is_handed_on_unchanged(model):
    config = LaunchTraining(stage="lora", **{**PATHS, "model": model, "adapter": "hf://owner/adapter"})
    words = config.training_arguments("/out")
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert (given["--model"], given["--adapter"]) == (model, "hf://owner/adapter")


def test_a_folder_is_handed_on_with_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for model in ("models/zh", "./models/zh", f"file://{tmp_path}/models/zh"):
        words = LaunchTraining(stage="lora", **{**PATHS, "model": model}).training_arguments("/out")
        assert words[words.index("--model") + 1] == str(tmp_path / "models" / "zh")


def test_a_job_that_reads_the_hub_may_ask_it_where_the_launcher_does(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.com")
    for model, said in (("hf://owner/name", ("0", "https://hub.example.com")), ("s3://bucket/m", ("1", None))):
        config = LaunchTraining(stage="lora", **{**PATHS, "model": model})
        found = pod_environment(training_job(config, "k" * 32, ("python",), 1), 0)
        assert (found["HF_HUB_OFFLINE"], found.get("HF_ENDPOINT")) == said
