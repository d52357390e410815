"""The Workflow that Kubeflow Pipelines 2.17.0 makes of a compiled pipeline, as far as its size goes.

KFP writes each component, container and Kubernetes setting as JSON into an argument of the Workflow, each task as JSON
into a template, and has two templates for all steps: their driver, and their pod, which gets the driver's patch. Texts
are those of the real ones, or of their length. Pure.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.local.placeholders import json_of
from tests.pipelines.kubeflow.step_texts import ROOT, RUN, SERVERS, Source, Step

_LAUNCHER_IMAGE = "kubeflow/kfp-launcher:2.17.0"
_DRIVER_IMAGE = "kubeflow/kfp-driver:2.17.0"
_HARDENED = {
    "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True, "allowPrivilegeEscalation": False,
    "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip
_SCRATCH = ("kfp-launcher", "gcs-scratch", "s3-scratch", "minio-scratch", "dot-local-scratch", "dot-cache-scratch",
            "dot-config-scratch")  # fmt: skip


def workflow(source: Source) -> dict[str, Any]:
    """The Workflow before it runs: arguments and templates."""
    spec = source.pipeline
    arguments: dict[str, str] = {}
    templates: dict[str, Any] = {}
    for name, component in (*spec["components"].items(), ("root", source.root)):
        if "dag" not in component:
            identity = identity_of(source, name)
            arguments.setdefault(f"components-{identity}", json_of(component))
            arguments.setdefault(f"implementations-{identity}", json_of(source.container(component)))
            if component["executorLabel"] in source.kubernetes:
                arguments[f"kubernetes-{name}"] = json_of(source.kubernetes[component["executorLabel"]])
            continue
        arguments[f"components-{name}"] = json_of(component)
        for hook in (True, False):
            for template in _graph(source, name, component, hook):
                templates[template["name"]] = template
    for component in spec["components"].values():
        if "dag" not in component:
            templates |= {one["name"]: one for one in _executors(source.kubernetes.get(component["executorLabel"], {}))}
    drivers = [_driver(kind, spec["pipelineInfo"]["name"]) for kind in ("container", "dag")]
    entry = {"name": "entrypoint", "inputs": {}, "outputs": {}, "metadata": {}, "dag": {"tasks": [
        _task("root-driver", "system-dag-driver", {
            "component": "{{workflow.parameters.components-root}}", "runtime-config": runtime_config(source),
            "driver-type": "ROOT_DAG"}, []),
        _task("root", "root", {"parent-dag-id": "{{tasks.root-driver.outputs.parameters.execution-id}}",
                               "condition": ""}, ["root-driver"]),
    ]}}  # fmt: skip
    return {
        "apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow",
        "metadata": _metadata(spec["pipelineInfo"]["name"]),
        "spec": {
            "templates": [*drivers, *templates.values(), entry],
            "entrypoint": "entrypoint",
            "arguments": {"parameters": [{"name": name, "value": value} for name, value in arguments.items()]},
            "serviceAccountName": "pipeline-runner",
            "podMetadata": {"annotations": {"pipelines.kubeflow.org/v2_component": "true"},
                            "labels": {"pipelines.kubeflow.org/v2_component": "true", "pipeline/runid": RUN}},
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        },
    }  # fmt: skip


def _metadata(name: str) -> dict[str, Any]:
    stamp = "2026-01-01T00:00:00Z"
    labels = {"pipeline/runid": RUN, "workflows.argoproj.io/phase": "Succeeded", "pipeline/persistedFinalState": "true"}
    return {
        "name": f"{name}-abcde", "generateName": f"{name}-", "namespace": "kubeflow", "uid": RUN,
        "resourceVersion": "123456", "generation": 99, "creationTimestamp": stamp, "labels": labels,
        "annotations": {"pipelines.kubeflow.org/run_name": name, "pipelines.kubeflow.org/components-comp": name,
                        "workflows.argoproj.io/pod-name-format": "v2"},
    }  # fmt: skip


def runtime_config(source: Source) -> str:
    return json_of({"gcsOutputDirectory": ROOT, "parameterValues": source.arguments})


def identity_of(source: Source, name: str) -> str:
    """What KFP calls a component by: the digest of its container, so that equal ones are one argument."""
    component = source.pipeline["components"][name]
    return name if "dag" in component else hashlib.sha256(json_of(source.container(component)).encode()).hexdigest()


def _parameter_list(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _task(name: str, template: str, values: Mapping[str, str], after: list[str]) -> dict[str, Any]:
    found = {"name": name, "template": template, "arguments": {"parameters": _parameter_list(values)}}
    return found | ({"depends": " && ".join(f"{one}.Succeeded" for one in after)} if after else {})


def is_hook(task: Any) -> bool:
    return bool(task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED")


def _graph(source: Source, name: str, component: Any, hook: bool) -> Iterator[dict[str, Any]]:
    """The templates of a graph: its tasks, or (hook) one for each of its exit handlers."""
    tasks: list[Any] = []
    hooks = {before: f"exit-hook-{name}-{key}" for key, task in component["dag"]["tasks"].items() if is_hook(task)
             for before in task.get("dependentTasks", [])}  # fmt: skip
    for key, task in sorted(component["dag"]["tasks"].items()):
        if is_hook(task) is not hook:
            continue
        pair = list(_pair(source, key, task, [] if hook else task.get("dependentTasks", [])))
        if key in hooks:
            given = {"parameters": [{"name": "parent-dag-id", "value": "{{inputs.parameters.parent-dag-id}}"}]}
            pair[-1]["hooks"] = {"exit": {"template": hooks[key], "arguments": given}}
        if hook:
            yield _dag(f"exit-hook-{name}-{key}", pair)
        tasks += pair
    if not hook:
        yield _dag(name, tasks)


def _dag(name: str, tasks: list[Any]) -> dict[str, Any]:
    given = {"parameters": [{"name": "parent-dag-id"}]}
    return {"name": name, "inputs": given, "outputs": {}, "metadata": {}, "dag": {"tasks": tasks}}


def _pair(source: Source, key: str, task: Any, after: list[str]) -> Iterator[dict[str, Any]]:
    """A task's driver, and what it drives."""
    reference = task["componentRef"]["name"]
    component, driver = source.component(task), f"{key}-driver"
    values = {
        "component": f"{{{{workflow.parameters.components-{identity_of(source, reference)}}}}}",
        "task": json_of(task),
        "task-name": key,
        "parent-dag-id": "{{inputs.parameters.parent-dag-id}}",
    }
    given = f"{{{{tasks.{driver}.outputs.parameters."
    if "dag" in component:
        yield _task(driver, "system-dag-driver", values, after)
        outputs = {"parent-dag-id": f"{given}execution-id}}}}", "condition": f"{given}condition}}}}"}
        yield _task(key, reference, outputs, [driver])
        return
    values["container"] = f"{{{{workflow.parameters.implementations-{identity_of(source, reference)}}}}}"
    settings = source.kubernetes.get(component["executorLabel"], {})
    if settings:
        values["kubernetes-config"] = f"{{{{workflow.parameters.kubernetes-{reference}}}}}"
    yield _task(driver, "system-container-driver", values, after)
    metadata = settings.get("podMetadata", {})
    step = Step(key, "", "", "", "", "", metadata.get("labels", {}), metadata.get("annotations", {}))
    outputs = {"pod-spec-patch": f"{given}pod-spec-patch}}}}", "cached-decision": f"{given}cached-decision}}}}"}
    found = _task(key, f"{step.template}-executor", outputs, [driver])
    found["arguments"]["parameters"] += step.metadata
    yield found


