"""The step that runs a training job and hands its result on as its own.

The training leaves a copy of its manifest at the launcher's place in the store, where one that starts again finds it
whatever became of the job. The launcher leaves it as its own, so the step is skipped next time.
"""

import hashlib
import logging
import os
import sys
from dataclasses import replace

from components.launch_training.command import command_line, parse_training
from components.launch_training.options import LaunchTraining
from zhllama import storage
from zhllama.artifacts.manifest import MANIFEST, PROVENANCE, Manifest
from zhllama.artifacts.published import find_published
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.job_kinds import BY_BACKEND
from zhllama.kubernetes.names import LABEL, job_name, label_value
from zhllama.kubernetes.training_job import TrainingJob
from zhllama.stage.inputs import Inputs
from zhllama.storage.s3_session import SETTINGS
from zhllama.training.inputs import checked_inputs

log = logging.getLogger("launch")

JOB_MANIFEST = "job-manifest.json"
JOB_LOGS = "logs"


def launch_training(config: LaunchTraining, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Runs the job unless its result is there already, and publishes that result as the launcher's own."""
    place = storage.join(out.root, JOB_MANIFEST)
    manifest = published(place)
    if manifest is None:
        arguments = config.training_arguments(place)
        if inputs["model"].manifest.vocabulary is not None:
            # what a job would find out after its queue
            checked_inputs(parse_training(config.stage, arguments), inputs)
        run_job(config, out.root.rsplit("/", 1)[1], arguments, place, storage.join(out.root, JOB_LOGS))
        manifest = published(place)
        if manifest is None:
            raise StorageFault(f"{place}: the job ended, but the training left no manifest there; see its log")
    else:
        log.info("the job's result is there: %s", manifest.reference)
    # where the result lies, in this store
    training = "/".join(["..", "..", *manifest.root.split("/")[-2:]])
    storage.write_bytes(storage.join(out.root, PROVENANCE), manifest.provenance_json())
    storage.write_bytes(storage.join(out.root, MANIFEST), manifest.to_json(training))
    return manifest


def published(place: str) -> Manifest | None:
    """The manifest that a training left at `place`, if what it names is all there."""
    try:
        copy = Manifest.from_json(storage.read_bytes(place), place)
    except (FileNotFoundError, NotADirectoryError):
        return None
    # of the store that this place is in, wherever that was when it was written
    return find_published(place.rsplit("/", 3)[0], *copy.root.rsplit("/", 2)[1:])


def run_job(config: LaunchTraining, key: str, arguments: list[str], place: str, logs: str) -> None:
    """One job, on the backend that was chosen. place: where its training publishes; logs: where the last lines of a
    cluster's jobs are left."""
    if config.backend == "local":
        from components.launch_training.local_job import run_local

        run_local(training_job(config, key, command_line(config.stage, arguments, sys.executable), attempt=1))
        return
    from components.launch_training.cluster import Cluster
    from components.launch_training.cluster_job import Launch

    command, cluster = command_line(config.stage, arguments), Cluster(BY_BACKEND[config.backend])
    starter = "" if config.run_id else cluster.starter()
    config = replace(config, namespace=config.namespace or cluster.namespace)
    Launch(
        cluster,
        lambda attempt: training_job(config, key, command, attempt, starter),
        config.waiting_seconds,
        lambda name, lines: keep_lines(storage.join(logs, f"{name}.txt"), lines),
        lambda: published(place) is not None,
        config.starting_seconds,
    ).run(config.attempts)


def keep_lines(place: str, lines: list[str]) -> None:
    """Leaves a job's last lines in the store: pods and Workflows vanish. Without them the step is none the worse."""
    try:
        storage.write_bytes(place, "".join(f"{line}\n" for line in lines).encode())
    except (StorageFault, InputError, OSError) as error:
        log.warning("the last lines of the job are not kept: %s", error)
    else:
        log.info("its last lines: %s", place)


def training_job(
    config: LaunchTraining, key: str, command: tuple[str, ...], attempt: int, starter: str = ""
) -> TrainingJob:
    """The job of an attempt. Its name and its key tell stores apart: the same work in two stores is two jobs. starter:
    tells runs apart that were given no id: with one name they would delete each other's job on a cancel."""
    key = hashlib.sha256(f"{config.store.rstrip('/')}\0{key}".encode()).hexdigest()[:32]
    run = config.run_id or "-".join(filter(None, ("run", key[:8], starter)))
    labels = {"run": run, "stage": config.stage, "size": config.size, "team": config.team, "key": key}
    told = (*SETTINGS, "HF_ENDPOINT") if config.reads_hub else SETTINGS
    return config.job(
        job_name(run, config.stage, attempt),
        command,
        {f"{LABEL}{name}": label_value(value) for name, value in labels.items() if value},
        **{name: os.environ[name] for name in told if os.environ.get(name)},
    )
