"""A run's configuration: layers, what follows from an address, what is refused before anything is compiled."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from components.launch_training.options import LaunchTraining
from components.serve.options import Serve
from pipelines import sizes
from pipelines.configuration import Configuration, check_for_cluster, configure, refuse_compiled
from pipelines.machines import fixed_arguments, serving_machine, training_machine
from pipelines.settings import MACHINE, SETTINGS
from zhllama.errors import InputError
from zhllama.stage.requirements import parse_requirements
from zhllama.training.options import PretrainOptions


@pytest.fixture
def team(tmp_path: Path) -> Path:
    return tmp_path / "team.yaml"


def parameters(told: Configuration) -> dict[str, bool]:
    """Parameters of the compiled pipeline → whether they have to be given."""
    return {setting.name: required for setting, _, required in told.parameters()}


# --- layers -----------------------------------------------------------------------------------------------------------


def test_a_set_value_stands_over_a_teams_file_and_that_over_the_size(team):
    team.write_text("lora_steps: 500\nlora_nodes: 3\nqueue: gpus\n")
    told = configure("7b", {"lora_nodes": "5"}, [team])
    assert (told["lora_steps"], told["lora_nodes"], told["queue"]) == (500, 5, "gpus")
    assert told.size.lora == dataclasses.replace(sizes.load("7b").lora, steps=500, nodes=5)
    assert told.size.sft == sizes.load("7b").sft


def test_a_later_file_stands_over_an_earlier_one(team, tmp_path):
    team.write_text("queue: gpus\nteam: nlp\n")
    other = tmp_path / "other.yaml"
    other.write_text("queue: fast\n")
    told = configure("7b", {}, [team, other])
    assert (told["queue"], told["team"]) == ("fast", "nlp")


def test_a_teams_file_may_be_written_as_a_sizes_file_is(team):
    team.write_text(
        "lora: {memory: 512Gi, steps: 100}\nwork:\n  data: {cpu: 4, memory: 8Gi}\nserving: {replicas: 3}\n"
        "adapter: {rank: 64}\ngpu_tolerations: [{key: nvidia.com/gpu, operator: Exists}]\n"
    )
    told = configure("7b", {}, [team])
    assert (told["lora_memory"], told["lora_steps"], told["data_cpu"], told["data_memory"]) == (
        "512Gi",
        100,
        "4",
        "8Gi",
    )
    assert (told["serve_replicas"], told["lora_rank"]) == (3, 64)
    assert told["gpu_tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora_stepz: 3", r"team\.yaml: there is no setting lora_stepz \(did you mean lora_steps\?\)"),
        ("lora: {memroy: 3Gi}", r"team\.yaml: lora_memroy: .*did you mean lora_memory"),
        ("lora_steps: many", r"lora_steps: 'many' where a whole number is needed"),
        ("lora_steps: 2.5", r"lora_steps: 2.5 where a whole number is needed"),
        ("run_sft: 1", r"run_sft: 1 where true or false is needed"),
        ("lora_memory: 64GB", r"lora_memory: '64GB' is not a Kubernetes quantity"),
        ("labels: [a]", r"labels: \['a'\] where a mapping is needed"),
        ("start: modle", r"start: 'modle' \(did you mean model\?\); use weights or model"),
        ("- a list", r"settings by name are needed"),
        ("a: [", r"not a readable YAML file"),
        ("lora: {memory: 1Gi}\nlora_memory: 2Gi", r"lora_memory is there twice; keep one"),
    ],
)
def test_a_wrong_file_is_one_line_with_the_files_name(team, text, said):
    team.write_text(text)
    with pytest.raises(InputError, match=said) as error:
        configure("7b", {}, [team])
    assert str(team) in str(error.value)
    assert "\n" not in str(error.value)


# --- what an address says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "start", "base", "needed"),
    [
        ({}, "weights", "weights", {"store", "weights", "text", "instructions"}),
        ({"model": ""}, "weights", "weights", {"store", "weights", "text", "instructions"}),
        ({"start": "model"}, "model", "model", {"store", "model", "text", "instructions"}),
        ({"start": "extended"}, "extended", "extended", {"store", "extended_model", "text", "instructions"}),
        ({"start": "adapters"}, "adapters", "weights", {"store", "weights", "adapters"}),
        ({"start": "adapters", "base": "model"}, "adapters", "model", {"store", "model", "adapters"}),
        (
            {"tokenizer": "given", "run_sft": "false"}, "weights", "weights",
            {"store", "weights", "chinese_tokenizer", "text"},
        ),
        ({"instructions": "import"}, "weights", "weights", {"store", "weights", "text", "import_instructions"}),
        ({"instructions": "generate"}, "weights", "weights", {"store", "weights", "text"}),
        ({"run_sft": "false"}, "weights", "weights", {"store", "weights", "text"}),
        (
            {"run_pretraining": "false", "start": "extended"}, "extended", "extended",
            {"store", "extended_model", "instructions"},
        ),
    ],
)  # fmt: skip
def test_without_addresses_a_start_needs_its_own(given, start, base, needed):
    told = configure("7b", given)
    assert (told.shape.start, told.shape.base) == (start, base)
    assert {name for name, required in parameters(told).items() if required} == needed


@pytest.mark.parametrize(
    ("given", "start", "base"),
    [
        ({"weights": "s3://w"}, "weights", "weights"),
        ({"model": "s3://m"}, "model", "model"),
        ({"extended_model": "s3://e"}, "extended", "extended"),
        ({"extended_model": "s3://e", "model": "s3://m"}, "extended", "model"),
        ({"adapters": "s3://a", "weights": "s3://w"}, "adapters", "weights"),
        ({"adapters": "s3://a", "model": "s3://m"}, "adapters", "model"),
        ({"adapters": "s3://a", "extended_model": "s3://e"}, "adapters", "extended"),
    ],
)
def test_an_address_implies_the_start(given, start, base):
    told = configure("7b", given)
    assert (told.shape.start, told.shape.base) == (start, base)
    assert all(not required for name, required in parameters(told).items() if name in given)


def test_what_set_says_of_the_start_stands_over_a_teams_file(team):
    team.write_text("weights: s3://bucket/llama\nchinese_tokenizer: s3://bucket/pieces\n")
    told = configure("7b", {"model": "s3://m", "tokenizer": "train"}, [team])
    assert (told.shape.start, told.shape.tokenizer) == ("model", "train")
    assert "chinese_tokenizer" not in parameters(told)


def test_a_vocabulary_that_is_kept_has_no_stage_1_unless_it_is_asked_for():
    told = configure("7b", {"weights": "s3://w", "tokenizer": "keep"})
    assert (told.shape.extends, told.shape.stage1, told.shape.stage2) == (False, False, True)
    assert told["lora_freeze_embeddings"] is True
    asked = {"run_stage1": "true", "lora_freeze_embeddings": "false"}
    told = configure("7b", {"weights": "s3://w", "tokenizer": "keep", **asked})
    assert (told.shape.stage1, told["lora_freeze_embeddings"]) == (True, False)
    # its vocabulary was extended before
    assert configure("qwen3-8b", {"extended_model": "s3://e"}).shape.stage1


def test_what_a_size_does_with_its_vocabulary_is_its_default():
    assert not configure("llama3.1-8b", {"weights": "s3://w"}).shape.extends
    told = configure("llama3.1-8b", {"weights": "s3://w", "tokenizer": "continue", "vocab_size": "9000"})
    assert (told.shape.extends, told.shape.stage1, told["vocab_size"]) == (True, True, 9000)
    assert configure("llama3.1-8b", {"weights": "s3://w", "chinese_tokenizer": "s3://c"}).shape.tokenizer == "given"
    with pytest.raises(InputError, match=r"--set vocab_size: llama3\.1-8b keeps its vocabulary .*tokenizer=continue"):
        configure("llama3.1-8b", {"weights": "s3://w", "vocab_size": "9000"})


def test_an_adapter_to_go_on_from_leaves_stage_1_out():
    told = configure("7b", {"extended_model": "s3://e", "lora_adapter": "s3://a"})
    assert (told.shape.stage1, told.shape.stage2) == (False, True)


def test_the_instructions_are_where_the_words_or_the_addresses_say():
    found = {
        name: configure("7b", given).shape.instructions
        for name, given in {
            "address": {"instructions": "s3://items"},
            "word": {"instructions": "import"},
            "import": {"import_instructions": "hf://datasets/a/b"},
            "model": {"generate_base_url": "http://m/v1", "generate_items": "10"},
            "none": {"run_sft": "false"},
            "measured alone": {"run_sft": "false", "instructions": "s3://items"},
        }.items()
    }
    assert found == {
        "address": "given", "word": "import", "import": "import", "model": "generate", "none": "none",
        "measured alone": "given",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"start": "weights", "model": "s3://m"},
            r"--set model: a run with start=weights, by --set start, .* does not read",
        ),
        ({"model": "s3://m", "weights": "s3://w"}, r"--set weights: a run with start=model, by --set model"),
        ({"extended_model": "s3://e", "chinese_tokenizer": "s3://c"}, r"--set chinese_tokenizer: .* does not read it"),
        ({"run_stage1": "true", "lora_adapter": "s3://a"}, r"run_stage1=true: stage 1 is left out with lora_adapter"),
        ({"tokenizer": "train", "chinese_tokenizer": "s3://c"}, r"tokenizer=train: chinese_tokenizer is given"),
        ({"import_instructions": "s3://i", "generate_base_url": "http://m"}, r"an import asks no model"),
        ({"run_sft": "false", "sft_adapter": "s3://a"}, r"--set sft_adapter: .*stage 1, stage 2, does not read it"),
        ({"start": "extended", "base": "weights"}, r"base=weights: with start=extended it is model or extended"),
        ({"nodes": "3"}, r"--set nodes: the pipeline has no such parameter"),
        ({"run_pretraining": "false", "run_stage1": "true"}, r"--set run_stage1=true: .*run_pretraining=false"),
        ({"run_pretraining": "false", "check_merge": "true"}, r"--set check_merge=true: .*run_pretraining=false"),
        ({"run_sft": "false", "check_merge": "true"}, r"--set check_merge=true: .*run_sft=false"),
        ({"run_sft": "false", "instructions": "generate"}, r"--set instructions=generate: .*run_sft=false"),
        ({"start": "adapters", "run_sft": "true"}, r"--set run_sft=true: .*start=adapters"),
        ({"adapters": "s3://a", "run_pretraining": "true"}, r"--set run_pretraining=true: .*adapters"),
        ({"start": "adapters", "instructions": "import"}, r"--set instructions=import: .*start=adapters"),
        ({"tokenizer": "keep", "chinese_tokenizer": "s3://c"}, r"tokenizer=keep: chinese_tokenizer is given"),
        ({"tokenizer": "keep", "vocab_size": "9000"}, r"--set vocab_size: .*tokenizer=keep"),
        ({"tokenizer": "given", "vocab_size": "9000"}, r"--set vocab_size: .*tokenizer=given"),
        ({"chinese_tokenizer": "s3://c", "vocab_size": "9000"}, r"--set vocab_size: .*chinese_tokenizer"),
        ({"instructions": "s3://i", "generate_model": "x"}, r"--set generate_model: .*instructions"),
    ],
)
def test_words_that_cannot_both_hold_are_refused_in_one_line(given, said):
    with pytest.raises(InputError, match=said) as error:
        configure("7b", given)
    assert "\n" not in str(error.value)


RECIPE = {name: f"s3://bucket/{name}" for name in ("store", "weights", "text", "instructions")}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"require": "accuracy"}, r"--set require accuracy: write figure<=number"),
        ({"require": "acuracy>1"}, r"--set require acuracy>1: there is no figure acuracy \(did you mean accuracy\?\)"),
        ({"require": "accuracy>1*stage 3"}, r"there is no model stage 3 .*there is base, stage 1, stage 2"),
        (
            {"require": "accuracy>1*stage 1", "run_stage1": "false"},
            r"there is no model stage 1.*there is base, stage 2",
        ),
        ({"require": "english_bits_per_byte<=1.03*base"}, r"not measured here; give english_text, or write"),
        ({"require": "facts_en>0.5", "questions": "0"}, r"facts_en is not measured here; set questions, to 200"),
        ({"require": "law_5_shots>0.5"}, r"there is no figure law_5_shots"),
        (
            {"require": "accuracy>0.8", "run_sft": "false", "instructions": ""},
            r"accuracy .*give instructions that have",
        ),
    ],
)
def test_a_requirement_that_the_run_cannot_measure_is_refused_before_it_starts(given, said):
    with pytest.raises(InputError, match=f"--set require .*{said.removeprefix('--set require ')}") as error:
        configure("7b", {**RECIPE, **given}, write=False)
    assert "\n" not in str(error.value)


def test_a_requirement_of_a_file_is_refused_by_the_file(team):
    team.write_text("require: accuracy")
    with pytest.raises(InputError, match=r"--config \S*team\.yaml: require accuracy: write figure"):
        configure("7b", {}, [team])
    team.write_text("require: english_bits_per_byte<=1.03*base")
    with pytest.raises(InputError, match=r"team\.yaml require english_bits_per_byte<=1\.03\*base: .*give english_text"):
        configure("7b", RECIPE, [team], write=False)


def test_what_a_later_run_may_measure_may_be_required_when_the_pipeline_is_compiled():
    required = "english_bits_per_byte<=1.03*base,ceval_5_shots>0.3,facts_en>0.5"
    assert configure("7b", {**RECIPE, "require": required})["require"] == required
    with pytest.raises(InputError, match="there is no model stage 3"):
        configure("7b", {**RECIPE, "require": "accuracy>1*stage 3"})


@pytest.mark.parametrize("size", sizes.names())
def test_a_sizes_own_requirement_ends_no_run_that_does_not_measure_it(size):
    told = configure(size, {**RECIPE, "run_sft": "false", "instructions": ""}, write=False)
    assert all(one.optional for one in parse_requirements(told["require"]))
    assert bool(told["require"]) is (size != "tiny")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run_pretraining: false\nrun_stage1: true", r"team\.yaml run_stage1=true: .*run_pretraining=false"),
        ("weights: s3://w\nmodel: s3://m", r"team\.yaml weights: .*start=model, by \S*team\.yaml model"),
        ("weights: s3://w\nextended_model: s3://e", r"team\.yaml weights: .*extended_model"),
        ("instructions: s3://i\nimport_instructions: s3://j", r"team\.yaml import_instructions: .*instructions"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_in_one_line(team, text, said):
    team.write_text(text)
    with pytest.raises(InputError, match=said) as error:
        configure("7b", {}, [team])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("run_stage1: true\ncheck_merge: true", {"run_pretraining": "false"}),
        ("run_sft: true\nvocab_size: 9000\ninstructions: s3://i", {"adapters": "s3://a"}),
        ("vocab_size: 9000\ngenerate_model: x", {"chinese_tokenizer": "s3://c", "instructions": "s3://i"}),
        ("instructions: generate\ncheck_merge: true\ngenerate_model: x", {"run_sft": "false"}),
        ("run_pretraining: false\nrun_stage1: true", {"run_pretraining": "true"}),
        ("weights: s3://w\nmodel: s3://m", {"start": "weights"}),
        ("instructions: s3://i\nimport_instructions: s3://j", {"instructions": "import"}),
        ("", {"model": "s3://m", "run_stage1": "false", "run_sft": "false", "check_merge": "false"}),
        ("extended_model: s3://e\nmodel: s3://m", {}),
        ("start: weights\nweights: s3://w\nmodel: s3://m", {}),
        ("base: weights\nweights: s3://w\nmodel: s3://m\nadapters: s3://a", {}),
    ],
)
def test_general_defaults_of_a_file_stand_under_a_narrower_set(team, text, given):
    team.write_text(text or "{}")
    assert configure("7b", given, [team])


def test_the_layer_that_decided_is_the_reason(team):
    team.write_text("run_sft: false\nlora_adapter: s3://a\nextended_model: s3://e\n")
    told = configure("7b", {"run_sft": "true", "run_stage1": "true", "lora_adapter": ""}, [team])
    assert told.reason("run_sft") == "run_sft=true, by --set run_sft"
    assert told.reason("run_stage1") == "run_stage1=true, by --set run_stage1"
    assert configure("7b", {}, [team]).reason("run_stage1") == f"run_stage1=false, by {team} lora_adapter"


# --- machines ---------------------------------------------------------------------------------------------------------


def test_each_training_has_its_own_machine_and_one_setting_is_for_all():
    told = configure("7b", {"training_memory": "300Gi", "lora_memory": "500Gi", "training_attempts": "7"})
    memories = {training: training_machine(told, training)["memory"] for training in sizes.STAGES}
    assert memories == {"embeddings": "300Gi", "lora": "500Gi", "sft": "300Gi"}
    assert {training_machine(told, training)["attempts"] for training in sizes.STAGES} == {7}


def test_a_sizes_sections_are_each_trainings_own(tmp_path, monkeypatch):
    text = (
        (sizes.FOLDER / "7b.yaml")
        .read_text()
        .replace("sft:\n  <<: *training", "sft:\n  <<: *training\n  memory: 111Gi")
    )
    (tmp_path / "7b.yaml").write_text(text)
    monkeypatch.setattr(sizes, "FOLDER", tmp_path)
    told = configure("7b")
    assert [training_machine(told, training)["memory"] for training in sizes.STAGES] == ["256Gi", "256Gi", "111Gi"]


def test_every_option_of_a_machine_can_be_set_for_one_training():
    fields = {field.name for field in dataclasses.fields(LaunchTraining)}
    for option in MACHINE:
        assert option in fields
        for training in sizes.STAGES:
            assert SETTINGS[f"{training}_{option}"].compiled


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"queue": "GPU_Queue"}, r"--set queue: 'GPU_Queue' must be"),
        ({"gpu_resource": "nvidia.com/gpu x"}, r"--set gpu_resource: 'nvidia.com/gpu x' is not a resource name"),
        ({"training_memory": "256GB"}, r"--set training_memory: '256GB' is not a Kubernetes quantity"),
        ({"lora_nodes": "0"}, r"--set lora_nodes: 0 must be between 1 and"),
        ({"labels": '{"a b": "c"}'}, r"label"),
        ({"gpu_tolerations": '[{"kee": "x"}]'}, r"kee"),
        (
            {"lora_min_nodes": "1", "lora_max_nodes": "4"},
            r"--set lora_min_nodes, --set lora_max_nodes with --set lora_deepspeed zero2",
        ),
        ({"lora_arguments": "--max-stepz 3"}, r"--set lora_arguments: .*there is no option --max-stepz"),
        ({"run_as_user": "0"}, r"--set run_as_user 0: write a number from 1"),
    ],
)
def test_a_machine_that_no_job_can_be_made_of_is_refused(given, said):
    with pytest.raises(InputError, match=said):
        training_machine(configure("7b", given), "lora")


def test_a_server_that_cannot_be_made_is_refused():
    with pytest.raises(InputError, match="--set serve_name"):
        serving_machine(configure("7b", {"deploy": "kserve", "serve_name": "My_Model"}))


def test_web_identity_is_asked_for_by_an_empty_secret_too():
    told = configure("7b", {"deploy": "kubernetes", "s3_secret": ""})
    assert serving_machine(told)["s3_secret"] == training_machine(told, "lora")["s3_secret"] == "none"


def test_an_adapters_own_shape_is_asked_for_by_nothing():
    told = configure("7b", {"lora_rank": "0", "lora_alpha": "0", "lora_dropout": "-1"})
    assert "--lora-r 0 --lora-alpha 0 --lora-dropout -1" in fixed_arguments(told, "lora")
    assert told.size.adapter == sizes.load("7b").adapter


def test_a_value_of_nothing_stands_over_the_sizes():
    told = configure("7b", {"lora_warmup_steps": "0", "lora_weight_decay": "0", "lora_save_steps": "0"})
    assert "--warmup-steps 0 --weight-decay 0" in (words := fixed_arguments(told, "lora"))
    assert "--save-steps 0" in words


# --- compiled packages, clusters --------------------------------------------------------------------------------------


def test_choices_are_those_that_the_steps_take():
    taken = {"deploy": (Serve, "deploy"), "backend": (LaunchTraining, "backend")}
    taken["lora_embedding_rows"] = (PretrainOptions, "embedding_rows")
    for name, (kind, field) in taken.items():
        assert get_args(get_type_hints(kind)[field]) == SETTINGS[name].choices


def test_what_needs_compiling_is_refused_of_a_compiled_package():
    with pytest.raises(InputError, match=r"--set training_memory: it is decided when a pipeline is compiled"):
        refuse_compiled(["training_memory"], ["store"], "pipeline.yaml")
    with pytest.raises(
        InputError, match=r"--set model: pipeline\.yaml was compiled for a course that does not read it"
    ):
        refuse_compiled(["model"], ["store"], "pipeline.yaml")
    refuse_compiled(["store"], ["store"], "pipeline.yaml")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"deploy": "kubernets"}, r"--set deploy: 'kubernets' \(did you mean kubernetes\?\); use none or kubernetes"),
        ({"backend": "local"}, "--set backend=local: steps of a cluster train nothing themselves"),
        ({"store": "artifacts"}, "--set store=artifacts: steps of a cluster share S3 alone"),
        ({"store": "s3://..//x"}, "--set store=s3://..//x: .*not a bucket name"),
        ({"store": ""}, "--set store=: an empty address"),
        ({"text": "s3://bucket/zh:0.9,./en:0.1"}, r"--set text: \./en:0\.1 is of this machine"),
    ],
)
def test_what_no_cluster_could_run_is_refused_before_it_is_submitted(given, said):
    check_for_cluster(configure("7b", {"store": "s3://bucket/store", "weights": "hf://owner/name", "deploy": "kserve"}))
    with pytest.raises(InputError, match=said):
        check_for_cluster(configure("7b", {"store": "s3://bucket/store", **given}))
