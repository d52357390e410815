"""Training jobs as processes of this machine: they end as their training ends, and leave nothing running."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from components.launch_training.local_job import run_local
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.training_job import TrainingJob

QUICK = ("--max-steps", "2", "--logging-steps", "1", "--eval-steps", "0", "--deepspeed", "none")


def job(program: str, **options) -> TrainingJob:
    return TrainingJob(name="job", command=(sys.executable, "-c", program), **options)


def running(marker: str) -> list[int]:
    """Processes whose command line has the marker."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return [number for number in found if number != os.getpid()]


# --- one process a node, any program ----------------------------------------------------------------------------------


def test_each_node_gets_the_operators_variables(capfd):
    program = "import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['PET_NODE_RANK'], flush=True)"
    run_local(job(program, nodes=2, processes_per_node=3))
    assert sorted(capfd.readouterr().err.splitlines()) == ["node 0 | 0 6 0", "node 1 | 1 6 1"]


def test_wrong_input_of_one_node_is_the_jobs_with_its_line():
    program = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit(print('error: --dataset x: mend it', file=sys.stderr) or 2)\n"
        "time.sleep(600)"
    )
    with pytest.raises(InputError, match=r"^--dataset x: mend it$"):
        run_local(job(program, nodes=2, grace_seconds=5))


def test_a_fault_names_the_node_and_its_last_line():
    with pytest.raises(StorageFault, match="node 0 ended with exit code 1: fault: a bug"):
        run_local(job("import sys; print('fault: a bug', file=sys.stderr); sys.exit(1)"))


def test_a_node_that_does_not_end_is_killed_with_what_it_started(tmp_path):
    """A node that ignores SIGTERM and has a child: both are gone after the grace period."""
    marker = f"marker-{os.getpid()}"
    ignores = tmp_path / "ignores"
    ignores.mkdir()
    stubborn = (
        "import os, signal, time; signal.signal(15, signal.SIG_IGN); "
        f"open(os.path.join({str(ignores)!r}, str(os.getpid())), 'w').close(); time.sleep(600)  # {marker}"
    )
    program = (
        "import os, subprocess, sys, time\n"
        f"if os.environ['RANK'] == '0': subprocess.Popen([sys.executable, '-c', {stubborn!r}]); exec({stubborn!r})\n"
        f"while len(os.listdir({str(ignores)!r})) < 2: time.sleep(0.01)\n"
        "sys.exit(1)"
    )
    with pytest.raises(StorageFault, match="node 1"):
        run_local(job(program, nodes=2, grace_seconds=1))
    assert len(list(ignores.iterdir())) == 2
    # the kernel takes a moment to end what was killed
    _until(lambda: running(marker) == [])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_the_nodes_end_when_the_launcher_is_killed(tmp_path):
    marker = f"marker-{os.getpid()}-killed"
    node = f"import time; open({str(tmp_path / 'running')!r}, 'w'); time.sleep(600)  # {marker}"
    program = (
        "from components.launch_training.local_job import run_local\n"
        "from zhllama.kubernetes.training_job import TrainingJob\n"
        "import sys\n"
        f"run_local(TrainingJob(name='job', command=(sys.executable, '-c', {node!r})))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program])
    _until(lambda: (tmp_path / "running").exists())
    launcher.kill()
    launcher.wait()
    _until(lambda: running(marker) == [])


def _until(holds, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- the real training ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_runs_once_and_its_reference_is_the_launchers(command, tmp_path):
    reference = tmp_path / "reference"
    words = ("--backend", "local", "--reference", str(reference), "--report", str(tmp_path / "r.html"), "--", *QUICK)
    said = command(*words).communicate(timeout=300)[1]
    manifest = open_artifact(reference.read_text()).manifest
    assert (manifest.stage, manifest.kind) == ("pretrain", "adapter")
    assert "step 2/2: loss" in said
    assert "<svg" in (tmp_path / "r.html").read_text()
    reference.unlink()
    again = command(*words).communicate(timeout=60)[1]
    assert "already done" in again
    assert "step" not in again
    assert reference.read_text() == manifest.reference


def test_wrong_input_ends_before_the_training_starts(command, tmp_path):
    process = command("--backend", "local", "--", "--lora-targets", "attention")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert said.startswith("error: --lora-targets attention: ")
    assert len(said.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_stop_ends_the_training_and_leaves_nothing_running(command, sent, tmp_path):
    process = command("--backend", "local", "--", *QUICK[2:], "--max-steps", "100000", "--save-steps", "0")
    assert process.stderr is not None
    for line in process.stderr:
        if "step 2/" in line:
            break
    process.send_signal(sent)
    drained = threading.Thread(target=process.stderr.read)
    drained.start()
    assert process.wait(60) == 143
    drained.join(60)
    _until(lambda: running(str(tmp_path / "store")) == [])
    assert not list((tmp_path / "store").rglob("*manifest.json"))
