"""A compiled pipeline is no object of a cluster, and its steps' pods are."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.manifests.check.check import check

PACKAGE: dict[str, Any] = {
    "pipelineInfo": {"name": "adapt"},
    "schemaVersion": "2.1.0",
    "root": {"dag": {"tasks": {}}},
    "components": {},
    "deploymentSpec": {
        "executors": {
            "exec-train": {
                "container": {
                    "image": "registry.example.com/team/zhllama-train:1.0.0",
                    "command": ["python", "-m", "components.train"],
                    "args": ["--steps", "{{$.inputs.parameters['steps']}}"],
                    "env": [{"name": "HOME", "value": "/tmp"}],
                    "resources": {"resourceCpuLimit": "4", "resourceMemoryLimit": "{{$.inputs.parameters['memory']}}"},
                }
            }
        }
    },
}
SETTINGS: dict[str, Any] = {
    "emptyDirMounts": [{"volumeName": "tmp", "mountPath": "/tmp", "sizeLimit": "64Gi"}],
    "secretAsVolume": [{"secretName": "s3", "mountPath": "/etc/s3", "optional": True}],
    "podMetadata": {"labels": {"zhllama.io/size": "7b"}},
    "tolerations": [{"key": "gpu", "operator": "Exists", "tolerationSeconds": "5", "effect": "NoExecute"}],
    "nodeSelector": {"labels": {"gpu": "a100"}},
    "imagePullSecret": [{"secretName": "pull"}],
}


def checked(
    folder: Path, container: dict[str, Any], settings: dict[str, Any], standard: str = "restricted"
) -> list[tuple[str, str, str]]:
    package = yaml.safe_load(yaml.safe_dump(PACKAGE))
    package["deploymentSpec"]["executors"]["exec-train"]["container"] |= container
    platform = {"platforms": {"kubernetes": {"deploymentSpec": {"executors": {"exec-train": SETTINGS | settings}}}}}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump_all([package, platform]))
    return [(finding.grade, finding.rule, finding.message) for finding in check([folder], pod_security=standard)]


def test_a_compiled_pipeline_passes(tmp_path: Path) -> None:
    assert checked(tmp_path, {}, {}) == []


@pytest.mark.parametrize(
    ("container", "settings", "said"),
    [
        ({"env": [{"name": "A=B", "value": "1"}]}, {}, "train's pod: spec.containers[0].env[0].name: 'A=B'"),
        ({"resources": {"resourceMemoryLimit": "64GB"}}, {}, "spec.containers[0].resources.limits.memory: '64GB'"),
        (
            {"resources": {"accelerator": {"resourceType": "gpu", "resourceCount": "1"}}},
            {},
            "limits.gpu: is no resource",
        ),
        ({}, {"podMetadata": {"labels": {"a": "b c"}}}, "metadata.labels: a: 'b c'"),
        ({}, {"emptyDirMounts": [{"volumeName": "T", "mountPath": "/tmp"}]}, "spec.volumes[1].name: 'T'"),
        ({}, {"nodeSelector": {"labels": {"a b": "c"}}}, "spec.nodeSelector: key 'a b'"),
        ({}, {"tolerations": [{"key": "a", "operator": "Equals"}]}, "spec.tolerations[0].operator: 'Equals'"),
        ({}, {"secretAsVolume": [{"secretName": "a", "mountPath": "/tmp"}]}, "mountPath: /tmp is mounted already"),
    ],
    ids=["variable", "memory", "gpu", "label", "volume", "selector", "toleration", "mounts"],
)
def test_its_pods_are_checked(container: dict[str, Any], settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    ((grade, _, message),) = checked(tmp_path, container, settings)
    assert grade == "works"
    assert said in message


def test_advice_is_given_for_its_containers(tmp_path: Path) -> None:
    found = checked(tmp_path, {"image": "a:latest", "env": [{"name": "HF_TOKEN", "value": "hf"}]}, {})
    assert [(grade, rule) for grade, rule, _ in found] == [("advice", "image-pinned"), ("advice", "plain-secret")]


@pytest.mark.parametrize(
    ("context", "standard", "said"),
    [
        ({"runAsNonRoot": True, "runAsUser": "1234"}, "restricted", []),
        ({"runAsNonRoot": False}, "restricted", ["train's pod: spec.containers[0].securityContext.runAsNonRoot"]),
        ({"runAsUser": "0"}, "restricted", ["train's pod: spec.containers[0].securityContext.runAsUser"]),
        ({"allowPrivilegeEscalation": True}, "restricted", ["spec.containers[0].securityContext.allowPrivilege"]),
        ({"privileged": True}, "baseline", ["spec.containers[0].securityContext.privileged"]),
        ({"runAsUser": "0"}, "baseline", []),
        ({"privileged": True}, "privileged", []),
    ],
)
def test_a_step_is_held_to_the_security_that_its_package_says(
    tmp_path: Path, context: dict[str, Any], standard: str, said: list[str]
) -> None:
    found = checked(tmp_path, {}, {"securityContext": context}, standard)
    assert [(grade, rule) for grade, rule, _ in found] == [("works", standard)] * len(said)
    assert all(words in message for words, (_, _, message) in zip(said, found, strict=True))
