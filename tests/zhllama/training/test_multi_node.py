"""Two nodes, each with a working folder and a cache of its own, joined as the operator joins its pods."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.launch_training.local_job import _port
from tests.faulty_proxy import FaultyProxy
from tests.soak.training import DEFAULTS, Material, Training, losses, start
from zhllama import storage
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.kubernetes.job_manifest import local_environments
from zhllama.kubernetes.training_job import TrainingJob

COURSE = {**DEFAULTS, "max_steps": 8, "lora_dropout": 0.0, "save_steps": 0, "eval_steps": 0, "learning_rate": 1e-3}
TOLERANCE = 2e-5
"""Of a loss, between one process and several: sums of float32 in another order."""


def words(options: dict[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def node(job: TrainingJob, home: Path, environment: dict[str, str]) -> "subprocess.Popen[str]":
    """One of the job's pods: in a folder of its own, with its own cache and nothing of this process's settings."""
    home.mkdir(parents=True, exist_ok=True)
    inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    around = {"HOME": str(home), "TMPDIR": str(home), "ZHLLAMA_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        job.command, env={**inherited, **around, **environment}, cwd=home, stderr=subprocess.PIPE, text=True
    )


def nodes_of(job: TrainingJob, folder: Path, **environment: str) -> "list[subprocess.Popen[str]]":
    """All of the job's pods."""
    return [
        node(job, folder / f"node-{number}", {**environment, **own})
        for number, own in enumerate(local_environments(job, _port()))
    ]


@pytest.fixture
def in_s3(tiny: Material, s3_store: str) -> Material:
    """The model and the dataset, moved to S3."""

    def moved(reference: str) -> str:
        source = open_artifact(reference)
        out = ArtifactWriter(f"{s3_store}/material", source.manifest.stage, "key")
        for name in source.names:
            out.copy(source, name)
        out.vocabulary, out.facts = source.manifest.vocabulary, dict(source.manifest.facts)
        return out.publish(source.manifest.kind).reference

    return Material(moved(tiny.model), moved(tiny.dataset))


@pytest.fixture(scope="module")
def one_process(tiny: Material, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, float]]:
    """The losses of one process with the global batch of two."""
    folder = tmp_path_factory.mktemp("one-process")
    store = str(folder / "store")
    alone = start(tiny, store, folder / "cache", {}, 1, **{**COURSE, "per_device_train_batch_size": 8})
    assert alone.end() == 0, alone.said
    return losses(store)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "restarted"), [pytest.param("none", False, marks=pytest.mark.slowest), ("zero2", True)]
)
def test_two_nodes_take_the_course_of_one_process_and_of_two(
    backend, restarted, tiny, in_s3, one_process, s3_server, s3_store, tmp_path
):
    store = f"{s3_store}/two-nodes"
    chosen = {**COURSE, "deepspeed": backend, "model": in_s3.model, "dataset": in_s3.dataset, "store": store}
    job = TrainingJob(name="two", command=(sys.executable, "-m", "components.pretrain", *words(chosen)), nodes=2)
    access = s3_server.environment()
    with FaultyProxy(s3_server.endpoint) as proxy:
        nodes = nodes_of(job, tmp_path, **{**access, "ZHLLAMA_S3_ENDPOINT": proxy.endpoint})
        said = [node.communicate(timeout=300)[1] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], said
        shards = [name for name in open_artifact(in_s3.dataset).names if name.endswith(".bin")]
        fetched = proxy.count("GET", ".bin"), proxy.count("GET", "/model.safetensors")
        assert fetched[0] == 2 * len(shards), "once a node"

        if restarted:
            # a restart finds all of it in the node's cache
            proxy.forget()
            storage.delete_all(store)
            nodes = nodes_of(job, tmp_path, **{**access, "ZHLLAMA_S3_ENDPOINT": proxy.endpoint})
            said = [node.communicate(timeout=300)[1] for node in nodes]
            assert [node.returncode for node in nodes] == [0, 0], said
            assert proxy.count("GET", ".bin") == 0
            # the weights' header is read wherever inputs are checked; the weights themselves were fetched once a node
            assert fetched[1] - proxy.count("GET", "/model.safetensors") == 2

    same_store = str(tmp_path / "two-processes")
    together = start(tiny, same_store, tmp_path / "two-cache", {}, 2, **{**COURSE, "deepspeed": backend})
    assert together.end() == 0, together.said
    for found in (losses(store), losses(same_store)):
        assert [place[:2] for place in found] == [place[:2] for place in one_process]
        assert [loss for *_, loss in found] == pytest.approx([loss for *_, loss in one_process], abs=TOLERANCE)
    assert losses(store) == losses(same_store)


@pytest.mark.slow
def test_an_elastic_job_that_loses_a_node_goes_on_from_s3(in_s3, s3_server, s3_store, tmp_path):
    """The variables of an elastic policy: no Master, a rendezvous. Node 1 is killed after a checkpoint and stays away;
    node 0 goes on alone, within its own restarts or started again as `restartPolicy: OnFailure` does."""
    store = f"{s3_store}/elastic"
    chosen = {**COURSE, "max_steps": 60, "save_steps": 4, "model": in_s3.model, "dataset": in_s3.dataset}
    command = (sys.executable, "-m", "components.pretrain", *words({**chosen, "deepspeed": "none", "store": store}))
    job = TrainingJob(name="elastic", command=command, nodes=2, min_nodes=1, max_nodes=2)
    # torch's own patience with a silent node is 15 s, with late ones 30 s
    patience = {"PET_RDZV_CONF": "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3"}
    places = [{**patience, **s3_server.environment(), **own} for own in local_environments(job, _port())]
    lasting, lost = (
        Training(node(job, tmp_path / f"node-{number}", place)).follow() for number, place in enumerate(places)
    )
    assert lasting.wait_for("checkpoint of step 4"), lasting.said
    lost.process.kill()
    starts = 1
    while lasting.end() and starts < 3:
        lasting = Training(node(job, tmp_path / "node-0", places[0])).follow()
        starts += 1
    assert lasting.process.returncode == 0, lasting.said
    assert "going on from step " in lasting.said
    steps = [step for step, kind, _ in losses(store) if kind == "loss"]
    assert steps == list(range(1, 61))


def test_a_node_without_room_for_the_model_is_refused_before_anything_is_fetched(in_s3, monkeypatch, tmp_path):
    from types import SimpleNamespace

    from components.pretrain.options import Pretrain
    from zhllama.errors import InputError
    from zhllama.stage.run import run_stage
    from zhllama.training.stage import run_training as pretrain

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    options = {**COURSE, "model": in_s3.model, "dataset": in_s3.dataset, "store": in_s3.model.rsplit("/", 4)[0]}
    with pytest.raises(InputError, match=r"ZHLLAMA_CACHE .* will be needed and .* are free"):
        run_stage(Pretrain(**options), pretrain)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
