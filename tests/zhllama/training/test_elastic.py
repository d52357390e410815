"""The launcher in the stage's own process: PET_* as torchrun reads them, and exit codes that mean what they say."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.job_manifest import local_environments
from zhllama.training.checkpoints import Run
from zhllama.training.elastic import Deadline, _outcome, run_workers
from zhllama.training.options import TrainingOptions

FOLDER = Path(__file__).parent


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch):
    """The example workers, importable by name here and in spawned processes; no PET_* from outside."""
    for name in [name for name in os.environ if name.startswith("PET_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.syspath_prepend(str(FOLDER))
    import elastic_examples

    return elastic_examples


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")


def run(worker, folder: Path):
    options = TrainingOptions(store=str(folder), model="m", dataset="d")
    return run_workers(worker, Run.of(options, ArtifactWriter(options.store, "stage", "key")), Deadline())


def test_without_pet_the_one_process_is_this_one(examples, tmp_path):
    assert run(examples.publish, tmp_path).files[0].path == "done.txt"


@pytest.mark.slow
def test_two_processes_share_the_cores_and_rank_0_publishes(examples, two, tmp_path):
    manifest = run(examples.publish_ranks, tmp_path)
    assert manifest.root == str(tmp_path / "stage/key")
    shares = {int((tmp_path / f"rank-{rank}").read_text()) for rank in (0, 1)}
    assert shares == {max(1, len(os.sched_getaffinity(0)) // 2)}


@pytest.mark.slow
def test_a_workers_wrong_input_is_the_stages_with_its_line(examples, two, tmp_path):
    with pytest.raises(InputError, match=r"^the file x: is wrong; mend it$"):
        run(examples.rank_1_has_wrong_input, tmp_path)


@pytest.mark.slow
def test_a_workers_fault_names_the_rank_and_the_error(examples, two, tmp_path):
    with pytest.raises(StorageFault, match="process 1 ended with exit code 1: RuntimeError: a bug"):
        run(examples.rank_1_fails, tmp_path)


@pytest.mark.slow
def test_a_killed_worker_is_a_fault(examples, two, tmp_path):
    with pytest.raises(StorageFault, match="process 1 was killed by signal 9"):
        run(examples.rank_1_is_killed, tmp_path)


@pytest.mark.slow
def test_a_stopped_worker_is_no_fault_whatever_breaks_while_its_libraries_end(examples, two, tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        run(examples.rank_1_is_stopped_and_breaks_on_its_way_out, tmp_path)
    assert end.value.code == 143
    assert "the last words" in capfd.readouterr().out


@pytest.mark.slow
def test_sigterm_is_passed_on_and_waited_for(examples, two, tmp_path):
    def tell_when_they_run() -> None:
        while len(list(tmp_path.glob("running-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=tell_when_they_run).start()
    with pytest.raises(SystemExit) as end:
        run(examples.save_when_told, tmp_path)
    assert end.value.code == 143
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_training_that_published_nothing_is_a_fault(examples, tmp_path):
    with pytest.raises(StorageFault, match="published nothing"):
        run(examples.nothing, tmp_path)


def test_pet_variables_that_make_no_sense_are_wrong_input(examples, monkeypatch, tmp_path):
    monkeypatch.setenv("PET_NPROC_PER_NODE", "many")
    with pytest.raises(InputError, match="PET_"):
        run(examples.publish, tmp_path)


@pytest.mark.parametrize(
    ("codes", "said", "kind", "text"),
    [
        ({0: 1, 1: 2}, {0: "lost its peer", 1: "wrong"}, InputError, "wrong"),
        ({0: -15, 1: 1}, {}, SystemExit, "143"),
        ({0: 143}, {}, SystemExit, "143"),
        ({0: 1, 1: -9}, {0: "lost its peer"}, StorageFault, "process 1 was killed by signal 9"),
        ({0: 1, 1: 1}, {1: "a bug"}, StorageFault, "process 1 ended with exit code 1: a bug"),
    ],
    ids=["wrong input wins", "told to stop", "stopped", "the killed one is the cause", "the one that says why"],
)
def test_the_end_of_several_workers_has_one_meaning(codes, said, kind, text):
    outcome = _outcome(codes, said)
    assert isinstance(outcome, kind)
    assert text in str(outcome)


@pytest.mark.slow
def test_two_nodes_find_each_other_by_the_operators_variables(tmp_path):
    from components.launch_training.local_job import _port
    from zhllama.kubernetes.training_job import TrainingJob

    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import elastic_examples as examples\n"
        "from zhllama.artifacts.writer import ArtifactWriter\n"
        "from zhllama.training.options import TrainingOptions\n"
        "from zhllama.training.checkpoints import Run\n"
        "from zhllama.training.elastic import Deadline, run_workers\n"
        "options = TrainingOptions(store=sys.argv[2], model='m', dataset='d')\n"
        "run = Run.of(options, ArtifactWriter(options.store, 'stage', 'key'))\n"
        "print(run_workers(examples.publish_ranks, run, Deadline()).digest)\n"
    )
    job = TrainingJob(name="two", command=("unused",), nodes=2)
    nodes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(FOLDER), str(tmp_path)],
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            text=True,
        )
        for own in local_environments(job, _port())
    ]
    printed = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert printed[0] == printed[1] != ""
