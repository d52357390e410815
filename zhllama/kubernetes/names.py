"""What Kubernetes takes as names and labels, held before anything is sent: its own refusal comes after an upload, a
compilation, or not at all (a job whose pods name a secret that cannot be waits for ever)."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from zhllama.errors import InputError
from zhllama.kubernetes import formats
from zhllama.kubernetes.formats import Check
from zhllama.stage.images import image_reference, registry, tag
from zhllama.stage.options import option_of

LABEL = "zhllama.io/"
"""Prefix of our labels: run, size, stage, key."""
JOB_LABEL = f"{LABEL}job"
"""On a job's pods, its name: the operators' own labels for it differ, and what selects pods needs one for both."""
LONGEST_JOB_NAME = 63 - len("-worker-999")
POD_OBJECTS = ("s3_secret", "pull_secret", "proxy_secret", "ca_config_map", "service_account")
"""Options of our pods that name an object of the namespace."""
JOB_LABELS = {"kueue.x-k8s.io/queue-name": "queue", "kueue.x-k8s.io/priority-class": "priority-class"}
"""Labels that are read on a job alone → their options."""
POD_KEYS = ("kueue.x-k8s.io/podset-", "k8s.v1.cni.cncf.io/", "v1.multus-cni.io/")
"""How annotations begin that are read on pods alone, and without which they do not run as they are meant to: Kueue's
topology, Multus' networks."""
OTHER_POD_KEYS = (
    "cluster-autoscaler.kubernetes.io/", "karpenter.sh/", "container.apparmor.security.beta.kubernetes.io/",
    "cni.projectcalico.org/", "networking.gke.io/", "kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth",
    "sidecar.istio.io/", "traffic.sidecar.istio.io/", "proxy.istio.io/", "linkerd.io/", "config.linkerd.io/",
)  # fmt: skip
"""And others."""


def _name(text: str) -> str:
    """Of a queue or class of Kueue, which is a label of the job too."""
    return formats.subdomain(text) or formats.label_value(text)


