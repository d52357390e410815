"""How many bytes the Workflow of a run has when it is over, from the compiled pipeline alone.

At 1,048,576 bytes Argo compresses the nodes of a Workflow, and KFP 2.17's API then shows no task any more; at as many
after that, the Workflow ends in an error without its exit handler. Every node carries its inputs: a step is six nodes,
two of which hold component, task, container and Kubernetes settings as JSON, four the patch of its pod (and two more as
an output); a group is four. So few inputs count more than few steps: with 60 inputs a step of ours took 130 kB.

Held against recorded runs of size tiny: 5% below the 1,010 kB of a run whose 84 nodes were not compressed, 6% below the
974 kB of one whose 248 were (names of images were longer there); a bound wants that much room. What compression makes
of the nodes comes out a fifth too small.
"""

import base64
import gzip
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.local.placeholders import Value, json_of
from tests.pipelines.kubeflow.step_texts import Source, Step
from tests.pipelines.kubeflow.workflow_spec import is_hook, runtime_config, workflow
from zhllama.errors import InputError

LIMIT = 1_048_576
"""Bytes of a Workflow from which on Argo compresses its nodes, and beyond which it gives up after that."""


@dataclass(frozen=True)
class InputText:
    """Bytes of the texts that the nodes of one task hold, as they are before they are quoted."""

    component: int
    task: int
    container: int
    kubernetes: int
    pod_spec_patch: int
    inputs: int
    """How many parameters its component has."""

    @property
    def driver(self) -> int:
        """Input of each of the driver's two nodes."""
        return self.component + self.task + self.container + self.kubernetes

    @property
    def most(self) -> int:
        """Input of the largest node."""
        return max(self.driver, self.pod_spec_patch)


@dataclass(frozen=True)
class WorkflowSize:
    """Bytes of a Workflow at the end of a run in which everything ran."""

    spec: int
    """All but its nodes: arguments and templates."""
    nodes: int
    node_count: int
    compressed_nodes: int
    """The nodes as Argo compresses them, which it does where `total` is above LIMIT."""
    executors: int
    """Steps that have a container of their own in the pipeline."""
    arguments: int
    templates: int
    tasks: Mapping[str, InputText]
    """By the task's name, with the groups around it (`exit-handler-1/launch-training`)."""

    def input_text(self, task: str) -> InputText:
        """What the nodes of a task hold, by its own name (`launch-training-2`); KeyError where there is none."""
        return {path.rpartition("/")[2]: text for path, text in self.tasks.items()}[task]

    @property
    def total(self) -> int:
        return self.spec + self.nodes

    @property
    def stored(self) -> int:
        """What is kept: compressed where it has to be."""
        return self.total if self.total <= LIMIT else self.spec + self.compressed_nodes


def workflow_bytes(compiled: Path | str, arguments: Mapping[str, Value]) -> WorkflowSize:
    """The size of a run of a compiled pipeline (a file, or its text) with these arguments (the others by default)."""
    import yaml

    text = compiled.read_text() if isinstance(compiled, Path) else compiled
    documents = [
        document for document in yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if document
    ]
    if not documents or "pipelineInfo" not in documents[0]:
        raise InputError("not a compiled pipeline; make one with: zhllama compile")
    source = Source(documents, arguments)
    made = workflow(source)
    tree = _Nodes(source)
    nodes = {node["id"]: node for node in tree.whole()}
    written = json_of(nodes)
    return WorkflowSize(
        spec=len(json_of(made).encode()),
        nodes=len(written.encode()),
        node_count=len(nodes),
        compressed_nodes=len(base64.b64encode(gzip.compress(written.encode(), 6))),
        executors=len(documents[0]["deploymentSpec"]["executors"]),
        arguments=len(made["spec"]["arguments"]["parameters"]),
        templates=len(made["spec"]["templates"]),
        tasks=tree.texts,
    )


