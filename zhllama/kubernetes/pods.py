"""What the pods of jobs and servers have in common: who they run as and what they may, where they go, what they are
told. Options that are mappings and lists are JSON, as KFP writes its parameters of these kinds into a command."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zhllama.artifacts.json_file import value_of
from zhllama.errors import InputError
from zhllama.kubernetes.formats import MOST
from zhllama.kubernetes.names import check_value
from zhllama.mounted_secrets import PROXY_FOLDER, S3_FOLDER
from zhllama.stage.tls import CA_FOLDER, PROXY_KEYS
from zhllama.storage.s3_session import PLACES, SETTINGS

if TYPE_CHECKING:
    from zhllama.kubernetes.model_server import ModelServer
    from zhllama.kubernetes.training_job import TrainingJob

USER = 65532
"""The uid of the images (images/base/Dockerfile)."""
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
"""Keys of the S3 secret that must be there."""
S3_OPTIONAL_KEYS = ("AWS_SESSION_TOKEN", *PLACES, *SETTINGS)
"""Those that may be absent, and then change nothing: every setting of docs/storage.md."""
POD_PLACES = {
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "HF_HOME": "/tmp/huggingface",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",
    "TRITON_CACHE_DIR": "/tmp/triton",
    "ZHLLAMA_CACHE": "/tmp/zhllama-cache",
}
"""Where a pod writes: below /tmp, a volume, and nowhere else."""
READABLE = 0o444
"""Mode of a secret's files, which are root's: the pod's one uid reads them, whether it is given a group or not."""
DEADLINE_VARIABLE = "ZHLLAMA_DEADLINE_SECONDS"
"""In a job's pods: how long the job may run (zhllama/training/elastic.py)."""


# --- as options say it ------------------------------------------------------------------------------------------------


def uid(text: str, option: str = "--run-as-user") -> int | None:
    """`65532`, or `none` for what the cluster gives. InputError for root and for what is no uid."""
    if text == "none":
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and 0 < int(text) <= MOST):
        raise InputError(f"{option} {text}: write a number from 1 to {MOST} (0, root, is refused), or none")
    return int(text)


def mapping(option: str, text: str) -> dict[str, str]:
    """`{"team": "nlp"}` → that mapping; "" is none. InputError for anything but texts by name."""
    value = json_of(option, text, "{}", '{"name": "value"}')
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise InputError(f'{option} {text}: write texts by name, as {{"name": "value"}}')
    return value


def tolerations(option: str, text: str) -> tuple[Mapping[str, Any], ...]:
    """`[{"key": "nvidia.com/gpu", "operator": "Exists"}]` → those tolerations; "" is none. InputError for others."""
    shape = '[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]'
    value = json_of(option, text, "[]", shape)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise InputError(f"{option} {text}: write a list of tolerations, as {shape}")
    check_value("tolerations", value, option)
    return tuple(value)


def json_of(option: str, text: str, empty: str, shape: str) -> Any:
    """The value of a text of JSON. InputError for none, which says the shape that is wanted."""
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
    of: "ModelServer", plain: Mapping[str, str | dict[str, Any]], names: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """A container's variables: plain ones, and of the proxy's and the S3 secret, key by key, those that are not among
    them. names: what a key's variable is called where not by the key."""
    found = plain_variables(plain)
    keys = [(of.proxy_secret, key) for key in PROXY_KEYS] + [
        (of.s3_secret, key) for key in (*S3_KEYS, *S3_OPTIONAL_KEYS)
    ]
    for secret, key in keys:
        if secret and key not in plain:
            reference = {"name": secret, "key": key} | ({} if key in S3_KEYS else {"optional": True})
            found.append({"name": (names or {}).get(key, key), "valueFrom": {"secretKeyRef": reference}})
    return found


def plain_variables(plain: Mapping[str, str | dict[str, Any]]) -> list[dict[str, Any]]:
    """name → value, or where it comes from."""
    return [{"name": name, "value" if isinstance(one, str) else "valueFrom": one} for name, one in plain.items()]


def secret_files(job: "TrainingJob") -> dict[str, dict[str, Any]]:
    """Volumes with the job's secrets, by the folder where its command looks for them. Where the S3 secret is absent, or
    one of its two keys, the pod does not start, and an Event says so; the kubelet goes on once it is there."""
    wanted = {
        S3_FOLDER: ("s3-secret", job.s3_secret, S3_KEYS, S3_OPTIONAL_KEYS),
        PROXY_FOLDER: ("proxy-secret", job.proxy_secret, (), PROXY_KEYS),
    }
    found = {}
    for folder, (name, secret, needed, others) in wanted.items():
        sources = [{"secret": {"name": secret, "items": _files(needed)}}] if needed else []
        sources.append({"secret": {"name": secret, "items": _files(others), "optional": True}})
        if secret:
            found[folder] = {"name": name, "projected": {"defaultMode": READABLE, "sources": sources}}
    return found


def _files(keys: Sequence[str]) -> Any:
    return [{"key": key, "path": key} for key in keys]
