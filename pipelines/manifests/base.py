"""What runs need in their namespace, for `kubectl apply`: the overlays of k8s/, for a namespace and a registry.

The YAML files are the one definition, comments and all; here a name is put into them. And keys for trying it out, made
afresh at each call.
"""

import difflib
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.manifests.kustomize import build, set_namespace
from zhllama.errors import InputError
from zhllama.kubernetes.names import check_namespace
from zhllama.kubernetes.serving_pod import KEY
from zhllama.stage.images import VERSION, image

K8S = Path(__file__).parents[2] / "k8s"
COMPONENTS = ("deployer", "kueue", "quota", "reaper")
"""What an overlay may put to the base."""


def base_objects(
    namespace: str = "", with_namespace: bool = True, components: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """The cluster overlay's objects, or for a namespace that others own the profile overlay's; `components` instead of
    the overlay's own. Images are named as the environment says (zhllama.stage.images)."""
    if namespace:
        check_namespace("--namespace", namespace)
    if not namespace and not with_namespace:
        raise InputError("--without-namespace: whose namespace is it? Name it with --namespace")
    chosen = None if components is None else [_component(name) for name in components]
    if chosen is not None and not with_namespace:
        chosen.append(K8S / "components" / "in-shared-namespace")
    objects = build(K8S / "overlays" / ("cluster" if with_namespace else "profile"), chosen)
    if namespace:
        set_namespace(objects, namespace)
    _name_images(objects)
    _wake_reaper(objects)
    return objects


def _component(name: str) -> Path:
    if name not in COMPONENTS:
        near = difflib.get_close_matches(name, COMPONENTS, n=1)
        raise InputError(
            f"--components {name}: there is no such component{f' (did you mean {near[0]}?)' if near else ''}; use "
            f"{', '.join(COMPONENTS)}"
        )
    return K8S / "components" / name


def _name_images(value: Any) -> None:
    """Our images, as the files name them (without a registry, of this version), by their whole names."""
    if isinstance(value, list):
        for one in value:
            _name_images(one)
    elif isinstance(value, dict):
        for name, one in value.items():
            found = re.fullmatch(rf"zhllama-([a-z-]+):{re.escape(VERSION)}", one) if isinstance(one, str) else None
            if name == "image" and found:
                value[name] = image(found[1])
            _name_images(one)


def _wake_reaper(objects: list[dict[str, Any]]) -> None:
    """The CronJob is suspended while its image is named without a registry, which no node can pull."""
    for value in objects:
        if value["kind"] == "CronJob":
            containers = value["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
            value["spec"]["suspend"] = not all("/" in container["image"] for container in containers)


def dev_secrets(namespace: str) -> list[dict[str, Any]]:
    """The secrets for k8s/dev, with fresh keys: S3's, for its SeaweedFS and all who use it, and a served model's.
    InputError for what no namespace is called."""
    check_namespace("--namespace", namespace)
    s3 = {
        "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        "AWS_DEFAULT_REGION": "us-east-1",
        "ZHLLAMA_S3_ENDPOINT": f"http://seaweedfs.{namespace}.svc:8333",
    }
    return [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": namespace}, "stringData": values}
        for name, values in (("zhllama-s3", s3), ("zhllama-api-key", {KEY: secrets.token_hex(20)}))
    ]
