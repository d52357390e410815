"""Verdicts of a real API server (tests/recordings/admission.json.gz), object by object: no miss, and no false alarm."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.manifests.check.check import check
from pipelines.manifests.check.go_yaml import compose, value
from tests import recordings

JUDGED = ("decoding", "validation", "webhook", "pod-security")
NOT_HERE = ("admission", "routing")
"""What needs the cluster: accounts, priority classes and definitions that are there or not."""
VERDICTS = recordings.verdicts()
KINDS = sorted({name.split("/")[0] for name in VERDICTS})


def refused_offline(entry: dict[str, Any], folder: Path) -> list[str]:
    """What `check --level admission` says of the object as it was posted."""
    (folder / "object.yaml").write_text(entry["text"])
    namespace = entry["path"].split("/namespaces/")[-1].split("/")[0] if "/namespaces/" in entry.get("path", "") else ""
    found = check([folder], recordings.crds(), pod_security=entry["namespace_pss"], namespace=namespace)
    return [str(finding) for finding in found if finding.counts_at("admission")]


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_server_refused_is_refused_and_nothing_else(kind: str, tmp_path: Path) -> None:
    misses, false_alarms = [], []
    for name, entry in VERDICTS.items():
        if name.split("/")[0] == kind and (entry["accepted"] or entry["refused_by"] in JUDGED):
            said = refused_offline(entry, tmp_path)
            if entry["accepted"] and said:
                false_alarms.append((name, said))
            elif not entry["accepted"] and not said:
                misses.append((name, entry.get("causes", entry.get("message"))))
    assert (misses, false_alarms) == ([], [])


def test_what_cannot_be_known_without_the_cluster_is_not_judged() -> None:
    left = Counter(entry["refused_by"] for entry in VERDICTS.values() if entry.get("refused_by") not in (None, *JUDGED))
    assert left == {"admission": 4, "routing": 5}


ANOTHER_MATTER = ("quantity-null", "deadline-good", "restart-onfailure", "restart-never")
"""Changes that a definition undoes, or that only a Deployment may not have."""


def test_the_pods_of_a_job_are_held_to_what_their_server_says_later(tmp_path: Path) -> None:
    """The same changes, once to a Deployment's template and once to a PyTorchJob's, whose pods are made later."""
    for name, entry in VERDICTS.items():
        kind, _, change = name.partition("/template/")
        twin = VERDICTS.get(f"deployment/template/{change}")
        if kind == "pytorchjob" and change and twin and not twin["accepted"] and change not in ANOTHER_MATTER:
            (tmp_path / "object.yaml").write_text(entry["text"])
            found = check([tmp_path], recordings.crds())
            assert any(finding.level == "error" for finding in found), name


@pytest.mark.parametrize("name", [name for name, entry in VERDICTS.items() if "read" in entry])
def test_a_scalar_is_read_as_the_server_read_it(name: str) -> None:
    (node,) = compose(VERDICTS[name]["text"])
    found = value(node, lambda place, line: None)["data"]["a"]
    assert {"a": "" if found is None else found} == VERDICTS[name]["read"]
