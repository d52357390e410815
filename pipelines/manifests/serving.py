"""Served models as manifests for `kubectl apply`: from the sizes, through ModelServer, as --deploy makes them."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipelines.sizes import Size
from zhllama.errors import InputError
from zhllama.kubernetes.model_server import ModelServer
from zhllama.kubernetes.names import LABEL

AUTOSCALED = "autoscaled"


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
        name=name or size.served_as,
        model=model or f"s3://zhllama/artifacts/models/{size.name}-chinese",
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
