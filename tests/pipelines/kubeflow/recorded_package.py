"""The pipeline that KFP 2.17.0 first ran for us, as it was compiled then, and what its runs left behind."""

import copy
import gzip
import json
import re
from pathlib import Path

import yaml

RECORDINGS = Path(__file__).parents[2] / "recordings" / "kfp"
PACKAGE = Path(__file__).parent / "packages" / "adapt-llama-with-branches.yaml.gz"
"""With branches, and with inputs left to their defaults."""


def recorded(name):
    """A Workflow as Argo kept it: `bytes` of the whole object, and its nodes (of which the inputs are left out)."""
    return json.loads((RECORDINGS / f"workflow-{name}.json").read_text())


NESTED = recorded("nested-succeeded-frozen-details")
SKIPPED = {node["templateName"] for node in NESTED["nodes"] if node["type"] == "Skipped"}
"""Groups of the branches that were not taken."""


def recorded_package():
    """The pipeline with branches that was recorded: each step passes each of its inputs."""
    documents = list(yaml.load_all(gzip.decompress(PACKAGE.read_bytes()), yaml.CSafeLoader))
    components = documents[0]["components"]
    for graph in components.values():
        for task in graph.get("dag", {}).get("tasks", {}).values():
            component = components[task["componentRef"]["name"]]
            if "dag" not in component:
                passed = task.setdefault("inputs", {}).setdefault("parameters", {})
                for name, one in component.get("inputDefinitions", {}).get("parameters", {}).items():
                    passed.setdefault(name, {"runtimeValue": {"constant": one.get("defaultValue")}})
    return documents


def without_branches(package, wanted=None):
    """The steps of the recorded run in one exit handler, `wanted` of each component (None: all)."""
    documents = copy.deepcopy(package)
    spec = documents[0]
    components, root = spec["components"], spec["root"]["dag"]["tasks"]
    known = spec["root"]["inputDefinitions"]["parameters"]

    def steps(graph):
        for name, task in graph["dag"]["tasks"].items():
            inner = components[task["componentRef"]["name"]]
            if task["componentRef"]["name"] not in SKIPPED:
                yield from steps(inner) if "dag" in inner else [(name, task)]

    left = dict(wanted) if wanted is not None else None
    made, names = {}, set()
    for name, task in steps(components["comp-exit-handler-1"]):
        kind = re.sub(r"-\d+$", "", name)
        if left is not None:
            left[kind] = left.get(kind, 0) - 1
            if left[kind] < 0:
                continue
        made[name] = {key: value for key, value in task.items() if key not in ("triggerPolicy", "dependentTasks")}
        for source in task["inputs"]["parameters"].values():
            parent = source.get("componentInputParameter", "")
            if parent.removeprefix("pipelinechannel--") in known:
                names.add(parent)
            elif "runtimeValue" not in source:
                source.clear()
                source["taskOutputParameter"] = {"producerTask": "fetch-weights", "outputParameterKey": "ref"}
    given = {name: {"componentInputParameter": name.removeprefix("pipelinechannel--")} for name in names}
    root["exit-handler-1"]["inputs"] = {"parameters": given}
    root["exit-handler-1"].pop("dependentTasks", None)
    components["comp-exit-handler-1"] = {
        "dag": {"tasks": made},
        "inputDefinitions": {"parameters": {name: known[name.removeprefix("pipelinechannel--")] for name in names}},
    }
    kept = {task["componentRef"]["name"] for task in (*root.values(), *made.values())}
    spec["components"] = {name: components[name] for name in kept}
    labels = {component.get("executorLabel") for component in spec["components"].values()}
    for deployment in (spec["deploymentSpec"], documents[1]["platforms"]["kubernetes"]["deploymentSpec"]):
        deployment["executors"] = {name: one for name, one in deployment["executors"].items() if name in labels}
    return documents
