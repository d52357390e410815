"""The compiled pipeline: its steps' arguments parse with the stages' own commands, and it holds no trap of KFP's."""

import ast
import dataclasses
import functools
import importlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.launch_training.component import launch_training
from pipelines import sizes
from pipelines.adapt_llama import compile_pipeline
from pipelines.configuration import configure
from pipelines.local.ir import read_package
from pipelines.local.placeholders import Surroundings, command
from pipelines.local.plan import Ended, Node, Plan, Snapshot, State, checked_arguments
from tests.pipelines.kubeflow import kfp_driver
from tests.pipelines.kubeflow.workflow_size import LIMIT, workflow_bytes
from zhllama.errors import InputError
from zhllama.mounted_secrets import KEY_FOLDER, MODEL_FOLDER, PROXY_FOLDER, S3_FOLDER
from zhllama.stage.command_line import parse
from zhllama.stage.tls import CA_FOLDER

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> "Packages":
    return Packages(tmp_path_factory.mktemp("compiled"))


class Packages:
    """Compiled pipelines: `packages["7b"]` of a size as it is, `packages("7b", deploy="kserve")` with settings."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[Any, Path] = {}

    def __getitem__(self, size: str) -> Path:
        return self(size)

    def __call__(self, size: str, **settings: str) -> Path:
        key = (size, *sorted(settings.items()))
        if key not in self._made:
            self._made[key] = self._folder / f"{len(self._made)}.yaml"
            compile_pipeline(configure(size, settings), self._made[key])
        return self._made[key]


def config_of(module: str) -> type:
    """The dataclass that `python -m components.<module>` parses: train_tokenizer's is TrainTokenizer."""
    name = "".join(word.capitalize() for word in module.split(".")[-1].split("_"))
    path = ROOT / "components" / module.replace(".", "/")
    if not path.is_dir():
        return getattr(importlib.import_module(f"components.{module}"), name)
    for node in ast.walk(ast.parse((path / "__main__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"components.{module}."):
            return getattr(importlib.import_module(str(node.module)), name)
    raise AssertionError(f"{module}: its command imports no module of its own")


read = functools.cache(read_package)


def words_of(node: Node, values: dict[str, Any]) -> list[str]:
    around = Surroundings(
        parameters=values,
        output_parameters={name: f"/out/{name}" for name in node.component.output_parameters},
        output_artifacts={name: f"/out/{name}" for name in node.component.output_artifacts},
        output_file="/out/executor_output.json",
    )
    return command(node.component.words, around)


def runs(packages: Packages, size: str, **settings: str) -> Iterator[tuple[Node, list[str]]]:
    """Simulates a run in which every step succeeds; the steps that ran, with their commands."""
    package = read(packages(size, store="s3://bucket/store", **settings))
    plan = Plan(package, checked_arguments(package, {}), {"pipeline_job_uuid": "1234"})
    ended: dict[Any, Ended] = {}
    while ready := [path for path, state in Snapshot(plan, ended).states.items() if state is State.READY]:
        moment = Snapshot(plan, ended)
        for path in ready:
            values, _ = moment.inputs(path)
            node = plan.nodes[path]
            made = f"s3://bucket/store/{node.name}"
            ended[path] = Ended(True, dict.fromkeys(node.component.output_parameters, made))
            yield node, words_of(node, values)


def parsed(node: Node, words: list[str]) -> Any:
    """The configuration that the step's command makes of its arguments; a training's own options are checked too."""
    arguments, training = words[words.index("-m") + 2 :], []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, training = arguments[:cut], arguments[cut + 1 :]
    config = parse(config_of(node.module), arguments)
    return dataclasses.replace(config, training=tuple(training)) if training else config


def given(*names: str, **more: str) -> dict[str, str]:
    """Pipeline arguments: an address for each name."""
    return {name: f"s3://bucket/{name}" for name in names} | more


GENERATOR: dict[str, str] = {
    "generate_items": "10",
    "generate_base_url": "http://localhost:1/v1",
    "generate_model": "m",
}
LIMITS = {
    "generate_max_cost": "5", "generate_max_tokens": "1000000", "generate_price_prompt": "0.15",
    "generate_price_answer": "0.6", "generate_requests_per_minute": "60", "generate_batch": "true",
    "generate_seeds": "s3://bucket/seeds", "generate_against": "s3://bucket/a,s3://bucket/b",
}  # fmt: skip
STARTS = {
    "meta weights": given("weights", "text", "instructions"),
    "ready model": given("model", "text", "instructions"),
    "ready tokenizer": given("weights", "chinese_tokenizer", "text", "instructions"),
    "ready extended model": given("extended_model", "text", "instructions"),
    "published adapters": given("weights", "text", adapters="s3://bucket/a,s3://bucket/b"),
    "no stage 1": given("weights", "text", "instructions", run_stage1="false"),
    "vocabulary kept": given("weights", "text", "instructions", tokenizer="keep"),
    "merges continued": given("weights", "text", "instructions", tokenizer="continue"),
    "instruction tuning alone": given("model", "instructions", tokenizer="keep", run_pretraining="false"),
    "no SFT": given("weights", "text", run_sft="false"),
    "generated instructions": given("weights", "text", **GENERATOR),
    "generated within limits": given("weights", "text", **GENERATOR, **LIMITS),
    "imported instructions": given("weights", "text", "import_instructions"),
    "own validation": given("weights", "text", "text_validation", "instructions", "instructions_validation"),
    "prompts": given("weights", "text", "instructions", "prompts"),
    "measured text replayed": given("weights", "text", "instructions", "english_text"),
    "own text replayed": given("weights", "text", "instructions", replay="own", forgetting_budget="0.03", ema="0.9"),
    "no pre-training": given("extended_model", "text", "instructions", run_pretraining="false"),
    "going on from an adapter": given("extended_model", "text", "instructions", "lora_adapter"),
    "going on from a tuned adapter": given(
        "extended_model", "text", "instructions", "sft_adapter", run_pretraining="false"
    ),
    "served": given("weights", "text", "instructions", deploy="kserve"),
}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("size", ["tiny", "13b"])
def test_every_steps_arguments_parse_with_its_own_command(packages, size, arguments):
    ran = list(runs(packages, size, **arguments))
    assert {"evaluate", "cleanup_training"} <= {node.name for node, _ in ran}
    for node, words in ran:
        parsed(node, words)


def names(packages: Packages, start: str) -> set[str]:
    return {node.name for node, _ in runs(packages, "tiny", **STARTS[start])}


EVERYTHING = {
    "fetch_weights", "convert_weights", "train_tokenizer", "extend_tokenizer", "prepare_text", "prepare_instructions",
    "train_embeddings", "train_lora", "merge_lora", "train_sft", "merge_sft", "merge_both", "evaluate", "generate",
    "cleanup_training",
}  # fmt: skip
PRETRAINING = {"prepare_text", "train_embeddings", "train_lora", "merge_lora"}
NO_VOCABULARY = {"fetch_weights", "convert_weights", "train_tokenizer", "extend_tokenizer"}


@pytest.mark.parametrize(
    ("start", "without", "more"),
    [
        ("meta weights", set(), set()),
        ("ready model", {"fetch_weights", "convert_weights"}, set()),
        ("ready tokenizer", {"train_tokenizer"}, set()),
        ("ready extended model", NO_VOCABULARY, set()),
        ("no stage 1", {"train_embeddings"}, set()),
        ("vocabulary kept", {"train_tokenizer", "extend_tokenizer", "train_embeddings"}, set()),
        ("merges continued", set(), set()),
        ("measured text replayed", set(), {"prepare_replay"}),
        ("own text replayed", set(), {"generate_replay", "prepare_replay"}),
        ("instruction tuning alone", {*NO_VOCABULARY, *PRETRAINING, "merge_both"}, set()),
        ("no SFT", {"prepare_instructions", "train_sft", "merge_sft", "merge_both"}, set()),
        ("generated instructions", {"prepare_instructions"}, {"generate_instructions", "prepare_generated"}),
        ("imported instructions", {"prepare_instructions"}, {"generate_instructions", "prepare_generated"}),
        ("prompts", set(), set()),
        ("no pre-training", {*NO_VOCABULARY, *PRETRAINING, "merge_both"}, set()),
        ("going on from an adapter", {*NO_VOCABULARY, "train_embeddings"}, set()),
        ("served", set(), {"deploy"}),
    ],
)
def test_each_start_runs_what_it_needs_and_nothing_else(packages, start, without, more):
    assert names(packages, start) == EVERYTHING - without | more


def test_published_adapters_are_merged_and_measured_without_training(packages):
    assert names(packages, "published adapters") == {
        "fetch_weights", "convert_weights", "merge_published", "evaluate", "generate", "cleanup_training",
    }  # fmt: skip


def test_the_wiring_of_the_whole_course(packages):
    ran = {node.name: parsed(node, words) for node, words in runs(packages, "tiny", **STARTS["meta weights"])}
    at = "s3://bucket/store/{}".format
    assert ran["extend_tokenizer"].model == at("convert_weights")
    assert ran["prepare_text"].tokenizer == ran["train_embeddings"].model == at("extend_tokenizer")
    assert ran["train_lora"].model == ran["merge_lora"].model == at("train_embeddings")
    assert ran["train_lora"].dataset == at("prepare_text")
    assert ran["train_sft"].model == ran["merge_sft"].model == at("merge_lora")
    assert ran["train_sft"].dataset == at("prepare_instructions")
    assert ran["merge_both"].model == at("train_embeddings")
    assert ran["merge_both"].adapters == f"{at('train_lora')},{at('train_sft')}"
    assert ran["evaluate"].model == ran["generate"].model == at("merge_sft")
    assert ran["evaluate"].baseline == f"{at('convert_weights')},{at('train_embeddings')},{at('merge_lora')}"
    assert ran["evaluate"].trainings == f"{at('train_embeddings')},{at('train_lora')},{at('train_sft')}"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", STARTS.values(), ids=STARTS)
def test_the_report_has_the_models_that_requirements_may_name(packages, arguments):
    (asked,) = [parsed(node, words) for node, words in runs(packages, "13b", **arguments) if node.name == "evaluate"]
    labels = configure("13b", arguments).shape.labels
    assert (asked.labels.split(",") if asked.labels else ["adapted"]) == labels
    assert (asked.require, asked.questions) == ("english_bits_per_byte?<=1.1*base", 200)


def test_what_is_asked_and_required_is_said_by_each_run(packages):
    more = {"questions": "20", "require": "accuracy?>=0.9"}
    (asked,) = [
        parsed(node, words)
        for node, words in runs(packages, "tiny", **STARTS["meta weights"] | more)
        if node.name == "evaluate"
    ]
    assert (asked.require, asked.questions) == ("accuracy?>=0.9", 20)
    plain = read(packages["tiny"]).root.parameters
    assert (plain["require"].default, plain["questions"].default) == ("", 0)


def test_a_vocabulary_that_is_kept_is_trained_by_lora_alone(packages):
    ran = {node.name: parsed(node, words) for node, words in runs(packages, "tiny", **STARTS["vocabulary kept"])}
    base = "s3://bucket/store/convert_weights"
    assert ran["prepare_text"].tokenizer == ran["prepare_instructions"].tokenizer == base
    assert ran["train_lora"].model == ran["merge_lora"].model == base
    assert ran["evaluate"].baseline == f"{base},s3://bucket/store/merge_lora"
    assert "--freeze-embeddings true" in ran["train_lora"].arguments
    others = {node.name: parsed(node, words) for node, words in runs(packages, "tiny", **STARTS["meta weights"])}
    assert "freeze" not in others["train_lora"].arguments


TRAINED = ("train_embeddings", "train_lora", "train_sft")


def test_text_that_is_measured_is_replayed_but_for_what_is_held_out(packages):
    ran = {node.name: parsed(node, words) for node, words in runs(packages, "tiny", **STARTS["measured text replayed"])}
    replay = "s3://bucket/store/prepare_replay"
    assert ran["prepare_replay"].text == "s3://bucket/english_text"
    assert ran["prepare_replay"].validation_fraction == 0.1
    assert ran["prepare_replay"].block_size == ran["prepare_text"].block_size
    assert [ran[name].replay for name in (*TRAINED, "prepare_replay")[:3]] == [replay] * 3
    assert ran["evaluate"].english == replay
    assert all(not ran[name].forgetting_base and "budget" not in ran[name].arguments for name in TRAINED)
    ran = {node.name: parsed(node, words) for node, words in runs(packages, "tiny", **STARTS["meta weights"])}
    assert {ran[name].replay for name in TRAINED} == {""}


def test_text_that_is_measured_stays_apart_from_text_that_is_replayed(packages):
    more = given("weights", "text", "instructions", "english_text", "replay_text", "evaluation")
    ran = {node.name: parsed(node, words) for node, words in runs(packages, "tiny", **more)}
    assert ran["prepare_replay"].text == "s3://bucket/replay_text"
    assert ran["prepare_replay"].evaluation == "s3://bucket/evaluation,s3://bucket/english_text"
    assert ran["evaluate"].english == "s3://bucket/english_text"
    measured = {node.name for node, _ in runs(packages, "tiny", **STARTS["measured text replayed"], replay="none")}
    assert "prepare_replay" not in measured


def test_the_base_writes_what_is_replayed_and_all_trainings_share_one_budget(packages):
    ran = {node.name: parsed(node, words) for node, words in runs(packages, "tiny", **STARTS["own text replayed"])}
    at = "s3://bucket/store/{}".format
    assert ran["generate_replay"].model == at("convert_weights")
    assert ran["generate_replay"].replay_documents == 2000
    assert ran["prepare_replay"].text == at("generate_replay")
    assert ran["prepare_replay"].tokenizer == at("extend_tokenizer")
    assert [ran[name].forgetting_base for name in TRAINED] == ["", at("train_embeddings"), at("train_lora")]
    assert all("--forgetting-budget 0.03 --ema 0.9" in ran[name].arguments for name in TRAINED)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"forgetting_budget": "0.03"}, r"--set forgetting_budget: nothing is replayed \(replay=none, by default\)"),
        ({"replay_share": "0.3", "replay": "none"}, "--set replay_share: nothing is replayed"),
        ({"replay": "own", "replay_text": "s3://bucket/r"}, "--set replay_text: .* does not read it"),
        ({"replay": "own", "replay_share": "1.5"}, "--set replay_share 1.5: a share below 1 is needed"),
        ({"ema": "2"}, "--set ema 2.0: a share below 1 is needed"),
        ({"replay": "theirs"}, "--set replay: 'theirs'; use auto or text or own or none"),
    ],
)
def test_what_cannot_be_replayed_is_refused_by_the_settings_name(settings, said, tmp_path):
    with pytest.raises(InputError, match=said):
        compile_pipeline(configure("tiny", STARTS["meta weights"] | settings), tmp_path / "p.yaml")


