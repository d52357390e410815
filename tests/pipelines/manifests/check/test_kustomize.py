"""Folders of kustomize: a patch is no object."""

from pathlib import Path

from pipelines.manifests.check.check import check

KUSTOMIZATION = """
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [server.yaml]
patches:
- path: more.yaml
- path: json.yaml
  target: {kind: Deployment}
- patch: '[{op: remove, path: /spec}]'
patchesStrategicMerge: [merged.yaml]
replacements: [{path: replaced.yaml}]
configMapGenerator: [{name: settings, files: [settings.yaml, key=other.yaml]}]
"""


def test_what_a_kustomization_names_as_a_patch_is_not_checked(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text(KUSTOMIZATION)
    (tmp_path / "server.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n")
    part = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\nspec: {replicas: 3}\n"
    for name in ("more", "merged", "other"):
        (tmp_path / f"{name}.yaml").write_text(part)
    for name in ("json", "replaced", "settings"):
        (tmp_path / f"{name}.yaml").write_text("- {op: remove, path: /spec}\n")
    assert check([tmp_path]) == []
    (tmp_path / "unnamed.yaml").write_text(part)
    assert {Path(finding.file).name for finding in check([tmp_path])} == {"unnamed.yaml"}
    assert check([tmp_path / "more.yaml"])


def test_a_kustomization_that_is_none_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("patches: 3\nkind: [\n")
    (tmp_path / "a.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: A}\n")
    assert [finding.rule for finding in check([tmp_path])] == ["validation", "yaml"]
