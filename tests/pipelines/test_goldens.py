"""What `zhllama compile` and `zhllama render` write stays: `goldens/compiled.json` and `goldens/renders/`.

By the command line alone, so that they hold while code moves. `UPDATE_GOLDENS=1 pytest tests/pipelines/test_goldens.py`
writes them again.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import golden

ROOT = Path(__file__).resolve().parents[2]
SIZES = ("tiny", "7b", "13b", "33b", "65b")


def zhllama(*words: str, tree: Path = ROOT) -> str:
    """What the command prints, with nothing in its environment that would change it."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("ZHLLAMA_", "KFP_"))}
    kept["PYTHONPATH"] = str(tree)
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *words], cwd=tree, env=kept, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- compiled pipelines -----------------------------------------------------------------------------------------------

STORE = {"store": "s3://team/store"}
RECIPE = {**STORE, "weights": "s3://team/llama", "text": "s3://team/text", "instructions": "s3://team/items"}
COMPILED: dict[str, tuple[str, dict[str, str], list[str]]] = {
    **{f"{size}, the recipe": (size, RECIPE, []) for size in SIZES},
    "from a ready model": ("7b", {**RECIPE, "weights": "", "model": "s3://team/model"}, []),
    "from an extended model, compared with its base": (
        "7b",
        {**RECIPE, "weights": "", "extended_model": "s3://team/extended", "model": "s3://team/model"},
        [],
    ),
    "published adapters on weights": (
        "7b",
        {**STORE, "weights": "s3://team/llama", "adapters": "s3://team/lora,s3://team/sft", "text": "s3://team/text"},
        [],
    ),
    "a Chinese tokenizer that is given, no stage 1": (
        "13b", {**RECIPE, "chinese_tokenizer": "s3://team/chinese", "run_stage1": "false"}, [],
    ),
    "instructions imported, no pre-training": (
        "7b",
        {**STORE, "weights": "s3://team/llama", "run_pretraining": "false", "import_instructions": "s3://team/public",
         "text": "s3://team/text"},
        [],
    ),
    "instructions written by a model": (
        "7b",
        {**STORE, "weights": "s3://team/llama", "text": "s3://team/text", "generate_items": "1000",
         "generate_base_url": "https://api.example.com/v1", "generate_model": "writer"},
        [],
    ),
    "no instruction tuning": ("7b", {**RECIPE, "instructions": "", "run_sft": "false"}, []),
    "everything on": (
        "7b",
        {**RECIPE, "check_merge": "true", "deploy": "kserve", "expect": "s3://team/sums.txt", "exams": "s3://team/ceval",
         "english_text": "s3://team/en", "prompts": "s3://team/prompts.txt", "text_validation": "s3://team/held-out",
         "instructions_validation": "s3://team/held-out-items", "evaluation": "s3://team/evaluation",
         "skip_bad": "true", "drop_near_duplicates": "true", "lora_embedding_rows": "new",
         "lora_embedding_learning_rate": "0.00005", "queue": "team-queue", "priority_class": "high", "team": "nlp",
         "training_attempts": "5", "gpu_tolerations": '[{"key": "nvidia.com/gpu", "operator": "Exists"}]',
         "gpu_node_selector": '{"pool": "a100"}', "node_selector": '{"zone": "one"}', "labels": '{"cost": "42"}',
         "annotations": '{"example.com/why": "golden"}'},
        ["--registry", "registry.example.com/team", "--label", "step=golden", "--pull-policy", "Always"],
    ),
    "elastic trainings of stage 2": (
        "7b", {**RECIPE, "lora_min_nodes": "1", "lora_max_nodes": "4", "lora_arguments": "--deepspeed none"}, [],
    ),
    "openshift, another namespace": (
        "7b",
        {**RECIPE, "deploy": "kubernetes", "serve_openshift": "true", "namespace": "team", "s3_secret": "none",
         "training_account": "trainer"},
        ["--run-as-user", "none"],
    ),
}  # fmt: skip