def test_merges_are_continued_from_the_models_own(packages):
    ran = {node.name: parsed(node, words) for node, words in runs(packages, "tiny", **STARTS["merges continued"])}
    assert ran["train_tokenizer"].base == ran["extend_tokenizer"].model == "s3://bucket/store/convert_weights"
    assert ran["extend_tokenizer"].chinese_tokenizer == "s3://bucket/store/train_tokenizer"
    others = {node.name: parsed(node, words) for node, words in runs(packages, "tiny", **STARTS["meta weights"])}
    assert others["train_tokenizer"].base == ""


def test_trainings_go_on_from_the_adapters_that_are_given(packages):
    for start, name in (("going on from an adapter", "train_lora"), ("going on from a tuned adapter", "train_sft")):
        ran = {node.name: parsed(node, words) for node, words in runs(packages, "tiny", **STARTS[start])}
        assert ran[name].adapter == f"s3://bucket/{name.removeprefix('train_')}_adapter"
        assert ran[name].model == "s3://bucket/extended_model"
        assert {ran[other].adapter for other in ran if other.startswith("train_")} - {ran[name].adapter} <= {""}


def test_the_served_model_is_the_adapted_one_with_the_machines_of_its_size(packages):
    more = {"deploy": "kubernetes", "serve_replicas": "3", "s3_secret": "ours", "serve_secret": "its-key"}
    more |= {"serve_openshift": "true", "serve_image": "r.example.com/vllm:1"}
    ran = {node.name: parsed(node, words) for node, words in runs(packages, "33b", **STARTS["served"] | more)}
    served = ran["deploy"]
    serving = sizes.load("33b").serving
    assert (served.model, served.deploy, served.name) == (ran["evaluate"].model, "kubernetes", "llama-33b")
    assert (served.replicas, served.gpus, served.memory) == (3, serving.gpus, serving.memory)
    assert (served.s3_secret, served.api_key_secret, served.gpu_resource) == ("ours", "its-key", serving.gpu)
    assert (served.openshift, served.vllm_image) == (True, "r.example.com/vllm:1")
    assert (served.shared_memory, served.ephemeral_storage) == (serving.shared_memory, serving.ephemeral_storage)


