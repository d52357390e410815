"""Variables of our pods: where they write, and what they get of secrets."""

from collections.abc import Collection, Mapping
from typing import Any

from zhllama.stage.tls import PROXY_KEYS

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
POD_ENVIRONMENT = {**POD_PLACES, "HF_HUB_OFFLINE": "1"}
DEADLINE_VARIABLE = "ZHLLAMA_DEADLINE_SECONDS"
"""In a job's pods: how long the job may run (zhllama/training/elastic.py)."""


def plain_variables(values: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def proxy_variables(secret: str) -> list[dict[str, Any]]:
    """A container's variables from the proxy's secret, which may be absent; none without a name."""
    return [_variable(secret, key, optional=True) for key in PROXY_KEYS if secret]


def s3_variables(
    secret: str, names: Mapping[str, str] | None = None, given: Collection[str] = ()
) -> list[dict[str, Any]]:
    """A container's variables from the S3 secret, key by key; none without one. `names`: what a key's variable is
    called where not by the key; `given`: variables that are set already, and are left out."""
    keys = [key for key in (*S3_KEYS, *S3_OPTIONAL_KEYS) if secret and key not in given]
    return [_variable(secret, key, key in S3_OPTIONAL_KEYS, (names or {}).get(key)) for key in keys]


def _variable(secret: str, key: str, optional: bool, name: str | None = None) -> dict[str, Any]:
    reference = {"name": secret, "key": key} | ({"optional": True} if optional else {})
    return {"name": name or key, "valueFrom": {"secretKeyRef": reference}}
