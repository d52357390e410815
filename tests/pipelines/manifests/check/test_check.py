"""zhllama check: each broken manifest fails with its rule and no other, ours pass, and findings name the line."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.manifests.check.check import check, node_of
from pipelines.manifests.check.documents import Document, Finding, read_documents
from pipelines.manifests.check.pod_rules import Node
from pipelines.manifests.check.schema import definitions
from tests import recordings
from zhllama.errors import InputError
from zhllama.kubernetes.formats import amount

ROOT = Path(__file__).resolve().parents[4]
HERE = Path(__file__).parent
BROKEN = sorted((HERE / "broken").glob("*.yaml"))
CRDS = recordings.crds()
BESIDE = {"dns-name.trainjob": {"schema"}, "restricted.privileged": {"validation"}, "schema": {"deadlines"}}
"""Rules that a broken manifest breaks too."""


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_a_broken_manifest_fails_with_its_rule_alone(path: Path) -> None:
    found = check([path], CRDS)
    beside = BESIDE.get(path.stem, set()) | {"operator-init"}
    assert {finding.rule for finding in found} - beside == {path.name.split(".")[0]}, found
    assert all(0 < finding.line <= len(path.read_text(encoding="utf-8").splitlines()) for finding in found)


def test_what_they_are_made_from_passes() -> None:
    assert check([HERE / "good.yaml", HERE / "good-trainjob.yaml"], CRDS) == []


def test_there_is_a_broken_manifest_for_every_rule_that_the_docs_name() -> None:
    page = (ROOT / "docs" / "checking-manifests.md").read_text()
    named = {rule for row in re.findall(r"^\| (`.*?) \|", page, re.M) for rule in re.findall(r"`([a-z-]+)`", row)}
    others = {"admission", "works", "advice", "baseline", "no-schema", "runtime", "operator-init"}
    assert named - others == {path.name.split(".")[0] for path in BROKEN}


@pytest.mark.slow
def test_our_own_manifests_pass() -> None:
    assert [str(finding) for finding in check([ROOT / "k8s"], CRDS) if finding.level == "error"] == []


# --- levels -----------------------------------------------------------------------------------------------------------

JOB = yaml.safe_load((HERE / "good.yaml").read_text())


def changed(value: Any, way: Sequence[Any], new: Any) -> Any:
    """A copy of a value with another one at the end of the way; ... takes it out."""
    made = json.loads(json.dumps(value))
    at = made
    for step in way[:-1]:
        at = at[step]
    if new is ...:
        del at[way[-1]]
    else:
        at[way[-1]] = new
    return made


MASTER = ("spec", "pytorchReplicaSpecs", "Master")
POD = (*MASTER, "template", "spec")


@pytest.mark.parametrize(
    ("way", "new", "grade", "rule"),
    [
        (("spec", "runPolicy", "backoffLimit"), ..., "advice", "deadlines"),
        ((*POD, "containers", 0, "imagePullPolicy"), "Sometimes", "works", "validation"),
        ((*POD, "containers", 0, "resources", "limits", "nvidia.com/gpu"), "4", "works", "gpu-limits"),
        ((*POD, "hostPID"), True, "works", "restricted"),
        ((*MASTER, "restartPolicy"), "Sometimes", "works", "restart-policy"),
        ((*MASTER, "replicas"), ..., "admission", "one-master"),
        ((*MASTER, "replicas"), 2, "admission", "one-master"),
        ((*MASTER, "tempalte"), {}, "admission", "schema"),
        (("metadata", "labels", "a"), "b c", "admission", "validation"),
        (("metadata", "name"), "a.b", "admission", "dns-name"),
        (("metadata", "name"), "a" * 60, "works", "dns-name"),
        (("spec", "runPolicy", "managedBy"), "me", "admission", "webhook"),
        (("spec", "pytorchReplicaSpecs", "worker"), {}, "admission", "webhook"),
        (("spec", "runPolicy", "cleanPodPolicy"), "Never", "works", "run-policy"),
        (("spec", "runPolicy", "ttlSecondsAfterFinished"), -1, "works", "run-policy"),
    ],
    ids=lambda value: "-".join(map(str, value))[-40:] if isinstance(value, tuple) else str(value)[:20],
)
def test_what_a_finding_weighs(way: Sequence[Any], new: Any, grade: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps(changed(JOB, way, new)))
    assert (grade, rule) in {(finding.grade, finding.rule) for finding in check([tmp_path], CRDS)}


def test_a_generated_name_is_held_to_the_rules_of_names(tmp_path: Path) -> None:
    job = changed(JOB, ("metadata", "name"), ...)
    for prefix, rules in (("llama-", set()), ("7b-", {"dns-name"})):
        (tmp_path / "job.yaml").write_text(json.dumps(changed(job, ("metadata", "generateName"), prefix)))
        assert {finding.rule for finding in check([tmp_path], CRDS)} == rules


def test_a_standard_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps(changed(JOB, (*POD, "securityContext"), {})))
    rules = {
        standard: {finding.rule for finding in check([tmp_path], CRDS, pod_security=standard)}
        for standard in ("privileged", "baseline", "restricted")
    }
    assert rules == {"privileged": set(), "baseline": set(), "restricted": {"restricted"}}


def test_all_errors_of_a_schema_are_said(tmp_path: Path) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"a": 1, "b": 2, "containers": 3}}
    (tmp_path / "pod.yaml").write_text(json.dumps(pod))
    assert len([finding for finding in check([tmp_path]) if finding.rule == "schema"]) == 3


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_stands_in_an_object_is_no_traceback(data: st.DataObject) -> None:
    verdicts = recordings.verdicts()
    value = verdicts[data.draw(st.sampled_from([name for name in verdicts if name.endswith("/good")]))]["object"]
    for _ in range(data.draw(st.integers(1, 3))):
        way = data.draw(st.sampled_from(list(_ways(value))))
        odd = st.sampled_from(
            [None, True, -1, 1.5, 10**30, "", "A B", "中", [], [None], [[]], {}, {"a": None}, {"": ""}]
        )
        value = changed(value, way, data.draw(odd))
    found = _checked(json.dumps(value))
    assert all(isinstance(str(finding), str) for finding in found)


def _ways(value: Any, way: tuple[Any, ...] = ()) -> Any:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield (*way, step)
        yield from _ways(inner, (*way, step))


def _checked(text: str) -> list[Finding]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return check([Path(file.name)], CRDS)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("metadata: {name: {{ .Release.Name }}}\n", "a template of Helm"),
        ("a: &a [*a]\n", "an anchor holds itself"),
        ("a: *b\n", "undefined alias"),
        ("[" * 600 + "]" * 600, "nested deeper"),
        ("a: [1\n", "not YAML"),
        ("a: .inf\n", "JSON has no .inf"),
        ("hello\n", "not a Kubernetes object"),
        ("~: a\nkind: b\n", "a key is null"),
    ],
    ids=["helm", "cycle", "alias", "deep", "bracket", "infinite", "text", "null key"],
)
def test_odd_files_are_one_line_each_and_the_others_are_checked(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: A}\n")
    found = check([tmp_path])
    assert [(Path(one.file).name, one.rule, one.grade) for one in found] == [
        ("a.yaml", "yaml", "admission"), ("b.yaml", "validation", "admission"),
    ]  # fmt: skip
    assert said in found[0].message


def test_a_file_that_is_no_text_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n")
    assert [finding.message for finding in check([tmp_path])] == ["not readable: not UTF-8; give YAML files"]


def test_a_file_without_an_end_is_passed_over_and_many_beginnings_of_a_template_take_no_time(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text(f"a: '{'{{' * 200_000}'\n")
    begun = time.process_time()
    assert [finding.rule for finding in check([tmp_path])] == ["yaml"]
    assert time.process_time() - begun < 10


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n---\n", "apiVersion: v1\nkind: List\nitems: []\n"])
def test_an_input_without_an_object_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert [finding.grade for finding in check([tmp_path / "a.yaml"])] == ["admission"]


def test_what_kubectl_cannot_send_is_not_what_a_server_refuses(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("apiVersion: v1\nmetadata: {name: a}\ndata: {a: b}\n")
    assert [finding.grade for finding in check([tmp_path])] == ["works"]


def test_a_namespace_beside_that_of_kubectl_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a, namespace: b}\n")
    assert check([tmp_path], namespace="b") == check([tmp_path]) == []
    assert [finding.grade for finding in check([tmp_path], namespace="c")] == ["admission"]


def test_what_two_files_share_word_for_word_is_not_said_twice(tmp_path: Path) -> None:
    policy = next(text for text in (ROOT / "k8s/serving/13b/vllm.yaml").read_text().split("---\n"))
    for name in ("one.yaml", "two.yaml"):
        (tmp_path / name).write_text(policy)
    assert check([tmp_path]) == []
    (tmp_path / "two.yaml").write_text(policy.replace("port: 9000", "port: 9001"))
    assert [finding.rule for finding in check([tmp_path])] == ["twice"]


def test_without_definitions_the_rules_still_hold_and_it_says_what_was_not_checked() -> None:
    found = check([HERE / "broken" / "container-name.yaml"])
    assert {(finding.grade, finding.rule) for finding in found} == {
        ("advice", "no-schema"), ("admission", "container-name"),
    }  # fmt: skip


def test_a_finding_names_the_line_of_the_field() -> None:
    path = HERE / "broken" / "image-pinned.latest.yaml"
    (line,) = [number for number, text in enumerate(path.read_text().splitlines(), 1) if "image:" in text]
    (finding,) = [finding for finding in check([path]) if finding.rule == "image-pinned"]
    assert finding.line == line
    assert finding.said("advice").startswith(f"{path}:{line}: error [image-pinned] ")
    assert str(finding).startswith(f"{path}:{line}: warning [image-pinned] ")


def test_an_operators_init_container_is_pointed_out_for_several_nodes(tmp_path: Path) -> None:
    text = (HERE / "good.yaml").read_text()
    (head, master) = text.split("    Master:\n")
    (tmp_path / "job.yaml").write_text(f"{head}    Master:\n{master}    Worker:\n{master}")
    assert "operator-init" in {finding.rule for finding in check([tmp_path])}


def test_a_trainjobs_findings_name_the_lines_of_its_trainer() -> None:
    path = HERE / "broken" / "image-pinned.trainjob.yaml"
    (line,) = [number for number, text in enumerate(path.read_text().splitlines(), 1) if "image:" in text]
    assert [finding.line for finding in check([path]) if finding.rule == "image-pinned"] == [line]


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("apiVersion: kubeflow.org/v1\nkind: PyTorchJob\nspec: {}\n", "[validation] metadata.name: is needed"),
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
    assert amount(text) == value


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
        (["good.yaml"], 0, "0 errors, 1 warning"),
        (["broken/token.yaml"], 0, "token.yaml:"),
        (["broken/token.yaml", "--level", "advice"], 1, "error [token]"),
        (["broken/restricted.user.yaml"], 1, "error [restricted]"),
        (["broken/restricted.user.yaml", "--level", "admission"], 0, "warning [restricted]"),
        (["broken/restricted.user.yaml", "--pod-security", "baseline"], 0, "0 errors"),
        (["broken/container-name.yaml", "--level", "admission"], 1, "(admission)"),
        ([], 1, "no object is in it"),
        (["good.yaml", "--kubernetes", "9.9"], 2, "--kubernetes 9.9: known are 1.25"),
        (["nowhere.yaml"], 2, "nowhere.yaml: no such file or folder"),
        (["../../demo"], 2, "../demo: no YAML file is in it"),
        (["good.yaml", "--crds", "nowhere"], 2, "--crds nowhere: no such folder"),
    ],
    ids=[
        "good", "advice", "advice counts", "works", "admission alone", "another standard", "refused", "empty input",
        "version", "missing", "nothing", "no definitions",
    ],
)  # fmt: skip
def test_the_command_ends_with_what_it_found(arguments: list[str], code: int, said: str) -> None:
    command = [sys.executable, "-m", "pipelines", "check", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, input="", cwd=HERE, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


GOOD_DEFINITION = """\
kind: CustomResourceDefinition
spec:
  group: example.com
  names: {kind: Thing}
  versions:
    - name: v1
      served: true
      schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
