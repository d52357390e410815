"""What Kubernetes takes as names and labels, held before anything is sent: its own refusal comes after an upload, a
compilation, or not at all (a job whose pods name a secret that cannot be waits for ever)."""

import re
from collections.abc import Mapping

from zhllama.errors import InputError
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
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_KEY = re.compile(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")


def check_namespace(option: str, text: str) -> None:
    """InputError for what no namespace is called."""
    if not _NAMESPACE.fullmatch(text):
        raise InputError(f"{option} {text}: lower-case letters, digits and dashes, at most 63, are needed")


def is_name(text: str) -> bool:
    """Whether an object may be called so."""
    return bool(_NAME.fullmatch(text))


def is_of_pods(key: str) -> bool:
    """Whether an annotation is read on pods, and not on the job that makes them."""
    return key.startswith((*POD_KEYS, *OTHER_POD_KEYS))


def check_names(options: object, *fields: str) -> None:
    """InputError for what no secret, account, queue or the like is called, in those fields that are set."""
    for field in fields:
        if (name := getattr(options, field)) and not is_name(name):
            mend = "lower-case letters, digits, - and . are allowed in the name of an object"
            raise InputError(f"{option_of(field)} {name}: {mend}")


def check_positive(options: object, *fields: str) -> None:
    """InputError for a number below 1 in those fields."""
    for field in fields:
        if getattr(options, field) < 1:
            raise InputError(f"{option_of(field)} {getattr(options, field)}: at least 1 is needed")


def check_labels(option: str, labels: Mapping[str, str]) -> None:
    """InputError for a label that is none."""
    for key, value in labels.items():
        if not _KEY.fullmatch(key) or not _LABEL.fullmatch(value):
            raise InputError(f"{option} {key}={value}: letters, digits, - _ and . are allowed, at most 63")


def check_keys(option: str, annotations: Mapping[str, str]) -> None:
    """InputError for an annotation's key that is none; its value may be any text."""
    for key in annotations:
        if not _KEY.fullmatch(key):
            raise InputError(f"{option} {key}: in a key letters, digits, - _ and . are allowed, at most 63")


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
