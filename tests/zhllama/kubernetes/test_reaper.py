"""The reaper against an API server: what it deletes, what it leaves, and what it needs to be told."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.kubernetes_server import KubernetesServer
from zhllama.errors import InputError
from zhllama.kubernetes.reaper import reap

OLD = "2026-01-01T00:00:00Z"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KubernetesServer]:
    with KubernetesServer() as started:
        monkeypatch.setenv("KUBECONFIG", str(started.kubeconfig(tmp_path / "kubeconfig")))
        yield started


@pytest.fixture
def put(server: KubernetesServer) -> Callable[..., None]:
    """`put(kind, name, …)`: an object in the namespace, as the API server keeps it."""
    roots = {
        "PyTorchJob": "apis/kubeflow.org/v1/namespaces/team/pytorchjobs",
        "TrainJob": "apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs",
        "Workflow": "apis/argoproj.io/v1alpha1/namespaces/team/workflows",
    }

    def create(
        kind: str, name: str, run: str = "", owner: str = "", created: str = OLD, phase: str = "", ended: str = ""
    ) -> None:
        label = "pipeline/runid" if kind == "Workflow" else "zhllama.io/run"
        metadata: dict[str, Any] = {
            "name": name,
            "namespace": "team",
            "uid": f"uid-{name}",
            "creationTimestamp": created,
        }
        if run:
            metadata["labels"] = {label: run}
        if owner:
            metadata["ownerReferences"] = [{"kind": "Workflow", "name": owner, "uid": f"uid-{owner}"}]
        status: dict[str, Any] = {"phase": phase} if phase else {}
        if ended:
            status["conditions"] = [{"type": "Running", "status": "False"}, {"type": ended, "status": "True"}]
        server.objects[f"/{roots[kind]}/{name}"] = {"kind": kind, "metadata": metadata, "status": status}

    return create


def test_jobs_of_runs_that_ended_or_are_gone_are_deleted_and_no_others(server, put):
    put("Workflow", "alive", run="run-1", phase="Running")
    put("Workflow", "begun", run="run-9")  # no phase yet
    for phase in ("Succeeded", "Failed", "Error"):
        put("Workflow", f"over-{phase}", run=f"run-{phase}", phase=phase)
        put("PyTorchJob", f"left-{phase.lower()}", run=f"run-{phase}", owner=f"over-{phase}")
    put("PyTorchJob", "gone", run="run-5", owner="vanished")
    put("TrainJob", "left-too", run="run-Failed", owner="over-Failed")
    put("PyTorchJob", "unowned", run="run-Succeeded")  # found by the run's label
    kept = {"runs", "begins", "finished", "done", "by-hand", "no-run"}
    put("PyTorchJob", "runs", run="run-1", owner="alive")
    put("PyTorchJob", "begins", run="run-9", owner="begun")
    put("PyTorchJob", "finished", run="run-Failed", owner="over-Failed", ended="Succeeded")
    put("TrainJob", "done", run="run-Failed", owner="over-Failed", ended="Complete")
    put("PyTorchJob", "by-hand", run="run-77")  # a launcher outside a pipeline
    put("PyTorchJob", "no-run")
    lines = reap("team", "1d", dry_run=True)
    assert all("would be deleted" in line for line in lines)
    assert not [method for method, _ in server.requests if method == "DELETE"]
    assert len(reap("team", "1d", dry_run=False)) == len(lines) == 6
    assert {*server.of_kind("PyTorchJob"), *server.of_kind("TrainJob")} == kept
    assert reap("team", "1d", dry_run=False) == []


def test_a_workflow_of_the_same_name_but_another_uid_is_not_the_owner(server, put):
    put("Workflow", "again", run="run-2", phase="Running")
    put("PyTorchJob", "old", run="run-1", owner="again")
    job = next(thing for thing in server.objects.values() if thing["kind"] == "PyTorchJob")
    job["metadata"]["ownerReferences"][0]["uid"] = "uid-of-the-first"
    (line,) = reap("team", "1d", dry_run=True)
    assert "its Workflow again is gone" in line


def test_young_jobs_are_left_alone(server, put):
    put("PyTorchJob", "young", run="run-1", owner="vanished", created="2126-01-01T00:00:00Z")
    assert reap("team", "1h", dry_run=False) == []


@pytest.mark.parametrize("there", [False, True], ids=["gone", "another"])
def test_a_job_that_took_the_orphans_name_is_not_deleted(server, put, there):
    put("PyTorchJob", "same", run="run-1", owner="vanished")
    (path,) = server.objects

    def meanwhile(method: str, asked: str) -> None:
        if method == "DELETE" and there:
            server.objects[path]["metadata"]["uid"] = "uid-of-another"
        elif method == "DELETE":
            server.objects.clear()

    server.fault = meanwhile
    (line,) = reap("team", "1d", dry_run=False)
    assert line == "team/same (run run-1): gone already; its Workflow vanished is gone"
    assert bool(server.objects) == there


def test_a_cluster_without_the_operators_has_no_orphans(server):
    server.fault = lambda method, path: 404
    assert reap("team", "1h", dry_run=False) == []


def test_what_the_account_lacks_is_named(server):
    server.fault = lambda method, path: 403
    with pytest.raises(InputError, match="give this account the Role zhllama-reaper"):
        reap("team", "1h", dry_run=False)


def test_the_reaper_takes_the_durations_that_gc_takes(server):
    for text in ("90s", "1w"):
        assert reap("team", text, dry_run=True) == []
    with pytest.raises(InputError, match="--older-than 10: write a number and a unit"):
        reap("team", "10", dry_run=True)


# --- deadlines --------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(server: KubernetesServer, put: Callable[..., None]) -> Callable[..., dict[str, Any]]:
    """`runs(name, started, deadline)`: a job by hand, of no run, as the operator shows it."""

    def one(name: str, started: str | None, deadline: int, ended: str = "") -> dict[str, Any]:
        put("PyTorchJob", name, ended=ended)
        (job,) = (thing for thing in server.objects.values() if thing["metadata"]["name"] == name)
        job["metadata"]["labels"] = {"zhllama.io/stage": "lora"}
        job["spec"] = {"runPolicy": {"activeDeadlineSeconds": deadline}}
        # a job one of whose pods is refused has none
        job["status"] = {**job["status"], "startTime": started} if started else None
        return job

    return one


def test_jobs_past_their_deadline_are_touched_so_that_the_operator_looks(server, runs):
    """As a label did on the real one (recording deadline-touched): Failed 0.1 s later."""
    now = datetime.now(UTC)
    late = runs("late", (now - timedelta(seconds=700)).isoformat(), 600)
    runs("in-time", (now - timedelta(seconds=500)).isoformat(), 600)
    runs("just-now", (now - timedelta(seconds=610)).isoformat(), 600)
    runs("over", (now - timedelta(days=1)).isoformat(), 600, ended="Failed")
    runs("refused", None, 600)
    other = runs("somebody-elses", (now - timedelta(seconds=700)).isoformat(), 600)
    del other["metadata"]["labels"]
    assert reap("team", "1d", dry_run=True) == []
    assert [method for method, _ in server.requests if method == "PATCH"] == []
    assert reap("team", "1d", dry_run=False) == []
    assert [path.rpartition("/")[2] for method, path in server.requests if method == "PATCH"] == ["late"]
    job = server.of_kind("PyTorchJob")["late"]
    assert job["metadata"]["labels"]["zhllama.io/touched"].isdigit()
    assert job["spec"] == late["spec"]


def test_a_job_that_is_deleted_is_not_touched_too(server, put, runs):
    job = runs("late", (datetime.now(UTC) - timedelta(days=2)).isoformat(), 600)
    job["metadata"]["labels"]["zhllama.io/run"] = "run-5"
    job["metadata"]["ownerReferences"] = [{"kind": "Workflow", "name": "gone", "uid": "uid-gone"}]
    (line,) = reap("team", "1h", dry_run=False)
    assert "its Workflow gone is gone" in line
    assert [method for method, _ in server.requests if method == "PATCH"] == []