"""
DAMAGED = {
    "without a spec": ("spec:", "other:"),
    "a text as its spec": (GOOD_DEFINITION.partition("\n")[2], "spec: 5\n"),
    "a list of names": ("{kind: Thing}", "[Thing]"),
    "a kind that is none": ("kind: Thing", "kind: [Thing]"),
    "a group that is none": ("group: example.com", "group: {}"),
    "a version that is none": ("served: true", "serves: true"),
    "a schema that is none": ("{type: object, x-", "[type, x-"),
    "an unknown type": ("type: object", "type: thing"),
    "a pattern that is none": ("type: object", "pattern: '('"),
    "a rule that is none": ("type: object", "x-kubernetes-validations: [5]"),
    "a schema from elsewhere": ("type: object", "$ref: 'http://127.0.0.1:9/schema'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_definition_is_a_line(tmp_path: Path, name: str) -> None:
    before, after = DAMAGED[name]
    assert before in GOOD_DEFINITION
    (tmp_path / "crd.yaml").write_text(GOOD_DEFINITION.replace(before, after, 1))
    with pytest.raises(InputError, match=r"^--crds \S+/crd.yaml: (no CustomResourceDefinition: spec|not a readable)"):
        definitions(tmp_path)


def test_a_definition_without_fields_takes_whatever_there_is(tmp_path: Path) -> None:
    (tmp_path / "crd.yaml").write_text(GOOD_DEFINITION)
    thing = tmp_path / "thing.yaml"
    thing.write_text("apiVersion: example.com/v1\nkind: Thing\nmetadata: {name: a}\nspec: {a: [b]}\n")
    assert check([thing], tmp_path) == []


def test_what_is_no_schema_in_a_definition_stays_as_it_is(tmp_path: Path) -> None:
    """A value that is allowed may have fields that are called as a schema's are."""
    allowed = "{properties: {size: 1}, format: int32, type: integer}"
    schema = f"{{type: object, properties: {{spec: {{type: object, enum: [{allowed}], properties: "
    schema += "{properties: {type: object, x-kubernetes-preserve-unknown-fields: true}, format: {type: string}, "
    schema += "type: {type: string}}}}}"
    plain = "{type: object, x-kubernetes-preserve-unknown-fields: true}"
    (tmp_path / "crd.yaml").write_text(GOOD_DEFINITION.replace(plain, schema))
    thing = tmp_path / "thing.yaml"
    thing.write_text(f"apiVersion: example.com/v1\nkind: Thing\nmetadata: {{name: a}}\nspec: {allowed}\n")
    assert check([thing], tmp_path) == []
