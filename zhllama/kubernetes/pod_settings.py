"""What a cluster asks of a job's pods beside their size: labels, annotations, resources of device plugins, variables of
NCCL, nodes. One structured setting: a step has one input for all of it, and no byte where nothing is said.

What is wrong is said before anything is sent, as the API server would: of a job's pods it says it in the job's Events
alone. Variables that the job, its operator and the secrets set are refused; so is a credential, which a secret holds.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from zhllama.errors import InputError
from zhllama.kubernetes import formats
from zhllama.kubernetes.names import JOB_LABEL, JOB_LABELS, LABEL, check_value
from zhllama.kubernetes.pods import POD_PLACES, json_of
from zhllama.secret_text import is_secret, is_secret_name
from zhllama.stage.tls import PROXY_KEYS, TRUSTED

SHAPE = '{"environment": {"NCCL_IB_HCA": "mlx5"}, "resources": {"rdma/hca": "1"}, "annotations": {"NAME": "VALUE"}}'
_OF_TRAINING = re.compile(
    r"(PET|ZHLLAMA|AWS|MASTER|TORCHELASTIC)_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME"
    r"|PYTHON(UNBUFFERED|PATH|HOME)|PATH|HF_HUB_OFFLINE|TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
)
_ELSEWHERE = (
    (re.compile(r"AWS_.*|ZHLLAMA_S3_.*"), "make it a key of the S3 secret (docs/storage.md)"),
    (re.compile("|".join(TRUSTED)), "put certificates into the ConfigMap that --ca-config-map names"),
    (re.compile("|".join(PROXY_KEYS), re.IGNORECASE), "make it a key of the secret that --proxy-secret names"),
    (_OF_TRAINING, "the job sets it; leave it out"),
    (re.compile("|".join(POD_PLACES)), "pods write below /tmp alone, and the job says where; leave it out"),
)
_OWN_LABELS = (JOB_LABEL, *(f"{LABEL}{name}" for name in ("run", "size", "stage", "key", "team", "nodes")))
_OF_OPERATORS = ("training.kubeflow.org/", "trainer.kubeflow.org/", "jobset.sigs.k8s.io/", "batch.kubernetes.io/")
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
_HUGE = re.compile(r"hugepages-([0-9]+[KMG]i)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class PodSettings:
    """Each is empty where nothing is said."""

    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    """Kueue's topology, Multus' networks: what is read on pods, not on the job."""
    resources: Mapping[str, str] = field(default_factory=dict)
    """Of each pod, beside its GPUs: rdma/hca, vpc.amazonaws.com/efa."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Variable → its text, or {"secret": NAME, "key": KEY}."""
    node_affinity: Mapping[str, Any] = field(default_factory=dict)
    """Kubernetes' nodeAffinity."""

    @property
    def variables(self) -> dict[str, str | dict[str, Any]]:
        """As `pods.environment` takes them."""
        return {
            name: one if isinstance(one, str) else {"secretKeyRef": {"name": one["secret"], "key": one["key"]}}
            for name, one in self.environment.items()
        }

    @property
    def affinity(self) -> dict[str, Any]:
        """The pod spec's field, or nothing."""
        return {"affinity": {"nodeAffinity": dict(self.node_affinity)}} if self.node_affinity else {}


def pod_settings(option: str, given: Any) -> PodSettings:
    """The settings of a JSON text or of its value; "" and {} are none. InputError names the option and what is wrong
    in it."""
    value = json_of(option, given, "{}", SHAPE) if isinstance(given, str) else given
    if not isinstance(value, dict):
        raise InputError(f"{option} {given}: write a mapping, as {SHAPE}")
    known = [one.name for one in fields(PodSettings)]
    found: dict[str, dict[str, Any]] = {}
    for name, inner in value.items():
        if name not in known:
            raise InputError(f"{option}: pods have no {name!r} here; use {', '.join(known)}")
        if not isinstance(inner, dict):
            raise InputError(f"{option}: {name}: {inner!r} where a mapping is needed, as {SHAPE}")
        found[name] = inner if name == "node_affinity" else _texts(f"{option}: {name}:", inner, name == "environment")
    made = PodSettings(**found)
    check_value("labels", made.labels, f"{option}: labels")
    check_value("annotations", made.annotations, f"{option}: annotations")
    for name in (*made.labels, *made.annotations):
        if name in JOB_LABELS:
            raise InputError(f"{option}: {name}: Kueue reads it on the job alone; it is --{JOB_LABELS[name]}")
    for name in made.labels:
        if name in _OWN_LABELS or name.startswith(_OF_OPERATORS):
            raise InputError(f"{option}: labels: {name}: pods are found by it, and the job sets it; choose another")
    for name, one in made.resources.items():
        _check_resource(f"{option}: resources: {name}", name, one)
    for name, one in made.environment.items():
        _check_variable(f"{option}: environment: {name!r}", name, one)
    if made.node_affinity:
        _check_affinity(f"{option}: node_affinity", made.node_affinity)
    return made


