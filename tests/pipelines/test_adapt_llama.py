"""The compiled pipeline: its steps' arguments parse with the stages' own commands, and it holds no trap of KFP's."""

import ast
import dataclasses
import functools
import importlib
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.shared.cli import parse
from components.shared.errors import InputError
from components.shared.training_job import POD_PLACES, S3_KEYS, S3_OPTIONAL_KEYS
from pipelines import sizes
from pipelines.adapt_llama import compile_pipeline
from pipelines.ir import read_package
from pipelines.placeholders import Surroundings, command
from pipelines.plan import Ended, Node, Plan, State, checked_arguments
from pipelines.steps import Fixed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("compiled")
    for name in sizes.names():
        compile_pipeline(name, folder / f"{name}.yaml")
    return {name: folder / f"{name}.yaml" for name in sizes.names()}


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
        job={"pipeline_job_uuid": "1234"},
    )
    assert node.component.container is not None
    return command(node.component.container.words, around)


def runs(packages: dict[str, Path], size: str, **arguments: str) -> Iterator[tuple[Node, list[str]]]:
    """Simulates a run in which every step succeeds; the steps that ran, with their commands."""
    package = read(packages[size])
    plan = Plan(
        package, checked_arguments(package, {"store": "s3://bucket/store", **arguments}), {"pipeline_job_uuid": "1234"}
    )
    ended: dict[Any, Ended] = {}
    while ready := [path for path, state in plan.at(ended).states().items() if state is State.READY]:
        moment = plan.at(ended)
        for path in ready:
            values, _ = moment.inputs(path)
            node = plan.nodes[path]
            words = words_of(node, values)
            passed = words[words.index("--value") + 1] if "forward" in node.module else f"s3://bucket/store/{node.name}"
            ended[path] = Ended(True, dict.fromkeys(node.component.output_parameters, passed))
            yield node, words


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


GENERATOR = {"generate_items": "10", "generate_base_url": "http://localhost:1/v1", "generate_model": "m"}
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
    "no SFT": given("weights", "text", run_sft="false"),
    "generated instructions": given("weights", "text", **GENERATOR),
    "generated within limits": given("weights", "text", **GENERATOR, **LIMITS),
    "imported instructions": given("weights", "text", "import_instructions"),
    "own validation": given("weights", "text", "text_validation", "instructions", "instructions_validation"),
    "prompts": given("weights", "text", "instructions", "prompts"),
    "no pre-training": given("extended_model", "text", "instructions", run_pretraining="false"),
    "going on from an adapter": given("extended_model", "text", "instructions", "lora_adapter"),
    "going on from a tuned adapter": given(
        "extended_model", "text", "instructions", "sft_adapter", run_pretraining="false"
    ),
    "served": given("weights", "text", "instructions", deploy="kserve"),
}