def test_what_a_platform_asks_of_pods_reaches_the_served_models(packages):
    given = STARTS["served"] | {"deploy": "kserve"} | PLATFORM | PLATFORM_JSON
    (served,) = [parsed(node, words) for node, words in runs(packages, "13b", **given) if node.name == "deploy"]
    asked = {**PLATFORM, **PLATFORM_JSON}
    for name in ("gpu_resource", "s3_secret", "pull_secret", "proxy_secret", "ca_config_map"):
        assert getattr(served, name) == asked[name]
    for name in ("labels", "node_selector", "tolerations"):
        assert json.loads(getattr(served, name)) == json.loads(asked.get(f"gpu_{name}", asked.get(name, "")))
    assert served.size == "13b"


PLATFORM = {
    "queue": "gpus", "priority_class": "high", "team": "nlp", "gpu_resource": "amd.com/gpu", "training_memory": "99Gi",
    "training_account": "somebody", "s3_secret": "ours", "pull_secret": "registry", "proxy_secret": "way-out",
    "ca_config_map": "authorities", "training_deadline_seconds": "77", "training_waiting_seconds": "88",
    "training_grace_seconds": "99", "training_attempts": "5",
}  # fmt: skip
PLATFORM_JSON = {
    "labels": '{"cost-centre":"42"}', "annotations": '{"a.b/c":"d"}', "gpu_node_selector": '{"pool":"gpu"}',
    "gpu_tolerations": '[{"key":"nvidia.com/gpu","operator":"Exists"}]',
}  # fmt: skip