def _texts(where: str, value: Mapping[str, Any], secrets: bool) -> dict[str, Any]:
    """Texts by name; a whole number is one too, as YAML files have them."""
    found: dict[str, Any] = {}
    for name, one in value.items():
        if isinstance(one, int) and not isinstance(one, bool):
            one = str(one)
        if not isinstance(one, str) and not (secrets and isinstance(one, dict)):
            raise InputError(f'{where} {name}: {one!r} where a text is needed; write it in quotes, as "{one}"')
        found[name] = one
    return found


def _check_resource(where: str, name: str, value: str) -> None:
    if name in ("cpu", "memory", "ephemeral-storage"):
        raise InputError(f"{where}: a job has an option for it, --{name}; use that")
    if page := _HUGE.fullmatch(name):
        asked, size = formats.amount(value), formats.amount(page[1])
        if not asked or not size or asked < 0 or asked % size:
            raise InputError(f"{where}: {value!r} is no number of such pages; write a multiple of {page[1]}")
        return
    domain, slash, _ = name.partition("/")
    if not slash or domain.endswith("kubernetes.io") or formats.resource_name(name):
        raise InputError(f"{where}: no name of a device plugin's resource; write rdma/hca, vpc.amazonaws.com/efa")
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise InputError(f"{where}: {value!r}: such a resource comes in whole numbers, 1 or more")


def _check_variable(where: str, name: str, value: Any) -> None:
    if wrong := formats.needed(formats.variable)(name):
        raise InputError(f"{where}: {wrong}")
    for names, mend in _ELSEWHERE:
        if names.fullmatch(name):
            raise InputError(f"{where}: {mend}")
    if isinstance(value, dict):
        texts = set(value) == {"secret", "key"} and all(isinstance(one, str) for one in value.values())
        if not texts or formats.subdomain(value["secret"]) or formats.config_key(value["key"]):
            raise InputError(f'{where}: {value}: name a secret and its key, as {{"secret": "NAME", "key": "KEY"}}')
        return
    if "\0" in value:
        raise InputError(f"{where}: no variable holds a zero byte; leave it out")
    if value and (is_secret_name(name) or is_secret(value)):
        mend = f'{{"{name}": {{"secret": "NAME", "key": "KEY"}}}}'
        raise InputError(
            f"{where}: it looks like a credential, which every manifest would show; name its secret: {mend}"
        )


# --- nodes ------------------------------------------------------------------------------------------------------------

REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def required_nodes(labels: Mapping[str, list[str]]) -> dict[str, Any]:
    """The node affinity of nodes that have each label, with one of its values."""
    expressions = [{"key": key, "operator": "In", "values": values} for key, values in labels.items()]
    return {REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": expressions}]}}


def _check_affinity(where: str, value: Mapping[str, Any]) -> None:
    _only(where, value, REQUIRED, PREFERRED)
    if REQUIRED in value:
        at = f"{where}: {REQUIRED}"
        terms = _only(at, value[REQUIRED], "nodeSelectorTerms").get("nodeSelectorTerms")
        if not isinstance(terms, list) or not terms:
            raise InputError(f"{at}: nodeSelectorTerms: a list with a term or more is needed")
        for term in terms:
            _check_term(at, term, required=True)
    for one in _list(f"{where}: {PREFERRED}", value.get(PREFERRED, [])):
        at = f"{where}: {PREFERRED}"
        weight = _only(at, one, "weight", "preference").get("weight")
        if type(weight) is not int or formats.between(1, 100)(weight):
            raise InputError(f"{at}: weight: {weight!r}; a number from 1 to 100 is needed")
        _check_term(at, one.get("preference"), required=False)


def _check_term(where: str, term: Any, required: bool) -> None:
    for kind, requirements in _only(where, term, "matchExpressions", "matchFields").items():
        at = f"{where}: {kind}"
        for one in _list(at, requirements):
            _only(at, one, "key", "operator", "values")
            key, operator, values = one.get("key"), one.get("operator"), _list(f"{at}: values", one.get("values", []))
            if not all(isinstance(text, str) for text in (key, *values)):
                raise InputError(f"{at}: {one}: key and values are texts; write them in quotes")
            if wrong := formats.one_of(*formats.NODE_OPERATORS)(operator):
                raise InputError(f"{at}: {key}: operator {operator!r} {wrong}")
            for name, wrong in formats.node_requirement(one, kind == "matchFields", required):
                raise InputError(f"{at}: {key}: {name} {wrong}")
            if operator in ("Gt", "Lt") and not _WHOLE.fullmatch(values[0]):
                raise InputError(f"{at}: {key}: {operator} takes one value, a whole number")


def _only(where: str, value: Any, *names: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value.keys() <= {*names}:
        raise InputError(f"{where}: {value}: a mapping with {', '.join(names)} is needed, and nothing else")
    return value


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{where}: {value!r} where a list is needed")
    return value