class _Nodes:
    """The nodes that Argo keeps of a run: each pod and each graph once more as the Retry around it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._workflow = f"{source.pipeline['pipelineInfo']['name']}-abcde"
        self.texts: dict[str, InputText] = {}

    def whole(self) -> Iterator[dict[str, Any]]:
        source = self._source
        yield from self._pair(self._workflow, "DAG", "entrypoint", {}, {})
        top = f"{self._workflow}(0)"
        root = json_of(source.root)
        yield from self._driver(f"{top}.root", "", root, runtime_config(source), "ROOT_DAG")
        yield from self._pair(f"{top}.root", "DAG", "root", {"parent-dag-id": "1234"}, {})
        yield from self._graph(source.root, source.arguments, f"{top}.root(0)", ())

    def _graph(
        self, graph: Any, given: Mapping[str, Value], where: str, path: tuple[str, ...]
    ) -> Iterator[dict[str, Any]]:
        for key, task in sorted(graph["dag"]["tasks"].items()):
            at = f"{where}.{key}"
            if is_hook(task):
                at = f"{where}.{next(iter(task.get('dependentTasks', [])), 'root')}.onExit"
                yield from self._pair(at, "DAG", f"exit-hook-root-{key}", {"parent-dag-id": "1234"}, {})
                at = f"{at}(0).{key}"
            component = self._source.component(task)
            if "dag" not in component:
                yield from self._step(at, self._source.step(key, task, graph, given), task, (*path, key))
                continue
            yield from self._driver(at, key, json_of(component), "", "DAG", json_of(task))
            yield from self._pair(at, "DAG", task["componentRef"]["name"], {"parent-dag-id": "1234"}, {})
            yield from self._graph(component, self._source.inputs(task, graph, given), f"{at}(0)", (*path, key))

    def _driver(
        self, at: str, name: str, component: str, config: str, kind: str, task: str = ""
    ) -> Iterator[dict[str, Any]]:
        inputs = {"component": component, "runtime-config": config, "task": task, "task-name": name,
                  "parent-dag-id": "1234", "iteration-index": "-1", "driver-type": kind}  # fmt: skip
        outputs = {"execution-id": "1234", "iteration-count": "0", "condition": "true"}
        yield from self._pair(f"{at}-driver", "Pod", "system-dag-driver", inputs, outputs)

    def _step(self, at: str, step: Step, task: Any, path: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        declared = self._source.component(task).get("inputDefinitions", {}).get("parameters", {})
        self.texts["/".join(path)] = InputText(
            component=len(step.component.encode()),
            task=len(step.task.encode()),
            container=len(step.container.encode()),
            kubernetes=len(step.kubernetes.encode()),
            pod_spec_patch=len(step.patch.encode()),
            inputs=len(declared),
        )
        inputs = {"component": step.component, "task": step.task, "container": step.container, "task-name": step.name,
                  "parent-dag-id": "1234", "iteration-index": "-1", "kubernetes-config": step.kubernetes}  # fmt: skip
        outputs = {"pod-spec-patch": step.patch, "cached-decision": "false", "condition": "true"}
        yield from self._pair(f"{at}-driver", "Pod", "system-container-driver", inputs, outputs)
        handed = {"pod-spec-patch": step.patch, **{one["name"]: one["value"] for one in step.metadata}}
        executor = {**handed, "cached-decision": "false"}
        yield from self._pair(at, "DAG", f"{step.template}-executor", executor, {})
        yield from self._pair(f"{at}(0).executor", "Pod", f"{step.template}-impl", handed, {})

    def _id(self, name: str) -> str:
        """As Argo's, a digest: nodes of one step lie far apart in what is compressed."""
        return f"{self._workflow}-{zlib.crc32(name.encode()):010}"

    def _pair(
        self, name: str, kind: str, template: str, inputs: Mapping[str, str], outputs: Mapping[str, str]
    ) -> Iterator[dict[str, Any]]:
        """A Retry, and what it tried. Both hold the inputs, and the Retry of a pod its outputs, too."""
        for suffix, one in (("", "Retry"), ("(0)", kind)):
            identity = self._id(f"{name}{suffix}")
            node: dict[str, Any] = {
                "id": identity, "name": f"{name}{suffix}",
                "displayName": f"{name}{suffix}".rsplit(".", 1)[-1], "type": one, "templateName": template,
                "templateScope": f"local/{self._workflow}", "phase": "Succeeded",
                "boundaryID": self._id(name.rpartition(".")[0]), "startedAt": "2026-01-01T00:00:00Z",
                "finishedAt": "2026-01-01T00:00:10Z", "estimatedDuration": 10, "progress": "1/1",
                "resourcesDuration": {"cpu": 10, "memory": 100}, "children": [self._id(f"{name}(0)")],
            }  # fmt: skip
            if suffix:
                node["nodeFlag"] = {"retried": True}
            if inputs:
                node["inputs"] = {"parameters": [{"name": key, "value": value} for key, value in inputs.items()]}
            if kind == "Pod":
                log = f"artifacts/{self._workflow}/2026/01/01/{self._workflow}-{template}-0/main.log"
                made: dict[str, Any] = {"exitCode": "0", "artifacts": [{"name": "main-logs", "s3": {"key": log}}]}
                if outputs:
                    made["parameters"] = [
                        {"name": key, "value": value, "valueFrom": {"path": f"/tmp/outputs/{key}", "default": ""}}
                        for key, value in outputs.items()
                    ]
                node["outputs"] = made
                node["hostNodeName"] = "node-1"
            else:
                node["outboundNodes"] = [identity]
            yield node