@pytest.mark.parametrize("arguments", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("size", ["tiny", "13b"])
def test_every_steps_arguments_parse_with_its_own_command(packages, size, arguments):
    ran = list(runs(packages, size, **arguments))
    assert {"evaluate", "cleanup_training"} <= {node.name for node, _ in ran}
    for node, words in ran:
        parsed(node, words)


def names(packages: dict[str, Path], start: str) -> set[str]:
    found = {node.name for node, _ in runs(packages, "tiny", **STARTS[start])}
    return {name for name in found if not name.startswith(("pass-on", "models-", "trainings-", "both-"))}


EVERYTHING = {
    "fetch_weights", "convert_weights", "train_tokenizer", "extend_tokenizer", "prepare_text", "prepare_instructions",
    "train_embeddings", "train_lora", "merge_lora", "train_sft", "merge_sft", "merge_both", "evaluate", "generate_one",
    "cleanup_training",
}  # fmt: skip
NO_VOCABULARY = {"fetch_weights", "convert_weights", "train_tokenizer", "extend_tokenizer"}


@pytest.mark.parametrize(
    ("start", "without", "more"),
    [
        ("meta weights", set(), set()),
        ("ready model", {"fetch_weights", "convert_weights"}, set()),
        ("ready tokenizer", {"train_tokenizer", "extend_tokenizer"}, {"extend_by_given"}),
        ("ready extended model", NO_VOCABULARY, set()),
        ("no stage 1", {"train_embeddings"}, set()),
        ("no SFT", {"prepare_instructions", "train_sft", "merge_sft", "merge_both"}, set()),
        ("generated instructions", {"prepare_instructions"}, {"generate_instructions", "prepare_generated"}),
        ("imported instructions", {"prepare_instructions"}, {"generate_instructions", "prepare_generated"}),
        ("prompts", {"generate_one"}, {"generate"}),
        ("no pre-training", {*NO_VOCABULARY, "prepare_text", "train_embeddings", "train_lora", "merge_lora"}, set()),
        ("going on from an adapter", {*NO_VOCABULARY, "train_embeddings"}, set()),
        ("served", set(), {"deploy"}),
    ],
)
def test_each_start_runs_what_it_needs_and_nothing_else(packages, start, without, more):
    assert names(packages, start) == EVERYTHING - without | more


def test_published_adapters_are_merged_and_measured_without_training(packages):
    assert names(packages, "published adapters") == {
        "fetch_weights", "convert_weights", "merge_published", "evaluate", "generate_one", "cleanup_training",
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
    assert ran["merge_both"].adapters == f"{at('train_lora')},{at('train_sft')},"
    assert ran["evaluate"].model == ran["generate_one"].model == at("merge_sft")
    assert ran["evaluate"].baseline == f"{at('convert_weights')},{at('train_embeddings')},{at('merge_lora')}"
    assert ran["evaluate"].trainings == f"{at('train_embeddings')},{at('train_lora')},{at('train_sft')}"


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
    assert served.output


def test_what_a_platform_asks_of_pods_reaches_the_served_models(packages):
    given = STARTS["served"] | {"deploy": "kserve"} | PLATFORM | PLATFORM_JSON
    (served,) = [parsed(node, words) for node, words in runs(packages, "13b", **given) if node.name == "deploy"]
    asked = {**PLATFORM, **PLATFORM_JSON}
    for name in ("gpu_resource", "s3_secret", "pull_secret", "proxy_secret", "ca_config_map", "labels"):
        assert getattr(served, name) == asked[name]
    assert (served.node_selector, served.tolerations) == (asked["gpu_node_selector"], asked["gpu_tolerations"])
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
        if node.name.startswith("train_") and node.module == "launch_training"
    ]
    assert len(ran) == 3
    of_job = {"training_account": "service_account"}
    for config in ran:
        for name, value in (PLATFORM | PLATFORM_JSON).items():
            field = of_job.get(name, re.sub("^(training|gpu)_(?!resource)", "", name))
            assert str(getattr(config, field)) == value, name


@pytest.mark.parametrize("size", sizes.names())
def test_defaults_come_from_the_size(packages, size):
    of = sizes.load(size)
    trainings = {
        node.name: words
        for node, words in runs(packages, size, **STARTS["meta weights"])
        if node.name.startswith("train_")
    }
    for stage in sizes.STAGES:
        words = trainings[f"train_{stage}"]
        options = dict(itertools.pairwise(words))
        machine = of.training(stage)
        assert options["--max-steps"] == str(machine.steps)
        assert float(options["--learning-rate"]) == machine.learning_rate
        assert options["--per-device-train-batch-size"] == str(machine.batch)
        assert (options["--nodes"], options["--memory"]) == (str(machine.nodes), machine.memory)
        assert f"--arguments={machine.arguments}" in words


def test_two_compiles_give_the_same_bytes(packages, tmp_path):
    """In another process, where strings hash differently."""
    path = tmp_path / "again.yaml"
    subprocess.run(
        [sys.executable, "-m", "pipelines", "compile", "--size", "13b", "-o", path], check=True, capture_output=True
    )
    assert path.read_bytes() == packages["13b"].read_bytes()


@functools.cache
def documents(path: Path) -> list[Any]:
    return list(yaml.load_all(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def tasks_of(spec: Any) -> list[Any]:
    return [
        task
        for component in (*spec["components"].values(), spec["root"])
        for task in component.get("dag", {}).get("tasks", {}).values()
    ]


def test_no_step_uses_kfps_cache(packages):
    spec = documents(packages["7b"])[0]
    steps = [task for task in tasks_of(spec) if "executorLabel" in spec["components"][task["componentRef"]["name"]]]
    assert len(steps) > 20
    assert {str(task.get("cachingOptions")) for task in steps} == {"{}"}


RESOURCES = {"cpu_limit", "cpu_request", "memory_limit", "memory_request", "accelerator_count", "accelerator_type"}
"""Inputs that kfp adds to a task for each resource that is a parameter: the parameter's placeholder, alone."""


def test_no_text_is_put_together_in_the_pipeline(packages):
    """KFP's launcher fills such texts in random order; and it knows a run's placeholder only when it stands alone."""
    for task in tasks_of(documents(packages["7b"])[0]):
        for name, source in task.get("inputs", {}).get("parameters", {}).items():
            constant = str(source.get("runtimeValue", {}).get("constant", ""))
            if name in RESOURCES:
                assert re.fullmatch(r"{{\$\.inputs\.parameters\['pipelinechannel--\w+'\]}}", constant)
            elif "{{$" in constant:
                assert constant == "{{$.pipeline_job_uuid}}"


def test_all_conditions_stand_in_one_pipeline(packages):
    """kfp 2.17 mixes up the groups of a pipeline and of those that it calls."""
    spec = documents(packages["7b"])[0]
    groups = [name for name, component in spec["components"].items() if "dag" in component]
    assert groups
    assert all(re.fullmatch(r"comp-(condition|condition-branches|exit-handler)-\d+", name) for name in groups)


# --- what KFP can set on a step ---------------------------------------------------------------------------------------


def executors(path: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Executor → its container, and its Kubernetes settings ({} where there are none)."""
    spec, platform = documents(path)
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {
        name: (value["container"], settings.get(name, {}))
        for name, value in spec["deploymentSpec"]["executors"].items()
    }


def parameter_of(source: dict[str, Any]) -> str:
    """The pipeline's parameter that a setting reads."""
    return source["componentInputParameter"].removeprefix("pipelinechannel--")


def kind_of(name: str) -> str:
    """What kind of step an executor is, by its component."""
    stage = re.sub(r"-\d+$", "", name.removeprefix("exec-"))
    kinds = {
        "control": ("forward", "join", "cleanup-training", "launch-training"),
        "weights": ("convert-weights", "extend-tokenizer", "merge-adapters"),
        "evaluation": ("evaluate", "generate"),
    }
    return next((kind for kind, stages in kinds.items() if stage in stages), "data")


EVERY_EXECUTOR = pytest.mark.parametrize("size", sizes.names())


@EVERY_EXECUTOR
def test_every_step_has_what_kfp_can_set(packages, size):
    found = executors(packages[size])
    assert len(found) > 40
    for name, (container, settings) in found.items():
        assert settings["securityContext"] == {"runAsNonRoot": True, "runAsUser": "65532"}, name
        assert settings["podMetadata"]["labels"]["sidecar.istio.io/inject"] == "false"
        assert settings["podMetadata"]["labels"]["zhllama.io/size"] == size
        assert [parameter_of(one["secretNameParameter"]) for one in settings["imagePullSecret"]] == ["pull_secret"]
        (authorities,) = settings["configMapAsVolume"]
        assert parameter_of(authorities["configMapNameParameter"]) == "ca_config_map"
        assert (authorities["optional"], authorities["mountPath"]) == (True, "/etc/zhllama-ca")
        (scratch,) = settings["emptyDirMounts"]
        assert scratch["mountPath"] == "/tmp"
        assert scratch["sizeLimit"] == getattr(sizes.load(size).work, kind_of(name)).ephemeral_storage
        environment = {item["name"]: item["value"] for item in container["env"]}
        assert environment == {**POD_PLACES, "ZHLLAMA_CA": "/etc/zhllama-ca"}
        assert all(value == "/tmp" or value.startswith("/tmp/") for value in POD_PLACES.values())


@EVERY_EXECUTOR
def test_every_step_asks_for_what_it_may_use_by_texts_that_are_parameters(packages, size):
    spec = documents(packages[size])[0]
    for name, (container, _) in executors(packages[size]).items():
        kind = kind_of(name)
        resources = container["resources"]
        for resource in ("Cpu", "Memory"):
            wanted = f"{{{{$.inputs.parameters['pipelinechannel--{kind}_{resource.lower()}']}}}}"
            assert resources[f"resource{resource}Request"] == resources[f"resource{resource}Limit"] == wanted
        gpu = kind == "evaluation" and sizes.load(size).work.evaluation.gpu
        assert ("accelerator" in resources) == gpu
        if gpu:
            assert "evaluation_gpus" in resources["accelerator"]["resourceCount"]
            assert "gpu_resource" in resources["accelerator"]["resourceType"]
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    for name in inputs:
        if re.search(r"_(cpu|memory|gpus|storage)$", name) and not name.startswith("serve_"):
            assert inputs[name]["parameterType"] == "STRING", f"KFP's driver drops {name} unless it is a text"


@EVERY_EXECUTOR
def test_steps_are_placed_with_their_own_kind(packages, size):
    for name, (_, settings) in executors(packages[size]).items():
        on_gpu = "gpu_" if kind_of(name) == "evaluation" and sizes.load(size).work.evaluation.gpu else ""
        assert parameter_of(settings["nodeSelector"]["nodeSelectorJson"]) == f"{on_gpu}node_selector"
        assert [parameter_of(one["tolerationJson"]) for one in settings["tolerations"]] == [f"{on_gpu}tolerations"]


@EVERY_EXECUTOR
def test_every_step_but_those_that_wait_in_a_queue_has_a_deadline(packages, size):
    for name, (_, settings) in executors(packages[size]).items():
        wanted = str(getattr(sizes.load(size).work, kind_of(name)).deadline_seconds)
        waits = name.startswith("exec-launch-training")
        assert settings.get("activeDeadlineSeconds") == (None if waits else wanted), name


def test_secrets_reach_steps_by_names_that_are_parameters_and_may_be_absent(packages):
    spec = documents(packages["7b"])[0]
    more = {"exec-generate-instructions": "generate_secret", "exec-deploy": "serve_secret"}
    keys = {
        "s3_secret": {*S3_KEYS, *S3_OPTIONAL_KEYS},
        "proxy_secret": {"HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"},
        "generate_secret": {"OPENAI_API_KEY"},
        "serve_secret": {"ZHLLAMA_API_KEY"},
    }
    for name, (_, settings) in executors(packages["7b"]).items():
        found = {parameter_of(one["secretNameParameter"]): one for one in settings["secretAsEnv"]}
        assert set(found) == {"s3_secret", "proxy_secret"} | ({more[name]} if name in more else set())
        for parameter, secret in found.items():
            assert {item["envVar"] for item in secret["keyToEnv"]} == keys[parameter]
            # the key of a server that asks for one must be there
            assert bool(secret.get("optional")) == (parameter != "serve_secret")
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    for name in (*keys, "pull_secret", "ca_config_map"):
        assert inputs[name]["defaultValue"], f"KFP's driver fails on an empty {name}"


def test_a_step_in_a_branch_gets_what_its_settings_read(packages):
    """The backend looks a setting's parameter up in the graph around the step, by the name that the graph gives it."""
    spec = documents(packages["7b"])[0]
    settings = {name: value for name, (_, value) in executors(packages["7b"]).items()}

    def parameters_in(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if "componentInputParameter" in value:
                yield value["componentInputParameter"]
            for inner in value.values():
                yield from parameters_in(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from parameters_in(inner)

    seen = 0
    for around in (*spec["components"].values(), spec["root"]):
        for task in around.get("dag", {}).get("tasks", {}).values():
            label = spec["components"][task["componentRef"]["name"]].get("executorLabel")
            if label is not None:
                seen += 1
                assert set(parameters_in(settings[label])) <= set(around["inputDefinitions"]["parameters"])
    assert seen == len(settings)


def test_what_is_fixed_when_it_is_compiled(tmp_path):
    fixed = Fixed(run_as_user=None, labels={"team": "nlp"}, annotations={"a/b": "c"}, pull_policy="Always")
    compile_pipeline("tiny", tmp_path / "p.yaml", fixed)
    for _, settings in executors(tmp_path / "p.yaml").values():
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
def test_a_wrong_parameter_is_refused_with_the_nearest_right_one(packages, name, value, message):
    with pytest.raises(InputError, match=message):
        checked_arguments(read(packages["7b"]), {"store": "s3://bucket/store", name: value})


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