def tasks(components: dict[str, Any], dag: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every task of a DAG and, after it, those of the DAG that it is."""
    for name, task in dag["tasks"].items():
        yield name, task
        inner = components[task["componentRef"]["name"]].get("dag")
        if inner:
            yield from tasks(components, inner)


def source(given: dict[str, Any]) -> str:
    """Where a task's input comes from, in a word."""
    if "taskOutputParameter" in given:
        return "{producerTask}.{outputParameterKey}".format(**given["taskOutputParameter"])
    if "componentInputParameter" in given:
        return "run's " + given["componentInputParameter"].removeprefix("pipelinechannel--")
    return str(given["runtimeValue"]["constant"])


def without_twins(resources: dict[str, Any]) -> dict[str, Any]:
    """KFP says each figure twice: as its author wrote it, and as a number."""
    return {name: figure for name, figure in resources.items() if name.startswith(("resource", "accelerator"))}


def pairs(arguments: list[str]) -> list[str]:
    """An option and its value in one text."""
    found: list[str] = []
    for one in arguments:
        if one.startswith("--") or not found or " " in found[-1]:
            found.append(one)
        else:
            found[-1] += f" {one}"
    return found


def pipeline(package: Path) -> dict[str, Any]:
    """Its parameters and its steps, as a cluster would run them; steps whose pods are alike name them once."""
    spec, platform = list(yaml.safe_load_all(package.read_text(encoding="utf-8")))
    executors = spec["deploymentSpec"]["executors"]
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    steps, alike = {}, dict[str, list[str]]()
    for name, task in tasks(spec["components"], spec["root"]["dag"]):
        label = spec["components"][task["componentRef"]["name"]].get("executorLabel")
        step = {
            "after": task.get("dependentTasks", []),
            "inputs": {key: source(given) for key, given in task.get("inputs", {}).get("parameters", {}).items()},
            "when": {key: task[key] for key in ("triggerPolicy", "retryPolicy", "parameterIterator") if key in task},
        }
        if label:
            container = executors[label]["container"]
            step |= {
                "image": container["image"],
                "command": " ".join(container["command"]),
                "arguments": pairs(container["args"]),
                "environment": {one["name"]: one["value"] for one in container.get("env", [])},
                "resources": without_twins(container["resources"]),
            }
            # KFP names each secret twice, the second time as a parameter
            pod = sorted(line for line in golden.lines_of(pods[label]) if "Parameter/" not in line)
            alike.setdefault(" | ".join(pod), []).append(name)
        steps[name] = {key: held for key, held in step.items() if held}
    parameters = {
        name: f"{one['parameterType']} {one.get('defaultValue', 'required')}"
        for name, one in spec["root"]["inputDefinitions"]["parameters"].items()
    }
    return {
        "parameters": parameters,
        "steps": steps,
        "pods": {", ".join(sorted(names)): pod.split(" | ") for pod, names in alike.items()},
    }


@pytest.mark.parametrize("name", COMPILED)
def test_a_configuration_compiles_to_the_same_steps(name, tmp_path):
    size, settings, options = COMPILED[name]
    package = tmp_path / "pipeline.yaml"
    told = [word for pair in settings.items() for word in ("--set", "=".join(pair))]
    zhllama("compile", "--size", size, "--tag", "golden", *told, *options, "--output", str(package))
    golden.check(golden.GOLDENS / "compiled.json", name, pipeline(package))


# --- manifests for kubectl --------------------------------------------------------------------------------------------

RENDERS = golden.GOLDENS / "renders"
QUEUED = "--queue team --priority-class high"
TRAINED = "--model s3://team/model/manifest.json --dataset s3://team/data/manifest.json --store s3://team/store"
PLACED = (
    "--label team=nlp --node-selector pool=a100 --toleration nvidia.com/gpu:NoSchedule --s3-port 8333 "
    "--s3-namespace storage --pull-secret registry --proxy-secret proxy --ca-config-map certificates"
)
RENDERED = {
    **{
        f"{api}-{size}-{stage}": f"{api} --size {size} --stage {stage} {TRAINED}"
        for api in ("pytorchjob", "trainjob")
        for size, stage in (("tiny", "embeddings"), ("7b", "lora"), ("65b", "sft"))
    },
    "pytorchjob-two-nodes-queue": f"pytorchjob --size 7b --stage lora {TRAINED} --nodes 2 {QUEUED}",
    "trainjob-two-nodes-queue": f"trainjob --size 7b --stage lora {TRAINED} --nodes 2 {QUEUED}",
    "pytorchjob-elastic": (
        f"pytorchjob --size 13b --stage sft {TRAINED} --min-nodes 1 --max-nodes 4 --arguments=--deepspeed=none "
        "--adapter s3://team/adapter/manifest.json"
    ),
    "pytorchjob-openshift": f"pytorchjob --size 7b --stage sft {TRAINED} --openshift --s3-secret none --namespace team",
    "pytorchjob-placed": f"pytorchjob --size 33b --stage embeddings {TRAINED} {PLACED} --grace-seconds 60",
    "trainjob-openshift-placed": f"trainjob --size 33b --stage lora {TRAINED} {PLACED} --openshift --name golden",
    **{f"serving-{size}": f"serving --size {size}" for size in ("7b", "13b", "65b")},
    "serving-kserve": "serving --size 7b --kserve --model s3://team/model --replicas 2",
    "serving-openshift": "serving --size 33b --openshift --replicas autoscaled --pod-monitor --stop-first",
    "serving-placed": f"serving --size 7b {PLACED} --namespace team --api-key-secret key --vllm-image registry/vllm:1",
    "serving-kserve-openshift": "serving --size 13b --kserve --openshift --s3-secret none --pod-monitor",
    "base": "base",
    "base-in-a-profile": "base --namespace team --without-namespace --components deployer,kueue,quota,reaper",
    "base-alone": "base --components=",
}  # fmt: skip


@pytest.mark.parametrize("name", RENDERED)
def test_a_manifest_stays(name):
    images = ["--registry", "registry.example.com/team", "--tag", "golden"]
    text = zhllama("render", *RENDERED[name].split(), *images)
    file = RENDERS / f"{name}.yaml"
    if golden.updating():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    said = golden.difference(documents(file.read_text()), documents(text))
    assert not said, f"not as in {file.name} (UPDATE_GOLDENS=1 writes it again):\n{said}"


def documents(text: str) -> dict[str, Any]:
    """Kind/name → the object, in the order in which they stand."""
    found: dict[str, Any] = {}
    for one in yaml.safe_load_all(text):
        name = f"{one['kind']}/{one.get('metadata', {}).get('name', '')}"
        assert name not in found, f"{name} is there twice"
        found[name] = one
    return found


def test_fresh_secrets_have_the_same_fields():
    secrets = documents(zhllama("render", "dev-secrets"))
    for one in secrets.values():
        for held in ("data", "stringData"):
            one.update({held: dict.fromkeys(one[held], "…")} if held in one else {})
    golden.check(golden.GOLDENS / "rendered.json", "dev-secrets", secrets)


def test_the_examples_of_the_tree_are_written_again_as_they_were(tmp_path):
    """In a copy of the tree; of each object its digest, since k8s/ itself shows what changed."""
    for folder in ("components", "pipelines", "zhllama", "k8s", "docs"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    paths = [Path(line) for line in zhllama("render", "all", tree=tmp_path).split()]
    written = {}
    for path in paths:
        name = str(path.relative_to(tmp_path) if path.is_absolute() else path)
        objects = documents((tmp_path / name).read_text()) if path.suffix == ".yaml" else {}
        written[name] = {
            key: sha256(json.dumps(one, sort_keys=True).encode()).hexdigest()[:16] for key, one in objects.items()
        }
    golden.check(golden.GOLDENS / "rendered.json", "all", written)
