"""What the pods of jobs and servers have in common: who they run as and what they may, where they go, what they are
told. Options that are mappings and lists are JSON, as KFP writes its parameters of these kinds into a command."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zhllama.artifacts.json_file import value_of
from zhllama.errors import InputError
from zhllama.kubernetes.names import check_labels
from zhllama.stage.tls import CA_FOLDER, PROXY_KEYS

if TYPE_CHECKING:
    from zhllama.kubernetes.model_server import ModelServer
    from zhllama.kubernetes.training_job import TrainingJob

USER = 65532
"""The uid of the images (images/base/Dockerfile)."""
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
"""Keys of the S3 secret that must be there; each becomes the variable of its name."""
S3_OPTIONAL_KEYS = ("AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "ZHLLAMA_S3_ENDPOINT")
POD_PLACES = {
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "HF_HOME": "/tmp/huggingface",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",
    "TRITON_CACHE_DIR": "/tmp/triton",
    "ZHLLAMA_CACHE": "/tmp/zhllama-cache",
}
"""Where a pod writes: below /tmp, a volume, and nowhere else."""
DEADLINE_VARIABLE = "ZHLLAMA_DEADLINE_SECONDS"
"""In a job's pods: how long the job may run (zhllama/training/elastic.py)."""
_TOLERATION = {"key": str, "operator": str, "value": str, "effect": str, "tolerationSeconds": int}
_CHOICES = {"operator": ("Exists", "Equal"), "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute")}


# --- as options say it ------------------------------------------------------------------------------------------------


def uid(text: str, option: str = "--run-as-user") -> int | None:
    """`65532`, or `none` for what the cluster gives. InputError for root and for what is no uid."""
    if text == "none":
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise InputError(f"{option} {text}: write a number above 0 (root is refused), or none")
    return int(text)


def mapping(option: str, text: str) -> dict[str, str]:
    """`{"team": "nlp"}` → that mapping; "" is none. InputError for anything but texts by name."""
    value = _json(option, text, "{}", '{"name": "value"}')
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise InputError(f'{option} {text}: write texts by name, as {{"name": "value"}}')
    return value


def tolerations(option: str, text: str) -> tuple[Mapping[str, Any], ...]:
    """`[{"key": "nvidia.com/gpu", "operator": "Exists"}]` → those tolerations; "" is none. InputError for others."""
    shape = '[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]'
    value = _json(option, text, "[]", shape)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise InputError(f"{option} {text}: write a list of tolerations, as {shape}")
    for one in value:
        for name, given in one.items():
            if type(given) is not _TOLERATION.get(name):
                known = ", ".join(f"{field} ({kind.__name__})" for field, kind in _TOLERATION.items())
                raise InputError(f"{option}: {name}: {given!r} is nothing that a toleration has; it has {known}")
        for name, choices in _CHOICES.items():
            if one.get(name, choices[0]) not in choices:
                raise InputError(f"{option}: {name}: {one[name]!r}; use {' or '.join(choices)}")
        if one.get("key"):
            # a taint is written as a label is
            check_labels(option, {one["key"]: one.get("value", "")})
    return tuple(value)


def _json(option: str, text: str, empty: str, shape: str) -> Any:
    try:
        return value_of(text or empty)
    except ValueError as error:
        raise InputError(f"{option} {text}: not JSON ({error}); write {shape}") from error


# --- as an API server takes it ----------------------------------------------------------------------------------------


def pod_spec(
    of: "TrainingJob | ModelServer", first: Mapping[str, Any], user: Mapping[str, int], **containers: Any
) -> dict[str, Any]:
    """A pod that passes the *restricted* Pod Security Standard and holds no Kubernetes token, with what its site asks
    of it; what is empty is left out. first: fields before the others; user: the ids it runs as, empty where
    the cluster gives them."""
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **first,
        "securityContext": {"runAsNonRoot": True, **user, "seccompProfile": {"type": "RuntimeDefault"}},
        **containers,
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": of.shared_memory}},
        ],
    }
    if of.service_account:
        pod["serviceAccountName"] = of.service_account
    if of.ca_config_map:
        pod["volumes"].append({"name": "ca", "configMap": {"name": of.ca_config_map, "optional": True}})
    if of.pull_secret:
        pod["imagePullSecrets"] = [{"name": of.pull_secret}]
    if of.node_selector:
        pod["nodeSelector"] = dict(of.node_selector)
    if of.tolerations:
        pod["tolerations"] = [dict(toleration) for toleration in of.tolerations]
    return pod


def confined(
    resources: Mapping[str, str], mounts: Mapping[str, str], ca_config_map: str = "", **more: Any
) -> dict[str, Any]:
    """The end of a container: it gets what it asks for, writes to its volumes alone (mounts: name → where), and may no
    more than the *restricted* Pod Security Standard allows. more: other fields."""
    mounted: list[dict[str, Any]] = [{"name": name, "mountPath": path} for name, path in mounts.items()]
    if ca_config_map:
        mounted.append({"name": "ca", "mountPath": CA_FOLDER, "readOnly": True})
    return {
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        **more,
        "volumeMounts": mounted,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def environment(
    of: "TrainingJob | ModelServer", plain: Mapping[str, str | dict[str, Any]], names: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """A container's variables: plain ones (name → value, or where it comes from), and of the proxy's and the S3 secret,
    key by key, those that are not among them. names: what a key's variable is called where not by the key."""
    found = [{"name": name, "value" if isinstance(one, str) else "valueFrom": one} for name, one in plain.items()]
    keys = [(of.proxy_secret, key) for key in PROXY_KEYS] + [
        (of.s3_secret, key) for key in (*S3_KEYS, *S3_OPTIONAL_KEYS)
    ]
    for secret, key in keys:
        if secret and key not in plain:
            reference = {"name": secret, "key": key} | ({} if key in S3_KEYS else {"optional": True})
            found.append({"name": (names or {}).get(key, key), "valueFrom": {"secretKeyRef": reference}})
    return found
