"""A component as a step: its name, its inputs, and what KFP can set on its pod: resources, a /tmp of its own, identity,
secrets, placement, a deadline. All of it is written into the compiled pipeline.

Three rules come from KFP 2.17's backend, and are kept here alone. Its driver resolves a container's arguments from what
the *task* passes, and knows no defaults. Each input of a step stands in the Workflow a dozen times, which may not grow
past a megabyte. So what is known when the pipeline is compiled is written into a step's arguments, and its inputs are
what a run decides, every one of them passed. And a step is called by its own name in the Workflow too (`train-lora`,
not `launch-training-2`): each use of a component is a component of that name. What KFP cannot set at all: a read-only
root (the images are made for one), and a request for ephemeral storage (the size of /tmp stands in for it).
"""

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kfp import kubernetes
from kfp.dsl import pipeline_channel
from kfp.dsl.structures import InputSpec

from pipelines.configuration import Configuration
from pipelines.local.placeholders import text_of
from zhllama.kubernetes.formats import amount
from zhllama.kubernetes.names import LABEL
from zhllama.kubernetes.pods import USER
from zhllama.mounted_secrets import PROXY_FOLDER, S3_FOLDER
from zhllama.stage import images
from zhllama.stage.tls import CA_FOLDER

_WORK = {"cleanup": "control", "launch": "control", "deploy": "data"}
"""Kind of a step → the kind of work of which its pod is; the others are called as it is."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Makes components steps of a pipeline."""

    configuration: Configuration
    made: list[tuple[str, str]]
    """Each step, and what it is there for."""

    def result(self, kind: str, component: Any, name: str, because: str, **given: Any) -> Any:
        """What an added step hands on: the reference of what it made."""
        return self.add(kind, component, name, because, **given).outputs["ref"]

    def add(self, kind: str, component: Any, name: str, because: str, **given: Any) -> Any:
        """A step. kind: its work, as sizes have it: data, weights or evaluation (with the size's GPU, where those pods
        are); or cleanup: it asks the cluster's API server alone, and gets no credentials; launch: it follows a job, and
        has no deadline, since the job may wait in a queue for days and has its own; deploy: it deploys a model, and
        loads its tokenizer to try it."""
        told = self.configuration
        work = getattr(told.size.work, _WORK.get(kind, kind))
        task = self._task(component, name, because, given)
        gpu = told.size.lora.gpu if kind == "evaluation" and work.gpu and told["evaluation_gpus"] != "0" else ""
        if gpu:
            task.set_accelerator_type(gpu).set_accelerator_limit(told["evaluation_gpus"])
        # requests are what limits are, where none are said
        task.set_cpu_limit(_plain(work.cpu, "m")).set_memory_limit(_plain(work.memory, ""))
        kubernetes.empty_dir_mount(task, "tmp", "/tmp", size_limit=work.ephemeral_storage)
        if kind != "cleanup":
            self._credentials(task)
        if told["pull_secret"]:
            kubernetes.set_image_pull_secrets(task, [told["pull_secret"]])
        self._place(task, "gpu_" if gpu else "")
        # unsaid the user is the images' own, a number; that it may not be root, which a restricted namespace wants to
        # hear, KFP says of its own containers alone
        user = None if told["run_as_user"] in ("none", str(USER)) else int(told["run_as_user"])
        kubernetes.set_security_context(task, run_as_user=user, run_as_non_root=True)
        if kind != "launch":
            kubernetes.set_timeout(task, work.deadline_seconds)
        if told["pull_policy"]:
            kubernetes.set_image_pull_policy(task, told["pull_policy"])
        _say_names_once(task.platform_config["kubernetes"])
        if kind in ("launch", "deploy") and (settings := images.settings()):
            # it names images when it runs: it is told what this compilation was
            task.container_spec.env = settings
        return task

    def _task(self, component: Any, name: str, because: str, given: Mapping[str, Any]) -> Any:
        self.made.append((name, because))
        spec = copy.deepcopy(component.component_spec)
        spec.name = name.replace("_", "-")
        declared = spec.inputs or {}
        if unknown := given.keys() - declared.keys():
            raise TypeError(f"{name}: its component has no input {', '.join(sorted(unknown))}")
        if missing := {one for one, described in declared.items() if not described.optional} - given.keys():
            raise TypeError(f"{name}: its component needs the input {', '.join(sorted(missing))}")
        # what is not given is left to the command's own default
        given = {**component.defaults, **given}
        constants = {one: given.get(one, "") for one in declared if not _varies(given.get(one))}
        container = spec.implementation.container
        container.args = _written(container.args, constants)
        _keep_what_is_shown(spec)
        spec.inputs = {one: InputSpec(described.type) for one, described in declared.items() if one not in constants}
        # never from KFP's cache, whose references may lead nowhere
        renamed = type(component)(spec, component.pipeline_func)
        task = renamed(**{one: given[one] for one in spec.inputs})
        return task.set_display_name(name).set_caching_options(False)

    def _credentials(self, task: Any) -> None:
        """Each may be absent: then the account's own identity is used, the public authorities are trusted alone, …"""
        told = self.configuration
        if told["s3_secret"] not in ("", "none"):
            kubernetes.use_secret_as_volume(task, told["s3_secret"], S3_FOLDER, optional=True)
        if told["proxy_secret"]:
            kubernetes.use_secret_as_volume(task, told["proxy_secret"], PROXY_FOLDER, optional=True)
        if told["ca_config_map"]:
            kubernetes.use_config_map_as_volume(task, told["ca_config_map"], CA_FOLDER, optional=True)

    def _place(self, task: Any, nodes: str) -> None:
        """nodes: `gpu_` or none, the settings of where the pod runs."""
        told = self.configuration
        for name, value in told[f"{nodes}node_selector"].items():
            kubernetes.add_node_selector(task, name, value)
        for one in told[f"{nodes}tolerations"]:
            fields = ("key", "operator", "value", "effect", "tolerationSeconds")
            kubernetes.add_toleration(task, *map(one.get, fields))
        labels = {
            **told["step_labels"],
            f"{LABEL}size": told.size.name,
            # Istio's sidecar would outlive the step, and stand between it and S3
            "sidecar.istio.io/inject": "false",
        }
        for name, value in labels.items():
            kubernetes.add_pod_label(task, name, value)
        for name, value in told["step_annotations"].items():
            kubernetes.add_pod_annotation(task, name, value)