def test_what_a_platform_asks_of_jobs_reaches_each_of_them(packages):
    ran = [
        parsed(node, words)
        for node, words in runs(packages, "13b", **STARTS["meta weights"] | PLATFORM | PLATFORM_JSON)
        if node.module == "launch_training"
    ]
    assert len(ran) == 3
    of_job = {"training_account": "service_account"}
    for config in ran:
        for name, value in (PLATFORM | PLATFORM_JSON).items():
            field = of_job.get(name, re.sub("^(training|gpu)_(?!resource)", "", name))
            found = getattr(config, field)
            same = json.loads(found) == json.loads(value) if value[0] in "{[" else str(found) == value
            assert same, name


@pytest.mark.parametrize("size", sizes.names())
def test_defaults_come_from_the_size(packages, size):
    of = sizes.load(size)
    trainings = {
        node.name: words
        for node, words in runs(packages, size, **STARTS["meta weights"])
        if node.module == "launch_training"
    }
    assert len(trainings) == (2 if of.tokenizer == "keep" else 3)
    for stage in sizes.STAGES[-len(trainings) :]:
        words = trainings[f"train_{stage}"]
        options = dict(itertools.pairwise(words))
        machine = of.training(stage)
        assert options["--max-steps"] == str(machine.steps)
        assert float(options["--learning-rate"]) == machine.learning_rate
        assert options["--per-device-train-batch-size"] == str(machine.batch)
        told = json.loads(options["--machine"])
        # what is launch_training's default anyway is left out
        assert (told.get("nodes", 1), told.get("memory", "8Gi")) == (machine.nodes, machine.memory)
        (arguments,) = (word for word in words if word.startswith("--arguments="))
        assert f"--deepspeed {machine.deepspeed}" in arguments
        assert arguments.endswith(machine.arguments)


