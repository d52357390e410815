"""`zhllama render base` writes what kubectl kustomize would, for a namespace and a registry."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.manifests import base
from pipelines.manifests.base import K8S, base_objects
from tests.k8s.kustomizations import KUBECTL, by_name, of_kind
from zhllama.errors import InputError


def zhllama(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "pipelines", "render", *words], capture_output=True, text=True)


def by_kubectl(folder: Path, **fields: Any) -> list[dict[str, Any]]:
    """What kubectl builds of a kustomization of one's own."""
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(fields))
    done = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize(("words", "overlay"), [([], "cluster"), (["--without-namespace"], "profile")])
def test_it_is_the_overlay_in_another_namespace_with_other_images(words, overlay, tmp_path):
    done = zhllama("base", "--namespace", "team", "--registry", "r.example.com/t", "--tag", "2", *words)
    assert done.returncode == 0, done.stderr
    transformer = {
        "apiVersion": "builtin",
        "kind": "NamespaceTransformer",
        "metadata": {"name": "namespace", "namespace": "team"},
        "setRoleBindingSubjects": "allServiceAccounts",
    }
    # kustomize takes kinds that it does not know for a namespace's
    of_the_cluster = {
        "apiVersion": "builtin",
        "kind": "PatchTransformer",
        "metadata": {"name": "of-the-cluster"},
        "target": {"kind": "ValidatingAdmissionPolicy.*"},
        "patch": yaml.safe_dump([{"op": "remove", "path": "/metadata/namespace"}]),
    }
    image = {"name": "zhllama-launch-training", "newName": "r.example.com/t/zhllama-launch-training", "newTag": "2"}
    awake = [{"op": "replace", "path": "/spec/suspend", "value": False}]
    wanted = by_kubectl(
        tmp_path,
        resources=[os.path.relpath(K8S / "overlays" / overlay, tmp_path)],
        namespace="team",
        transformers=[yaml.safe_dump(one) for one in (transformer, of_the_cluster)],
        images=[image],
        patches=[{"target": {"kind": "CronJob", "name": "zhllama-reaper"}, "patch": yaml.safe_dump(awake)}],
    )
    assert by_name(list(yaml.safe_load_all(done.stdout))) == by_name(wanted)


def test_the_components_are_a_choice():
    objects = base_objects("team", with_namespace=False, components=["reaper"])
    assert set(of_kind(objects, "Role")) == {"zhllama-runner", "zhllama-reaper"}
    assert of_kind(objects, "CronJob")
    assert not of_kind(objects, "Namespace")
    assert of_kind(base_objects("team"), "Namespace").keys() == {"team"}
    assert not [value for value in base_objects(components=[]) if value["kind"] in ("CronJob", "LocalQueue")]


def test_the_reaper_sleeps_until_its_image_has_a_registry():
    (cron,) = of_kind(base_objects("team", components=["reaper"]), "CronJob").values()
    assert cron["spec"]["suspend"] is True


def test_keys_for_a_namespace_that_cannot_be_are_not_made():
    done = zhllama("dev-secrets", "--namespace", "My_Team")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "--namespace: 'My_Team' must be lower-case letters" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--namespace", "My_Team"], "--namespace: 'My_Team' must be lower-case letters"),
        (["--without-namespace"], "--without-namespace: whose namespace is it?"),
        (["--components", "reaper,kue"], r"--components kue: there is no such component (did you mean kueue?)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_meant_is_refused_in_one_line(words, said):
    done = zhllama("base", *words)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert said in done.stderr


def test_without_kubectl_or_a_clone_it_says_so_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(base.shutil, "which", lambda *_, **__: None)
    with pytest.raises(InputError, match="kubectl is not here; install it"):
        base_objects("team")
    monkeypatch.setattr(base, "K8S", tmp_path / "k8s")
    with pytest.raises(InputError, match="run it from a clone"):
        base_objects("team")


def test_a_namespace_that_yaml_takes_for_something_else_is_a_name() -> None:
    assert {one["metadata"].get("namespace", "y") for one in base_objects("y")} == {"y"}
