"""What Kubeflow Pipelines 2.17.0 says to the driver and to the pod of a step: the texts that a Workflow is made of.

The driver of a step gets its component, task, container and Kubernetes settings as JSON. When it has resolved the task,
it writes the patch of the pod's specification: the launcher's command with the inputs, outputs and component once more,
the step's own command, environment, secrets, volumes, placement. Values of other steps are texts of the usual length:
only the size is asked for here (workflow_size.py). Pure.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.local.placeholders import Surroundings, Value, json_of

RUN = "00000000-0000-0000-0000-000000000000"
ROOT = "minio://mlpipeline/v2/artifacts"
"""KFP's own default for where artifacts go."""
MADE = f"s3://zhllama/artifacts/train_tokenizer/{'0' * 32}/manifest.json"
"""A text of the length of what our steps write."""
_STAND_INS: Mapping[str, Value] = {"STRING": MADE, "LIST": [], "STRUCT": {}, "BOOLEAN": False}
SERVERS = [
    "--ml_pipeline_server_address", "ml-pipeline.kubeflow.svc.cluster.local", "--ml_pipeline_server_port", "8887",
    "--mlmd_server_address", "metadata-grpc-service.kubeflow.svc.cluster.local", "--mlmd_server_port", "8080",
]  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A use of a container component, with all that its driver is told."""

    name: str
    component: str
    task: str
    container: str
    kubernetes: str
    patch: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]

    @property
    def metadata(self) -> list[dict[str, str]]:
        """Labels and annotations as the parameters of a template."""
        found: list[dict[str, str]] = []
        for kind, pairs in (("annotation", self.annotations), ("label", self.labels)):
            for number, (key, value) in enumerate(sorted(pairs.items()), 1):
                end = f"-{number}" if len(pairs) > 1 else ""
                found.append({"name": f"pod-metadata-{kind}-key{end}", "value": key})
                found.append({"name": f"pod-metadata-{kind}-val{end}", "value": value})
        return found

    @property
    def template(self) -> str:
        if not self.labels and not self.annotations:
            return "system-container"
        return f"metadata-{len(self.annotations)}-{len(self.labels)}-system-container"


class Source:
    """A compiled pipeline's documents, and the values that its tasks get."""

    def __init__(self, documents: list[Any], arguments: Mapping[str, Value]) -> None:
        self.pipeline = documents[0]
        self.root = self.pipeline["root"]
        self.kubernetes: dict[str, Any] = {}
        for document in documents[1:]:
            platform = document.get("platforms", {}).get("kubernetes", {})
            self.kubernetes |= platform.get("deploymentSpec", {}).get("executors", {})
        self.arguments: dict[str, Value] = {**defaults_of(self.root), **arguments}

    def component(self, task: Any) -> Any:
        return self.pipeline["components"][task["componentRef"]["name"]]

    def container(self, component: Any) -> Any:
        return self.pipeline["deploymentSpec"]["executors"][component["executorLabel"]]["container"]

    def inputs(self, task: Any, graph: Any, given: Mapping[str, Value]) -> dict[str, Value]:
        """What a task passes, with a text of the usual length for what another step writes."""
        component = self.component(task)
        found = defaults_of(component) if "dag" in component else {}
        passed = task.get("inputs", {}).get("parameters", {})
        return {**found, **{name: self.value(source, graph, given) for name, source in passed.items()}}

    def value(self, source: Any, graph: Any, given: Mapping[str, Value]) -> Value:
        if "runtimeValue" in source:
            value: Value = source["runtimeValue"]["constant"]
            return RUN if isinstance(value, str) and value.startswith("{{$.pipeline_") else value
        if "componentInputParameter" in source:
            return given.get(source["componentInputParameter"])
        output = source["taskOutputParameter"]
        defined = self.component(graph["dag"]["tasks"][output["producerTask"]])["outputDefinitions"]["parameters"]
        return _STAND_INS.get(defined[output["outputParameterKey"]]["parameterType"], 1000.5)

    def step(self, name: str, task: Any, graph: Any, given: Mapping[str, Value]) -> Step:
        component = self.component(task)
        container = self.container(component)
        kubernetes = self.kubernetes.get(component["executorLabel"], {})
        metadata = kubernetes.get("podMetadata", {})
        return Step(
            name=name,
            component=json_of(component),
            task=json_of(task),
            container=json_of(container),
            kubernetes=json_of(kubernetes) if kubernetes else "",
            patch=json_of(self.pod_spec_patch(name, task, graph, given)),
            labels=metadata.get("labels", {}),
            annotations=metadata.get("annotations", {}),
        )

    # --- the pod ------------------------------------------------------------------------------------------------------

    def pod_spec_patch(self, name: str, task: Any, graph: Any, given: Mapping[str, Value]) -> dict[str, Any]:
        """What the driver adds to the pod of a step: its command, environment, resources, volumes, placement."""
        component = self.component(task)
        container = self.container(component)
        inputs = {key: value for key, value in self.inputs(task, graph, given).items() if value is not None}
        words = [*container["command"], *container.get("args", [])]
        around = _Anything(inputs)
        launcher = [
            "/kfp-launcher/launch", "--pipeline_name", self.pipeline["pipelineInfo"]["name"], "--run_id", RUN,
            "--execution_id", "1234", "--executor_input", _spaced(self._executor_input(name, task, component, inputs)),
            "--component_spec", _spaced(component), "--pod_name", "$(KFP_POD_NAME)", "--pod_uid", "$(KFP_POD_UID)",
            *SERVERS, "--publish_logs", "true", "--",
        ]  # fmt: skip
        main: dict[str, Any] = {
            "name": "main",
            "image": around.driver(container["image"]),
            "command": launcher,
            "args": [around.driver(word) if "$.outputs" not in word else word for word in words],
            "env": [{"name": one["name"], "value": one.get("value", "")} for one in container.get("env", [])],
            "resources": _resources(container.get("resources", {}), around),
        }
        return self._placed(main, self.kubernetes.get(component["executorLabel"], {}), graph, given)

    def _executor_input(self, name: str, task: Any, component: Any, inputs: Mapping[str, Value]) -> dict[str, Any]:
        outputs = component.get("outputDefinitions", {})
        folder = f"{ROOT}/{self.pipeline['pipelineInfo']['name']}/{RUN}/{name}/{RUN}"
        artifacts = {**outputs.get("artifacts", {}), "executor-logs": {"artifactType": _ARTIFACT}}
        taken = {
            key: {"artifacts": [{"name": key, "uri": f"{folder}/{key}", "type": _ARTIFACT}]}
            for key in task.get("inputs", {}).get("artifacts", {})
        }
        return {
            "inputs": {"parameterValues": dict(inputs), **({"artifacts": taken} if taken else {})},
            "outputs": {
                "parameters": {key: {"outputFile": f"/tmp/kfp/outputs/{key}"} for key in outputs.get("parameters", {})},
                "artifacts": {
                    key: {"artifacts": [{"name": key, "uri": f"{folder}/{key}", "type": one["artifactType"]}]}
                    for key, one in artifacts.items()
                },
                "outputFile": f"/{folder.replace('://', '/')}/output_metadata.json",
            },
        }

    def _placed(
        self, main: dict[str, Any], settings: Mapping[str, Any], graph: Any, given: Mapping[str, Value]
    ) -> dict[str, Any]:
        def named(one: Any, what: str) -> Value:
            source = one.get(f"{what}NameParameter")
            return self.value(source, graph, given) if source else one.get(f"{what}Name", "")

        def json_value(one: Any, key: str) -> Value:
            return self.value(one[key], graph, given) if key in one else one

        volumes, mounts = [], []
        for what in ("secret", "configMap"):
            for one in settings.get(f"{what}AsVolume", []):
                name = named(one, what)
                volumes.append({"name": name, what: {"name": name, "optional": bool(one.get("optional"))}})
                mounts.append({"name": name, "mountPath": one["mountPath"]})
            for one in settings.get(f"{what}AsEnv", []):
                for pair in one["keyToEnv"]:
                    chosen = {
                        "name": named(one, what),
                        "key": pair[f"{what}Key"],
                        "optional": bool(one.get("optional")),
                    }
                    main["env"].append({"name": pair["envVar"], "valueFrom": {f"{what}KeyRef": chosen}})
        for one in settings.get("emptyDirMounts", []):
            volumes.append({"name": one["volumeName"], "emptyDir": {"sizeLimit": one.get("sizeLimit", "")}})
            mounts.append({"name": one["volumeName"], "mountPath": one["mountPath"]})
        for one in settings.get("fieldPathAsEnv", []):
            main["env"].append({"name": one["name"], "valueFrom": {"fieldRef": {"fieldPath": one["fieldPath"]}}})
        if "imagePullPolicy" in settings:
            main["imagePullPolicy"] = settings["imagePullPolicy"]
        if "securityContext" in settings:
            main["securityContext"] = {**settings["securityContext"], "capabilities": {"drop": ["ALL"]}}
        main["volumeMounts"] = mounts
        patch: dict[str, Any] = {"containers": [main], "volumes": volumes}
        if "activeDeadlineSeconds" in settings:
            patch["activeDeadlineSeconds"] = settings["activeDeadlineSeconds"]
        if "nodeSelector" in settings:
            patch["nodeSelector"] = json_value(settings["nodeSelector"], "nodeSelectorJson")
        if "imagePullSecret" in settings:
            patch["imagePullSecrets"] = [{"name": named(one, "secret")} for one in settings["imagePullSecret"]]
        if "tolerations" in settings:
            patch["tolerations"] = [json_value(one, "tolerationJson") for one in settings["tolerations"]]
        return patch


_ARTIFACT = {"schemaTitle": "system.Artifact", "schemaVersion": "0.0.1"}


def _spaced(value: Any) -> str:
    """JSON as protobuf's Go library writes it for a pod: a space after each comma."""
    return json.dumps(value, separators=(", ", ":"), ensure_ascii=False)


class _Anything(Surroundings):
    """Surroundings in which what is not passed is an empty text: only the size is asked for."""

    def _passed(self, name: str) -> Value:
        return self.parameters.get(name)


def _resources(given: Mapping[str, Any], around: Surroundings) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {"limits": {}, "requests": {}}
    for key, value in given.items():
        for name in ("Cpu", "Memory"):
            if f"resource{name}" in key:
                found["limits" if key.endswith("Limit") else "requests"][name.lower()] = around.driver(str(value))
    if accelerator := given.get("accelerator"):
        name = around.driver(str(accelerator.get("resourceType", accelerator.get("type", ""))))
        found["limits"][name] = around.driver(str(accelerator.get("resourceCount", accelerator.get("count", ""))))
    return found


def defaults_of(component: Any) -> dict[str, Value]:
    parameters = component.get("inputDefinitions", {}).get("parameters", {})
    return {name: one.get("defaultValue") for name, one in parameters.items()}
