"""The compiled pipeline: its steps' arguments parse with the stages' own commands, and it holds no trap of KFP's."""

import ast
import dataclasses
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
from pipelines import sizes
from pipelines.adapt_llama import S3_KEYS, S3_SECRET, compile_pipeline
from pipelines.ir import read_package
from pipelines.placeholders import Surroundings, command
from pipelines.plan import Ended, Node, Plan, State, checked_arguments

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
    package = read_package(packages[size])
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


@pytest.mark.parametrize(
    ("start", "without", "more"),
    [
        ("meta weights", set(), set()),
        ("ready model", {"fetch_weights", "convert_weights"}, set()),
        ("ready tokenizer", {"train_tokenizer", "extend_tokenizer"}, {"extend_by_given"}),
        ("ready extended model", {"fetch_weights", "convert_weights", "train_tokenizer", "extend_tokenizer"}, set()),
        ("no stage 1", {"train_embeddings"}, set()),
        ("no SFT", {"prepare_instructions", "train_sft", "merge_sft", "merge_both"}, set()),
        ("generated instructions", {"prepare_instructions"}, {"generate_instructions", "prepare_generated"}),
        ("imported instructions", {"prepare_instructions"}, {"generate_instructions", "prepare_generated"}),
        ("prompts", {"generate_one"}, {"generate"}),
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


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def test_no_step_uses_kfps_cache(packages):
    spec = documents(packages["7b"])[0]
    tasks = [
        task
        for component in (*spec["components"].values(), spec["root"])
        for task in component.get("dag", {}).get("tasks", {}).values()
    ]
    steps = [task for task in tasks if "executorLabel" in spec["components"][task["componentRef"]["name"]]]
    assert len(steps) > 20
    assert {str(task.get("cachingOptions")) for task in steps} == {"{}"}


def test_no_text_is_put_together_in_the_pipeline(packages):
    """KFP's launcher fills such texts in random order; and it knows a run's placeholder only when it stands alone."""
    text = packages["7b"].read_text()
    constants = re.findall(r"constant: (.*)", text)
    assert not [constant for constant in constants if "inputs.parameters" in constant]
    placeholders = {constant for constant in constants if "{{$" in constant}
    assert placeholders == {"'{{$.pipeline_job_uuid}}'"}


def test_all_conditions_stand_in_one_pipeline(packages):
    """kfp 2.17 mixes up the groups of a pipeline and of those that it calls."""
    spec = documents(packages["7b"])[0]
    groups = [name for name, component in spec["components"].items() if "dag" in component]
    assert groups
    assert all(re.fullmatch(r"comp-(condition|condition-branches|exit-handler)-\d+", name) for name in groups)


def test_every_step_takes_its_s3_settings_from_the_secret(packages):
    spec, platform = documents(packages["7b"])
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(settings) == set(spec["deploymentSpec"]["executors"])
    for value in settings.values():
        secret = value["secretAsEnv"][0]
        assert secret["secretName"] == S3_SECRET
        assert {item["envVar"] for item in secret["keyToEnv"]} == set(S3_KEYS)
        assert secret["optional"] is True


def test_the_models_key_comes_from_a_secret_whose_name_is_a_parameter_and_goes_nowhere_else(packages):
    spec, platform = documents(packages["7b"])
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    more = {name: value["secretAsEnv"][1:] for name, value in settings.items() if len(value["secretAsEnv"]) > 1}
    assert more == {
        "exec-generate-instructions": [
            {
                "keyToEnv": [{"secretKey": "OPENAI_API_KEY", "envVar": "OPENAI_API_KEY"}],
                "secretNameParameter": {"componentInputParameter": "pipelinechannel--generate_secret"},
                "optional": True,
            }
        ]
    }
    # the graph around the step has that input, where the backend looks it up
    (around,) = [
        component
        for component in spec["components"].values()
        if "generate-instructions" in component.get("dag", {}).get("tasks", {})
    ]
    assert "pipelinechannel--generate_secret" in around["inputDefinitions"]["parameters"]
    assert spec["root"]["inputDefinitions"]["parameters"]["generate_secret"]["defaultValue"] == "zhllama-openai"


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