def server_name(text: str) -> str:
    """Of a served model: of its objects, a Service among them, whose names have more after it."""
    good = re.fullmatch(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?", text)
    return "" if good else "must be lower-case letters, digits and -, a letter first, at most 50, on a cluster"


def _texts(check: Check) -> Check:
    return lambda value: "texts by name are needed" if not all(map(_is_text, value.values())) else check(value)


def _labels(values: Mapping[str, Any]) -> str:
    of_pods = next((key for key in values if key.startswith(POD_KEYS)), "")
    wrong = f"{of_pods}: it is an annotation of pods; put it under annotations" if of_pods else ""
    return formats.labels(values) or wrong


def _annotations(values: Mapping[str, Any]) -> str:
    of_jobs = next((key for key in values if key in JOB_LABELS), "")
    wrong = f"{of_jobs}: it is a label of the job, and Kueue reads it there alone; it is --" if of_jobs else ""
    return formats.annotations(values) or (wrong and wrong + JOB_LABELS[of_jobs])


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _tolerations(value: Any) -> str:
    for one in value:
        if not isinstance(one, Mapping):
            return "a list of tolerations is needed"
        for name, given in one.items():
            if type(given) is not _TOLERATION.get(name):
                known = ", ".join(f"{field} ({kind.__name__})" for field, kind in _TOLERATION.items())
                return f"{name}: {given!r} is nothing that a toleration has; it has {known}"
            if given != "" and (wrong := _OF_TOLERATION.get(name, lambda _: "")(given)):
                return f"{name}: {given!r} {wrong}"
        for name, wrong in formats.toleration(one):
            return f"{name}: {wrong}"
    return ""


def _gpu(text: str) -> str:
    wrong = formats.resource_name(text) or ("" if "/" in text else "has no domain")
    return f"is not a resource name ({wrong}); write nvidia.com/gpu, or nothing for none" if wrong else ""


def _quantity(value: Any) -> str:
    wrong = formats.quantity(value)
    return "is not a Kubernetes quantity; write 500m, 8 or 64Gi" if wrong else formats.no_negative_quantity(value)


def _gpu_count(text: str) -> str:
    return "" if re.fullmatch("0|[1-9][0-9]{0,8}", text, re.ASCII) else "is no number of GPUs; write 1 or 0"


_TOLERATION = {"key": str, "operator": str, "value": str, "effect": str, "tolerationSeconds": int}
_OF_TOLERATION: Mapping[str, Check] = {
    "key": formats.qualified_name,
    "operator": formats.one_of(*formats.OPERATORS),
    "effect": formats.one_of(*formats.EFFECTS),
}
_AT_LEAST_ONE = formats.between(1, formats.MOST)
TAKEN: Mapping[str, Check] = {
    "namespace": formats.dns_label,
    **dict.fromkeys((*POD_OBJECTS, "api_key_secret", "secret", "account"), formats.subdomain),
    **dict.fromkeys(("queue", "priority_class"), _name),
    "team": lambda text: "" if label_value(text) else "has no letter or digit that a label takes",
    **dict.fromkeys(("cpu", "memory", "shared_memory", "ephemeral_storage"), _quantity),
    "gpu_resource": _gpu,
    "evaluation_gpus": _gpu_count,
    "serve_name": server_name,
    "labels": _texts(_labels),
    "annotations": _texts(_annotations),
    "node_selector": _texts(formats.labels),
    "tolerations": _tolerations,
    **dict.fromkeys(("image", "training_image", "vllm_image"), image_reference),
    "registry": registry,
    "tag": tag,
    **dict.fromkeys(("nodes", "processes_per_node", "replicas", "gpus", "context_length", "attempts"), _AT_LEAST_ONE),
    **dict.fromkeys(("deadline_seconds", "grace_seconds", "start_seconds", "wait_minutes"), _AT_LEAST_ONE),
    **dict.fromkeys(
        ("min_nodes", "max_nodes", "waiting_seconds", "starting_seconds"), formats.between(0, formats.MOST)
    ),
}
"""An option of our jobs, servers and steps → what Kubernetes, or a kubelet hours later, has against a value of it."""


def option_in(name: str) -> str:
    """The option in TAKEN that the end of a longer name says: `lora_max_nodes` is max_nodes; "" where none does."""
    return max((one for one in TAKEN if name == one or name.endswith(f"_{one}")), key=len, default="")


def check_value(name: str, value: Any, where: str) -> None:
    """InputError for a value of the option of that name that a cluster would not take; nothing given is no value.
    where: what the user calls it."""
    needed = TAKEN[name] in (_quantity, _gpu_count, server_name)
    if not needed and (value is None or value == "" or value == {} or value in ([], ())):
        return
    if wrong := TAKEN[name](value):
        shown = f"{value!r} " if isinstance(value, str | int) else ""
        raise InputError(f"{where}: {shown}{wrong}")


def check_options(of: Any) -> None:
    """The same of each field of a job or a server, by its option; and that /dev/shm, which is part of the memory, is no
    larger."""
    for one in dataclasses.fields(of):
        if one.name in TAKEN:
            check_value(one.name, getattr(of, one.name), option_of(one.name))
    shared, memory = (formats.amount(getattr(of, name)) for name in ("shared_memory", "memory"))
    if shared is not None and memory is not None and shared > memory:
        said = f"--shared-memory {of.shared_memory}, --memory {of.memory}"
        raise InputError(f"{said}: /dev/shm is part of the memory; give less of it, or more memory")


def check_namespace(option: str, text: str) -> None:
    """InputError for what no namespace is called."""
    if wrong := formats.dns_label(text):
        raise InputError(f"{option}: {text!r} {wrong}")


def is_of_pods(key: str) -> bool:
    """Whether an annotation is read on pods, and not on the job that makes them."""
    return key.startswith((*POD_KEYS, *OTHER_POD_KEYS))


def label_value(text: str) -> str:
    """The text as a label's value: what is not allowed there becomes a dash, at most 63 characters."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)[:63].strip("-._")


def job_name(run: str, stage: str, attempt: int) -> str:
    """`<run>-<stage>-a<N>`, cut and cleaned to a DNS label."""
    tail = f"-{stage}-a{attempt}"
    clean = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if not clean[:1].isalpha():
        clean = f"run-{clean}"
    return clean[: LONGEST_JOB_NAME - len(tail)].rstrip("-") + tail