def _driver(kind: str, pipeline: str) -> dict[str, Any]:
    names = {"container": ("component", "task", "container", "task-name", "parent-dag-id", "iteration-index",
                           "kubernetes-config"),
             "dag": ("component", "runtime-config", "task", "task-name", "parent-dag-id", "iteration-index",
                     "driver-type")}[kind]  # fmt: skip
    made = {"container": ("pod-spec-patch", "cached-decision", "condition"),
            "dag": ("execution-id", "iteration-count", "condition")}[kind]  # fmt: skip
    args = ["--type", kind.upper(), "--pipeline_name", pipeline, "--run_id", "{{workflow.uid}}", "--run_name",
            "{{workflow.name}}", "--run_display_name", pipeline, "--pipeline_job_create_time_utc",
            "{{workflow.creationTimestamp}}", "--http_proxy", "", "--https_proxy", "", "--no_proxy", "",
            *SERVERS, "--log_level", "1", "--publish_logs", "true"]  # fmt: skip
    args += [word for name in names for word in (f"--{name}", f"{{{{inputs.parameters.{name}}}}}")]
    args += [word for name in made for word in (f"--{name}_path", f"{{{{outputs.parameters.{name}.path}}}}")]
    resources = {"limits": {"cpu": "500m", "memory": "512Mi"}, "requests": {"cpu": "100m", "memory": "64Mi"}}
    return {
        "name": f"system-{kind}-driver",
        "inputs": {"parameters": [{"name": name, "default": ""} for name in names]},
        "outputs": {"parameters": [
            {"name": name, "valueFrom": {"path": f"/tmp/outputs/{name}", "default": "true"}} for name in made]},
        "metadata": {"annotations": {"pipelines.kubeflow.org/runtime-role": "driver"}},
        "container": {"name": "", "image": _DRIVER_IMAGE, "command": ["driver"], "args": args, "env": _pod_names(),
                      "resources": resources, "securityContext": _HARDENED},
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    }  # fmt: skip


