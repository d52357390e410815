"""Every kustomization builds, and every object of it would be admitted by a cluster."""

import os
from pathlib import Path

import pytest
import yaml

from pipelines.manifests.check.check import check
from tests.k8s.kustomizations import CRDS, FILES, K8S, OVERLAYS, build, by_name, of_kind, place, text
from zhllama.kubernetes.model_server import OURS, ModelServer

FOREIGN = {"PodMonitor", "ExternalSecret"}
"""Kinds of others, whose definitions are seldom at hand."""
COMPONENTS = {path.parent for path in K8S.rglob("kustomization.yaml")} - set(OVERLAYS)


def findings(path: Path) -> list[str]:
    """What `zhllama check` says is wrong, by the definitions that the recording server had."""
    found = check([path], CRDS)
    unchecked = [one for one in found if one.rule == "no-schema" and not any(kind in str(one) for kind in FOREIGN)]
    assert unchecked == []
    return [str(one) for one in found if one.level == "error"]


@pytest.mark.parametrize("folder", OVERLAYS, ids=place)
def test_a_kustomization_builds_and_a_cluster_would_take_each_object(folder, tmp_path):
    assert by_name(build(folder))
    built = tmp_path / "built.yaml"
    built.write_text(text(folder))
    assert findings(built) == []


@pytest.mark.parametrize("path", [path for path in FILES if path.name.endswith(".example.yaml")], ids=place)
def test_an_example_that_no_kustomization_applies_fits_too(path):
    assert findings(path) == []


def test_every_file_is_applied_or_an_example():
    named = set()
    for folder in {*OVERLAYS, *COMPONENTS}:
        value = yaml.safe_load((folder / "kustomization.yaml").read_text())
        named |= {folder / name for name in value.get("resources", ())}
    # the two kinds of serving have the same names, so that one kustomization holds one of them
    loose = {path for path in FILES if path not in named and not path.name.endswith(".example.yaml")}
    assert {path.name for path in loose} == {"kserve.yaml"}


def test_every_component_is_in_an_overlay_but_those_that_not_every_cluster_takes():
    used = set()
    for folder in OVERLAYS:
        value = yaml.safe_load((folder / "kustomization.yaml").read_text())
        used |= {(folder / name).resolve() for name in value.get("components", ())}
    assert {path.name for path in COMPONENTS - used} == {"rdma-ipc-lock", "pod-monitor", "open-network"}


def test_the_check_finds_what_is_wrong(tmp_path):
    policy, *_ = yaml.safe_load_all((K8S / "base" / "network-policies.yaml").read_text())
    policy["spec"]["podSelektor"] = {}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
    assert "[schema]" in findings(tmp_path)[0]


def test_no_secret_is_applied():
    assert not [place(folder) for folder in OVERLAYS if of_kind(build(folder), "Secret")]


def cron_jobs(folder: Path) -> list[tuple[bool, list[str]]]:
    """Of each, whether it is suspended, and its images."""
    jobs = [value["spec"] for value in build(folder) if value["kind"] == "CronJob"]
    pods = [job["jobTemplate"]["spec"]["template"]["spec"] for job in jobs]
    return [(job["suspend"], [one["image"] for one in pod["containers"]]) for job, pod in zip(jobs, pods, strict=True)]


def test_no_cron_job_applied_as_written_starts_an_image_that_no_node_can_pull():
    for folder in OVERLAYS:
        for suspended, images in cron_jobs(folder):
            assert suspended or all("/" in image for image in images), place(folder)


def test_the_overlays_for_a_namespace_have_the_reaper():
    having = {folder.name for folder in OVERLAYS if cron_jobs(folder)}
    assert having >= {"cluster", "profile", "kfp-standalone"}


@pytest.mark.parametrize("name", ["cluster", "profile", "kfp-standalone"])
def test_the_overlay_that_the_reapers_component_describes_wakes_it(name, tmp_path):
    comment = (K8S / "components" / "reaper" / "kustomization.yaml").read_text().split("apiVersion:")[0]
    written = [line.removeprefix("#   ") for line in comment.splitlines() if line.startswith("#   ")]
    place = os.path.relpath(K8S / "overlays" / name, tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text("\n".join([*written, f"resources: [{place}]"]))
    assert cron_jobs(tmp_path) == [(False, ["registry.example.com/team/zhllama-launch-training:0.1.0"])]


@pytest.mark.parametrize("folder", OVERLAYS, ids=place)
def test_no_overlay_needs_prometheus_operator(folder):
    assert not of_kind(build(folder), "PodMonitor")


def test_the_pod_monitor_component_finds_every_served_model():
    (monitor,) = yaml.safe_load_all((K8S / "components" / "pod-monitor" / "pod-monitor.yaml").read_text())
    server = ModelServer(name="any", model="s3://bucket/model")
    assert monitor["spec"]["selector"]["matchLabels"] == OURS
    assert monitor["spec"]["podMetricsEndpoints"] == server.pod_monitor()["spec"]["podMetricsEndpoints"]
