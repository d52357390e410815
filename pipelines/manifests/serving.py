"""Served models as manifests for `kubectl apply`: from the sizes, through ModelServer, as --deploy makes them.

`k8s/serving/<size>/{vllm,kserve}.yaml` are such manifests with example addresses; a test keeps them as this module
writes them.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines import sizes
from pipelines.manifests.render import kustomization, yaml_of
from pipelines.sizes import Size
from zhllama.errors import InputError
from zhllama.kubernetes.model_server import ModelServer
from zhllama.kubernetes.names import LABEL

FOLDER = Path(__file__).parents[2] / "k8s" / "serving"
AUTOSCALED = "autoscaled"
EXAMPLE_MODEL = "s3://zhllama/artifacts/models/{size}-chinese"


def model_server(
    size: Size, model: str = "", name: str = "", labels: Mapping[str, str] | None = None, **more: Any
) -> ModelServer:
    """A server for a model of this size; what is empty in `more` keeps ModelServer's default, and an
    s3_secret `none` is none."""
    if not size.serving.gpu:
        raise InputError(f"size {size.name} has no GPUs to be served on; serve it here: python -m components.serve")
    machine = asdict(size.serving)
    given = {"gpu_resource": machine.pop("gpu"), **machine}
    given |= {option: value for option, value in more.items() if value}
    if given.get("s3_secret") == "none":
        given["s3_secret"] = ""
    return ModelServer(
        name=name or f"llama-{size.name}",
        model=model or EXAMPLE_MODEL.format(size=size.name),
        labels={**(labels or {}), f"{LABEL}size": size.name},
        **given,
    )


def replicas_of(text: str) -> dict[str, Any]:
    """What `--replicas` asks of model_server: a number, or "autoscaled"; nothing for "". InputError for other words."""
    if not text:
        return {}
    if text == AUTOSCALED:
        return {"autoscaled": True}
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise InputError(
            f"--replicas {text}: give a number of pods from 1 on, or {AUTOSCALED} where an autoscaler says how many"
        )
    return {"replicas": int(text)}


def as_yaml(server: ModelServer, kserve: bool = False, monitored: bool = False) -> str:
    return yaml_of(server.objects(kserve, monitored))


def examples() -> dict[str, str]:
    """The manifests below k8s/serving: `<size>/<kind>.yaml` → text, for every size that is served on GPUs."""
    found = {}
    for size in map(sizes.load, sizes.names()):
        if size.serving.gpu:
            # the two kinds have objects of the same names: one of them at a time
            found[f"{size.name}/kustomization.yaml"] = kustomization(["vllm.yaml"])
            server = model_server(size)
            for kind, more in (("vllm", ""), ("kserve", " --kserve")):
                head = _HEAD.format(size=size.name, more=more)
                found[f"{size.name}/{kind}.yaml"] = head + as_yaml(server, kind == "kserve")
    return found


_HEAD = """\
# Written by `zhllama render all`. With your own addresses:
# zhllama render serving --size {size}{more} --model s3://bucket/prefix
# It needs the secrets zhllama-s3 (k8s/base/s3-secret.example.yaml) and zhllama-api-key, with the key API_KEY.
"""