def _pod_names() -> list[Any]:
    return [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
            for name, path in (("KFP_POD_NAME", "metadata.name"), ("KFP_POD_UID", "metadata.uid"))]  # fmt: skip


def _executors(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The two templates of all steps with as many labels and annotations."""
    metadata = settings.get("podMetadata", {})
    step = Step("", "", "", "", "", "", metadata.get("labels", {}), metadata.get("annotations", {}))
    names = [one["name"] for one in step.metadata]
    handed = [{"name": name, "value": f"{{{{inputs.parameters.{name}}}}}"} for name in ("pod-spec-patch", *names)]
    bare = [{"name": name} for name in ("pod-spec-patch", *names)]
    yield {
        "name": f"{step.template}-executor", "outputs": {}, "metadata": {},
        "inputs": {"parameters": [*bare, {"name": "cached-decision", "default": "false"}]},
        "dag": {"tasks": [{"name": "executor", "template": f"{step.template}-impl", "arguments": {"parameters": handed},
                           "when": "{{inputs.parameters.cached-decision}} != true"}]},
    }  # fmt: skip
    mounts = [{"name": name, "mountPath": f"/{name}"} for name in _SCRATCH]
    yield {
        "name": f"{step.template}-impl", "inputs": {"parameters": bare}, "outputs": {},
        "metadata": {"annotations": {"pipelines.kubeflow.org/runtime-role": "launcher"},
                     "labels": {f"{{{{inputs.parameters.{name}}}}}": "" for name in names}},
        "container": {"name": "", "image": "ml-pipeline/should-be-overridden-during-runtime",
                      "command": ["should-be-overridden-during-runtime"], "env": _pod_names(), "volumeMounts": mounts,
                      "envFrom": [{"configMapRef": {"name": "metadata-grpc-configmap", "optional": True}}],
                      "resources": {}, "securityContext": _HARDENED},
        "volumes": [{"name": name, "emptyDir": {}} for name in _SCRATCH],
        "initContainers": [{"name": "kfp-launcher", "image": _LAUNCHER_IMAGE, "command": ["launcher-v2"],
                            "args": ["--copy", "/kfp-launcher/launch"], "volumeMounts": mounts[:1],
                            "resources": {"limits": {"cpu": "500m", "memory": "256Mi"}, "requests": {"cpu": "100m"}},
                            "securityContext": _HARDENED}],
        "podSpecPatch": "{{inputs.parameters.pod-spec-patch}}",
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
    }  # fmt: skip
