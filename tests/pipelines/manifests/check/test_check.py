"""zhllama check: each broken manifest fails with its rule and no other, ours pass, and findings name the line."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.manifests.check.check import check, node_of
from pipelines.manifests.check.documents import Document, read_documents
from pipelines.manifests.check.pod_rules import Node
from zhllama.errors import InputError
from zhllama.kubernetes.quantity import quantity

ROOT = Path(__file__).resolve().parents[4]
HERE = Path(__file__).parent
BROKEN = sorted((HERE / "broken").glob("*.yaml"))
CRDS = ROOT.parent / "shared" / "crds"
needs_crds = pytest.mark.skipif(
    not CRDS.is_dir(), reason="NOT CHECKED: no definitions of custom resources beside this repository (../shared/crds)"
)


@needs_crds
@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_a_broken_manifest_fails_with_its_rule_alone(path: Path) -> None:
    errors = [finding for finding in check([path], CRDS) if finding.level == "error"]
    assert {finding.rule for finding in errors} == {path.name.split(".")[0]}, errors
    assert all(1 < finding.line <= len(path.read_text(encoding="utf-8").splitlines()) for finding in errors)


@needs_crds
def test_what_they_are_made_from_passes() -> None:
    assert check([HERE / "good.yaml", HERE / "good-trainjob.yaml"], CRDS) == []


def test_there_is_a_broken_manifest_for_every_rule() -> None:
    rules = set()
    for path in (ROOT / "pipelines" / "manifests" / "check").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                words = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                if name == "error":  # document.error(rule, message, *place)
                    rules |= set(words[:1])
                elif name == "Finding" and "error" in words:  # Finding(file, line, "error", rule, message)
                    rules |= set(words[words.index("error") + 1 :][:1])
    assert rules == {path.name.split(".")[0] for path in BROKEN}


@pytest.mark.slow
@needs_crds
def test_our_own_manifests_pass() -> None:
    assert [str(finding) for finding in check([ROOT / "k8s"], CRDS) if finding.level == "error"] == []


def test_what_two_files_share_word_for_word_is_not_said_twice(tmp_path: Path) -> None:
    policy = next(text for text in (ROOT / "k8s/serving/13b/vllm.yaml").read_text().split("---\n"))
    for name in ("one.yaml", "two.yaml"):
        (tmp_path / name).write_text(policy)
    assert check([tmp_path]) == []
    (tmp_path / "two.yaml").write_text(policy.replace("port: 9000", "port: 9001"))
    assert [finding.rule for finding in check([tmp_path])] == ["twice"]


def test_without_definitions_the_rules_still_hold_and_it_says_what_was_not_checked() -> None:
    found = check([HERE / "broken" / "container-name.yaml"])
    assert {(finding.level, finding.rule) for finding in found} == {
        ("warning", "no-schema"), ("error", "container-name"),
    }  # fmt: skip


def test_a_finding_names_the_line_of_the_field() -> None:
    path = HERE / "broken" / "image-pinned.latest.yaml"
    (line,) = [number for number, text in enumerate(path.read_text().splitlines(), 1) if "image:" in text]
    (finding,) = [finding for finding in check([path]) if finding.level == "error"]
    assert finding.line == line
    assert str(finding).startswith(f"{path}:{line}: error [image-pinned] ")


def test_an_operators_init_container_is_pointed_out_for_several_nodes(tmp_path: Path) -> None:
    text = (HERE / "good.yaml").read_text()
    (head, master) = text.split("    Master:\n")
    (tmp_path / "job.yaml").write_text(f"{head}    Master:\n{master}    Worker:\n{master}")
    assert "operator-init" in {finding.rule for finding in check([tmp_path])}


def test_a_trainjobs_findings_name_the_lines_of_its_trainer() -> None:
    path = HERE / "broken" / "image-pinned.trainjob.yaml"
    (line,) = [number for number, text in enumerate(path.read_text().splitlines(), 1) if "image:" in text]
    assert [finding.line for finding in check([path]) if finding.level == "error"] == [line]


def test_of_a_runtime_that_is_not_at_hand_it_says_that_its_pods_are_not_checked(tmp_path: Path) -> None:
    text = (HERE / "broken" / "image-pinned.trainjob.yaml").read_text()
    (tmp_path / "job.yaml").write_text(text.replace("name: torch-distributed", "name: our-own"))
    assert {(finding.level, finding.rule) for finding in check([tmp_path])} == {
        ("warning", "no-schema"), ("warning", "runtime"),
    }  # fmt: skip


def test_lists_and_anchors_are_read_as_a_cluster_reads_them(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(
        "apiVersion: v1\nkind: List\nitems:\n"
        "  - &one\n    apiVersion: v1\n    kind: ConfigMap\n    metadata: {name: a}\n"
        "  - <<: *one\n    metadata: {name: b}\n---\n---\n"
    )
    documents = [each for each in read_documents(tmp_path / "list.yaml") if isinstance(each, Document)]
    assert [(each.kind, each.name, each.line(("metadata", "name"))) for each in documents] == [
        ("ConfigMap", "a", 7), ("ConfigMap", "b", 9),
    ]  # fmt: skip
    assert check([tmp_path]) == []


@needs_crds
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("apiVersion: kubeflow.org/v1\nkind: PyTorchJob\nspec: {}\n", "[schema] "),
        ("apiVersion: v1\nkind: ConfigMap\n? [a]\n: b\n", "[yaml] not YAML: a key is no text"),
        ("apiVersion: v1\nkind: ConfigMap\nmetadata: a\n", "[schema] metadata"),
        ("apiVersion: true\nkind: ConfigMap\n", "[yaml] not a Kubernetes object"),
    ],
    ids=["no metadata", "a list as a key", "metadata that is a text", "no text as apiVersion"],
)
def test_what_no_cluster_could_read_is_a_finding_too(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(text)
    assert said in str(check([tmp_path], CRDS)[0])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("500m", 0.5),
        ("64Gi", 64 * 2**30),
        ("384Gi", 384 * 2**30),
        ("500M", 5e8),
        ("1.5Ti", 1.5 * 2**40),
        ("1e3", 1000),
        (8, 8),
        ("0.5", 0.5),
        ("2M", 2e6),
        ("many", None),
        (None, None),
    ],
)
def test_quantities(text: object, value: float | None) -> None:
    assert quantity(text) == value


def test_the_largest_node_may_be_named() -> None:
    assert node_of("cpu=96, memory=1Ti,gpus=8") == Node(cpu=96, memory=2**40, gpus=8)
    found = check([HERE / "good.yaml"], node=node_of("cpu=4"))
    assert [finding.message for finding in found if finding.rule == "fits"] == [
        "cpu: the pod asks for 8, the largest node has 4"
    ]
    with pytest.raises(InputError, match=r"--largest-node disk=3: write cpu=…"):
        node_of("disk=3")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["good.yaml"], 0, "0 errors"),
        (["broken/token.yaml", "good.yaml"], 1, "token.yaml:"),
        (["nowhere.yaml"], 2, "nowhere.yaml: no such file or folder"),
        (["../../demo"], 2, "../demo: no YAML file is in it"),
        (["good.yaml", "--crds", "nowhere"], 2, "--crds nowhere: no such folder"),
    ],
    ids=["good", "broken", "missing", "nothing", "no definitions"],
)
def test_the_command_ends_with_what_it_found(arguments: list[str], code: int, said: str) -> None:
    command = [sys.executable, "-m", "pipelines", "check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