def _plain(text: str, unit: str) -> str:
    """A quantity as kfp takes it too, which knows fewer ways to write one than Kubernetes: in millicores, in bytes."""
    if re.fullmatch(r"[0-9]+m?" if unit else r"[0-9]+([EPTGM]i?|Ki)?", text):
        return text
    found = amount(text)
    return text if found is None else f"{math.ceil(found * (1000 if unit else 1))}{unit}"


def _varies(value: Any) -> bool:
    """Whether a run decides it: a parameter, another step's output, a placeholder of the run."""
    return isinstance(value, pipeline_channel.PipelineChannel) or (isinstance(value, str) and "{{$" in value)


def _written(words: list[Any], constants: Mapping[str, Any]) -> list[Any]:
    """A container's arguments with what is known now written into them; an option without a value is left out."""
    texts = {f"{{{{$.inputs.parameters['{name}']}}}}": text_of(value) for name, value in constants.items()}
    written: list[Any] = []
    for word in words:
        name, equals, value = str(word).partition("=")
        option, shown = (f"{name}=", value) if equals and name.startswith("--") else ("", str(word))
        if shown not in texts:
            written.append(word)
        elif texts[shown]:
            written.append(option + texts[shown])
        elif not option:
            # it stands before its value
            written.pop()
    return written


def _keep_what_is_shown(spec: Any) -> None:
    """Metrics, the page and the reference are a step's outputs. A model or dataset is in the store: as an artifact of
    KFP's too, its manifest would cost each step 3 kB of the Workflow."""
    kept = {name: one for name, one in (spec.outputs or {}).items() if one.type.split("@")[0] in _SHOWN}
    words = spec.implementation.container.args
    for name in (spec.outputs or {}).keys() - kept.keys():
        at = [str(word) for word in words].index(f"{{{{$.outputs.artifacts['{name}'].path}}}}")
        del words[at - 1 : at + 1]
    spec.outputs = kept


_SHOWN = ("system.Metrics", "system.HTML", "String")


def _say_names_once(settings: dict[str, Any]) -> None:
    """kfp writes the name of a secret twice, for drivers before and since 2.5; all of them read the first."""
    for one in (each for listed in settings.values() if isinstance(listed, list) for each in listed):
        for name in ("secretNameParameter", "configMapNameParameter"):
            one.pop(name, None)