def test_two_compiles_give_the_same_bytes(packages, tmp_path):
    """In another process, where strings hash differently."""
    path = tmp_path / "again.yaml"
    subprocess.run(
        [sys.executable, "-m", "pipelines", "compile", "--size", "13b", "-o", path], check=True, capture_output=True
    )
    assert path.read_bytes() == packages["13b"].read_bytes()


@functools.cache
def documents(path: Path) -> list[Any]:
    return list(yaml.load_all(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def tasks_of(spec: Any) -> list[Any]:
    return [
        task
        for component in (*spec["components"].values(), spec["root"])
        for task in component.get("dag", {}).get("tasks", {}).values()
    ]


def test_no_step_uses_kfps_cache(packages):
    spec = documents(packages["7b"])[0]
    steps = [task for task in tasks_of(spec) if "executorLabel" in spec["components"][task["componentRef"]["name"]]]
    assert len(steps) == 14
    assert {str(task.get("cachingOptions")) for task in steps} == {"{}"}


def test_no_text_is_put_together_in_the_pipeline(packages):
    """KFP's launcher fills such texts in random order; and it knows a run's placeholder only when it stands alone."""
    for task in tasks_of(documents(packages["7b"])[0]):
        for source in task.get("inputs", {}).get("parameters", {}).values():
            constant = str(source.get("runtimeValue", {}).get("constant", ""))
            if "{{$" in constant:
                assert constant == "{{$.pipeline_job_uuid}}"


EVERY_START = pytest.mark.parametrize("arguments", STARTS.values(), ids=STARTS)


@EVERY_START
def test_no_graph_but_the_exit_handler_and_no_condition(packages, arguments):
    """Each group is a driver's pod and a barrier; what follows it waits for all of it."""
    spec = documents(packages("7b", **arguments))[0]
    assert [name for name, component in spec["components"].items() if "dag" in component] == ["comp-exit-handler-1"]
    tasks = tasks_of(spec)
    assert all("condition" not in task.get("triggerPolicy", {}) for task in tasks)


@EVERY_START
def test_every_task_passes_each_input_of_its_component(packages, arguments):
    """KFP 2.17's driver resolves a container's arguments from the task's own inputs, and knows no default."""
    spec = documents(packages("13b", **arguments))[0]
    for task in tasks_of(spec):
        declared = spec["components"][task["componentRef"]["name"]].get("inputDefinitions", {}).get("parameters", {})
        passed = task.get("inputs", {}).get("parameters", {})
        if task["componentRef"]["name"] != "comp-exit-handler-1":
            assert set(passed) == set(declared), task["taskInfo"]["name"]


EVERYTHING_ON = {"instructions": "generate", "deploy": "kubernetes", "check_merge": "true"}


def test_with_everything_on_it_stays_small(packages):
    spec = documents(packages("7b", **EVERYTHING_ON))[0]
    assert len(spec["deploymentSpec"]["executors"]) <= 20
    assert len(packages("7b", **EVERYTHING_ON).read_bytes()) <= 200_000
    assert len(spec["root"]["inputDefinitions"]["parameters"]) <= 45
    for name in ("train-embeddings", "train-lora", "train-sft", "deploy"):
        assert len(spec["components"][f"comp-{name}"]["inputDefinitions"]["parameters"]) <= 15


def test_what_the_pipeline_knows_is_no_input(packages):
    """A default, a setting, a machine: written into the arguments; an option that says nothing is left out."""
    spec = documents(packages("7b", **EVERYTHING_ON))[0]
    for name, executor in spec["deploymentSpec"]["executors"].items():
        words = executor["container"]["args"]
        assert "" not in words, name
        for at, word in enumerate(words[:-1]):
            # each option has a value, `--` apart
            assert not (word.startswith("--") and word != "--" and "=" not in word and words[at + 1].startswith("--"))
    inputs = spec["components"]["comp-train-lora"]["inputDefinitions"]["parameters"]
    assert not inputs.keys() & {"machine", "arguments", "stage", "adapter"}


def test_a_step_shows_its_metrics_page_and_reference_and_keeps_its_manifest_in_the_store(packages):
    spec = documents(packages("7b", **EVERYTHING_ON))[0]
    kinds = {
        one["artifactType"]["schemaTitle"]
        for component in spec["components"].values()
        for one in component.get("outputDefinitions", {}).get("artifacts", {}).values()
    }
    assert kinds == {"system.Metrics", "system.HTML"}
    shown = spec["components"]["comp-train-lora"]["outputDefinitions"]
    assert (shown["artifacts"].keys(), shown["parameters"].keys()) == ({"metrics", "report"}, {"ref"})
    # in a pipeline of one's own a component has them all
    assert launch_training.component_spec.outputs.keys() == {"trained", "metrics", "report", "ref"}


def test_a_user_that_was_asked_for_stands_at_every_step(packages):
    for _, settings in executors(packages("7b", run_as_user="1234")).values():
        assert settings["securityContext"] == {"runAsNonRoot": True, "runAsUser": "1234"}


def test_the_workflow_of_a_run_is_small_at_every_size(packages):
    """Past a megabyte Argo compresses its nodes, and KFP 2.17's pages show no step any more. The estimate is 6% low.

    The whole recipe stays about 700 kB. With all that can be added, 17 steps, it does not: KFP's own are 31 kB each.
    """
    for size in sizes.names():
        # a tokenizer that is continued is told of its base
        whole = 707_000 if size in sizes.RECIPE else 715_000
        for settings, most in (({}, whole), (EVERYTHING_ON, 821_000)):
            found = workflow_bytes(packages(size, **settings), ADDRESSES)
            assert found.total <= most
            assert found.total * 1.06 < LIMIT
            assert found.stored == found.total, "nothing is compressed"
            assert {name: text.most for name, text in found.tasks.items() if text.most > 6200} == {}
            assert all(text.inputs <= 15 for text in found.tasks.values())


ADDRESSES = {
    name: f"s3://a-bucket-of-the-team/with/a/prefix/{name}"
    for name in ("store", "weights", "text", "text_validation", "english_text", "instructions_validation", "prompts")
}


@pytest.mark.parametrize(
    ("size", "arguments"),
    [
        *(pytest.param("13b", given, id=f"13b, {name}") for name, given in STARTS.items()),
        *(pytest.param(size, STARTS["meta weights"], id=size) for size in sizes.names() if size != "13b"),
    ],
)
def test_the_real_driver_resolves_every_argument(packages, size, arguments):
    """As KFP 2.17.0's does, which knows no defaults (kfp_driver.py)."""
    path = packages(size, **arguments)
    needed = documents(path)[0]["root"]["inputDefinitions"]["parameters"]
    given = {name: f"s3://bucket/{name}" for name, value in needed.items() if not value.get("isOptional")}
    assert kfp_driver.unpassed(path) == []
    resolved = kfp_driver.resolve_all(path, given)
    assert all(isinstance(word, str) for words in resolved.values() for word in words)


def test_a_step_has_one_name_everywhere(packages):
    """In the Workflow's nodes, in the names of pods, and in KFP's pages: `train_lora`, not `launch-training-2`."""
    spec = documents(packages["7b"])[0]
    inner = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert {name.replace("-", "_"): task["taskInfo"]["name"] for name, task in inner.items()} == {
        name: name for name in EVERYTHING - {"merge_both", "cleanup_training"}
    }


@pytest.mark.parametrize("size", ["tiny", "7b"])
def test_nothing_waits_for_what_it_does_not_need(packages, size):
    spec = documents(packages(size, check_merge="true"))[0]
    inner = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert "dependentTasks" not in inner["train-tokenizer"]
    assert "merge-both" not in {*inner["evaluate"]["dependentTasks"], *inner["generate"]["dependentTasks"]}
    assert inner["generate"]["dependentTasks"] == ["merge-sft"]


# --- what KFP can set on a step ---------------------------------------------------------------------------------------


def executors(path: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Executor → its container, and its Kubernetes settings ({} where there are none)."""
    spec, platform = documents(path)
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {
        name: (value["container"], settings.get(name, {}))
        for name, value in spec["deploymentSpec"]["executors"].items()
    }


def kind_of(name: str) -> str:
    """What kind of step an executor is, by its component."""
    step = name.removeprefix("exec-")
    kinds = {
        "control": ("cleanup-training", "train-embeddings", "train-lora", "train-sft"),
        "weights": ("convert-weights", "extend-tokenizer", "merge-lora", "merge-sft", "merge-both"),
        "evaluation": ("evaluate", "generate"),
    }
    return next((kind for kind, steps in kinds.items() if step in steps), "data")


EVERY_EXECUTOR = pytest.mark.parametrize("size", sizes.names())


@EVERY_EXECUTOR
def test_every_step_has_what_kfp_can_set(packages, size):
    found = executors(packages[size])
    # a vocabulary that is kept has neither a tokenizer of its own, nor an extension, nor stage 1
    assert len(found) >= (11 if sizes.load(size).tokenizer == "keep" else 14)
    for name, (container, settings) in found.items():
        # the images' own user; a restricted namespace refuses a container that does not say it
        assert settings["securityContext"] == {"runAsNonRoot": True}, name
        assert settings["podMetadata"]["labels"]["sidecar.istio.io/inject"] == "false"
        assert settings["podMetadata"]["labels"]["zhllama.io/size"] == size
        assert settings["imagePullSecret"] == [{"secretName": "zhllama-pull"}]
        if name == "exec-cleanup-training":
            # it asks the API server alone
            assert not settings.keys() & {"secretAsVolume", "configMapAsVolume"}
        else:
            (authorities,) = settings["configMapAsVolume"]
            assert authorities["configMapName"] == "zhllama-ca"
            assert (authorities["optional"], authorities["mountPath"]) == (True, CA_FOLDER)
        (scratch,) = settings["emptyDirMounts"]
        assert scratch["mountPath"] == "/tmp"
        assert scratch["sizeLimit"] == getattr(sizes.load(size).work, kind_of(name)).ephemeral_storage
        # what a pod needs beside it stands in its image
        assert "env" not in container


@EVERY_EXECUTOR
def test_every_step_asks_for_what_it_may_use(packages, size):
    for name, (container, _) in executors(packages[size]).items():
        kind = kind_of(name)
        resources = container["resources"]
        work = getattr(sizes.load(size).work, kind)
        for resource, wanted in (("Cpu", work.cpu), ("Memory", work.memory)):
            # Kubernetes asks for as much where nothing is asked for
            assert f"resource{resource}Request" not in resources
            assert resources[f"resource{resource}Limit"] == wanted
        gpu = kind == "evaluation" and sizes.load(size).work.evaluation.gpu
        assert ("accelerator" in resources) == gpu
        if gpu:
            assert resources["accelerator"]["resourceCount"] == "1"
            assert resources["accelerator"]["resourceType"] == "nvidia.com/gpu"


def test_steps_are_placed_with_their_own_kind(packages):
    placed = {
        "node_selector": '{"pool": "cpu"}', "gpu_node_selector": '{"pool": "a100"}',
        "tolerations": '[{"key": "batch", "operator": "Exists"}]',
        "gpu_tolerations": '[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]',
    }  # fmt: skip
    for size in ("13b", "65b"):
        for name, (_, settings) in executors(packages(size, **placed)).items():
            on_gpu = kind_of(name) == "evaluation" and sizes.load(size).work.evaluation.gpu
            assert settings["nodeSelector"]["labels"] == {"pool": "a100" if on_gpu else "cpu"}
            assert [one["key"] for one in settings["tolerations"]] == ["nvidia.com/gpu" if on_gpu else "batch"]


def test_an_evaluation_without_gpus_goes_to_the_other_nodes(packages):
    placed = {"node_selector": '{"pool": "cpu"}', "gpu_node_selector": '{"pool": "a100"}', "evaluation_gpus": "0"}
    container, settings = executors(packages("7b", **placed))["exec-evaluate"]
    assert settings["nodeSelector"]["labels"] == {"pool": "cpu"}
    assert "accelerator" not in container["resources"]


@EVERY_EXECUTOR
def test_every_step_but_those_that_wait_in_a_queue_has_a_deadline(packages, size):
    for name, (_, settings) in executors(packages[size]).items():
        wanted = str(getattr(sizes.load(size).work, kind_of(name)).deadline_seconds)
        waits = name in ("exec-train-embeddings", "exec-train-lora", "exec-train-sft")
        assert settings.get("activeDeadlineSeconds") == (None if waits else wanted), name


def test_secrets_reach_steps_as_files_and_may_be_absent(packages):
    more = {
        "exec-generate-instructions": {"zhllama-openai": MODEL_FOLDER}, "exec-deploy": {"zhllama-api-key": KEY_FOLDER},
    }  # fmt: skip
    for name, (container, settings) in executors(packages("7b", **EVERYTHING_ON)).items():
        assert "secretAsEnv" not in settings
        assert not any("KEY" in one["name"] for one in container.get("env", ()))
        if name == "exec-cleanup-training":
            continue
        mounted = {one["secretName"]: one for one in settings["secretAsVolume"]}
        wanted = {"zhllama-s3": S3_FOLDER, "zhllama-proxy": PROXY_FOLDER} | more.get(name, {})
        assert {secret: one["mountPath"] for secret, one in mounted.items()} == wanted
        assert all(one["optional"] for one in mounted.values())


def test_web_identity_and_no_secrets_are_no_mounts(packages):
    nothing = {"s3_secret": "none", "proxy_secret": "", "pull_secret": "", "ca_config_map": ""}
    for _, settings in executors(packages("7b", **nothing)).values():
        assert not settings.keys() & {"secretAsVolume", "imagePullSecret", "configMapAsVolume"}


def test_what_the_steps_pods_are_told(packages):
    told = {"run_as_user": "none", "step_labels": '{"team": "nlp"}', "step_annotations": '{"a/b": "c"}'}
    for _, settings in executors(packages("tiny", **told, pull_policy="Always")).values():
        assert settings["securityContext"] == {"runAsNonRoot": True}
        assert settings["podMetadata"]["labels"]["team"] == "nlp"
        assert settings["podMetadata"]["annotations"] == {"a/b": "c"}
        assert settings["imagePullPolicy"] == "Always"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gpu_toleration", "[]", r"has no such parameter \(did you mean gpu_tolerations\?\)"),
        ("priorty_class", "high", r"\(did you mean priority_class\?\)"),
        ("training_waiting_secs", "1", r"\(did you mean training_waiting_seconds\?\)"),
        ("gpu_tolerations", "nvidia.com/gpu", r"--set gpu_tolerations: .* where JSON \(list\) is needed"),
        ("labels", '["a"]', r"--set labels: .* where JSON \(struct\) is needed"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_nearest_right_one(name, value, message):
    with pytest.raises(InputError, match=message):
        configure("7b", {"store": "s3://bucket/store", name: value})


def test_every_parameter_is_explained(packages):
    inputs = documents(packages["7b"])[0]["root"]["inputDefinitions"]["parameters"]
    assert [name for name, value in inputs.items() if not value.get("description")] == []


def test_the_options_of_generation_reach_its_command(packages):
    start = STARTS["generated within limits"]
    (config,) = [
        parsed(node, words)
        for node, words in runs(packages, "tiny", **start)
        if node.module.endswith("generate_instructions")
    ]
    assert (config.max_cost, config.max_tokens, config.batch) == (5, 1_000_000, True)
    assert (config.price_prompt, config.price_answer, config.requests_per_minute) == (0.15, 0.6, 60)
    assert (config.seeds, config.against) == ("s3://bucket/seeds", "s3://bucket/a,s3://bucket/b")
