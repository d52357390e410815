"""Checkpoints in the store: written by every rank, complete when the manifest is there. docs/checkpoints.md has it all.

    <store>/checkpoints/<stage>/<input key>/step-00000500-1f2e3d4c/
        weights.safetensors               rank 0: what is trained, by name
        averaged.safetensors              rank 0: with --ema its average, by name
        trainer.json                      rank 0: step, history
        shared.json, shared.safetensors   rank 0: scheduler, and without ZeRO the optimizer
        rank-00000.json, rank-00000.safetensors   each rank: random state, and with ZeRO its part of the optimizer
        rank-00001.part.json              each rank but the first, after its files: their sizes and digests
        manifest.json                     rank 0, last: every file of every rank

Rank 0 finds the parts by their names, so nothing is agreed between processes while the training goes on. The second
half of a folder's name is of one start of the training: what a killed one left behind is never taken for a part of the
next one's checkpoint. No torch here: the command checks a checkpoint before any process starts.
"""

import json
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from zhllama import storage
from zhllama.artifacts.manifest import MANIFEST, Input, Manifest, with_provenance
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.published import find_published, place
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.stage.options import described, option_of

log = logging.getLogger("training")

KIND = "checkpoint"
VERSION_FACT = "cache_version"
"""What release 0.1 called the steps' version."""
WEIGHTS = "weights.safetensors"
AVERAGED = "averaged.safetensors"
TRAINER = "trainer.json"
SHARED = "shared"
"""Name of the state that all ranks have alike, without its suffix."""
LONGEST_LOOK = 2.0
"""Seconds between two looks for the parts of the other ranks, at most; the first are quicker."""

_FOLDER = re.compile(r"step-(\d{8,})-([0-9a-f]{8})")
_SPLIT_OF_THE_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Options that a training may change when it goes on: with the number of processes they give one global batch."""


def state_of(rank: int) -> str:
    """Name of a rank's own state, without its suffix."""
    return f"rank-{rank:05d}"


def part_of(rank: int) -> str:
    return f"{state_of(rank)}.part.json"


@dataclass(frozen=True)
class Run:
    """A training: where its checkpoints and its result lie, and what went in. Passed to each process of each node."""

    store: str
    stage: str
    key: str
    configuration: Mapping[str, Any]
    inputs: Mapping[str, Input]
    steps_version: int = 1
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of the options."""
    options: Any = None

    @classmethod
    def of(cls, options: Any, out: ArtifactWriter) -> "Run":
        """The training whose result belongs at `out`."""
        kind: Any = type(options)
        defaults = {name: one.default for name, one in described(kind).items()}
        given = (options.store, out.stage, out.root.rsplit("/", 1)[1], out.configuration, out.inputs)
        return cls(*given, options.steps_version, defaults, options)

    @property
    def folder(self) -> str:
        return place(storage.join(self.store, "checkpoints"), self.stage, self.key)

    def writer(self, step: int, start: str) -> ArtifactWriter:
        """The checkpoint of a step in the making; `start`: eight hexadecimal digits of this start of the training."""
        name = f"{self.key}/step-{step:08d}-{start}"
        store = storage.join(self.store, "checkpoints")
        return ArtifactWriter(store, self.stage, name, self.configuration, self.inputs)

    def result_writer(self) -> ArtifactWriter:
        """The result in the making; only the first process of the first node may write to it."""
        return ArtifactWriter(self.store, self.stage, self.key, self.configuration, self.inputs)


def _found(run_folder: str) -> Iterator[tuple[str, Manifest | None]]:
    """The folders of checkpoints, newest step first, each with its manifest where the checkpoint is all there."""
    sizes: dict[str, dict[str, int]] = {}
    for item in storage.listing(run_folder):
        folder, _, name = item.name.partition("/")
        if _FOLDER.fullmatch(folder):
            sizes.setdefault(f"{run_folder}/{folder}", {})[name] = item.size
    for where, files in sorted(sizes.items(), reverse=True):
        manifest = None
        try:
            if MANIFEST in files and (content := storage.read_or_none(f"{where}/{MANIFEST}")) is not None:
                manifest = with_provenance(Manifest.from_json(content, f"{where}/{MANIFEST}", where))
                if any(files.get(file.path) != file.size for file in manifest.files):
                    raise InputError(f"{where}: files of this checkpoint are missing")
        except InputError as error:
            log.warning("a checkpoint is damaged and is left aside: %s", error)
            manifest = None
        yield where, manifest


def complete(run_folder: str) -> Iterator[Manifest]:
    """The complete checkpoints in a folder, newest first; each is looked at when it is asked for."""
    return (manifest for _, manifest in _found(run_folder) if manifest is not None)


def own(run: Run) -> Iterator[Manifest]:
    """The complete checkpoints of a run, newest first. One of another training that was put there is left aside."""
    for manifest in complete(run.folder):
        if differences := dict(_differences(manifest, run)):
            log.warning("%s is of another training (%s) and is left aside", manifest.root, ", ".join(differences))
        else:
            yield manifest


def of_earlier_release(run: Run) -> Iterator[Manifest]:
    """The complete checkpoints of the same training under another key, newest first: an earlier release gave it that
    one, or other versions of the libraries did. Same inputs, same options, same steps. Not of a training that
    is over: its result is there, and this one is asked for anew."""
    found = []
    stage_folder = run.folder.rpartition("/")[0]
    for key in sorted({item.name.partition("/")[0] for item in storage.listing(stage_folder)} - {run.key}):
        if find_published(run.store, run.stage, key) is None:
            found += [
                manifest
                for manifest in complete(f"{stage_folder}/{key}")
                if manifest.stage == run.stage
                and manifest.facts.get(VERSION_FACT, 1) == run.steps_version
                and not any(_differences(manifest, run))
            ]
    return iter(sorted(found, key=lambda one: (one.facts["step"], one.created), reverse=True))


def _differences(checkpoint: Manifest, run: Run) -> Iterator[tuple[str, str]]:
    """(option, what it was) of inputs and options; one that an earlier release lacked has its default."""
    for name in sorted({*checkpoint.inputs, *run.inputs}):
        theirs, ours = checkpoint.inputs.get(name), run.inputs.get(name)
        if (theirs and theirs.digest) != (ours and ours.digest):
            yield name, "none" if theirs is None else f"{theirs.reference} ({theirs.digest[:8]})"
    for name in sorted({*checkpoint.configuration, *run.configuration}):
        there, here = checkpoint.configuration.get(name, run.defaults.get(name)), run.configuration.get(name)
        if there != here:
            yield name, f"{there}, here it is {here}"


def clean(run_folder: str, keep: int, start: str) -> None:
    """Deletes all but the `keep` newest complete checkpoints, and what was never completed, but not what `start`, this
    start of the training, is still writing. A manifest goes first: half deleted, a checkpoint is not complete."""
    for where, manifest in _found(run_folder):
        if manifest is not None and keep > 0:
            keep -= 1
        elif manifest is not None or not where.endswith(f"-{start}"):
            storage.delete(f"{where}/{MANIFEST}")
            storage.delete_all(where)


def write_part(out: ArtifactWriter, rank: int) -> None:
    """Says that this rank's files are all there. Their digests become part of the manifest."""
    storage.write_bytes(storage.join(out.root, part_of(rank)), json.dumps(out.part()).encode())


def commit(out: ArtifactWriter, ranks: int, give_up: threading.Event) -> Manifest | None:
    """Waits for the parts of ranks 1 to `ranks` - 1 and publishes the checkpoint; None when `give_up` was set."""
    pause = 0.05
    for rank in range(1, ranks):
        while (part := storage.read_or_none(storage.join(out.root, part_of(rank)))) is None:
            if give_up.wait(pause):
                return None
            pause = min(2 * pause, LONGEST_LOOK)
        out.merge_part(json.loads(part))
    return out.publish(KIND)


def open_checkpoint(reference: str, option: str) -> Artifact:
    """The checkpoint behind a reference; InputError when it is none or not complete."""
    checkpoint = open_artifact(reference, option)
    if not checkpoint.verified:
        raise InputError(f"{option} {reference}: there is no manifest, so this is no complete checkpoint; give another")
    return checkpoint.require_kind(KIND, option=option)


def require_same_run(checkpoint: Manifest, run: Run, option: str) -> None:
    """InputError when the checkpoint is of another training: other inputs or options. Another release may go on."""
    if checkpoint.stage != run.stage:
        raise InputError(f"{option} {checkpoint.root}: a checkpoint of {checkpoint.stage}; this is {run.stage}")
    for name, theirs in _differences(checkpoint, run):
        if name not in (*_SPLIT_OF_THE_BATCH, "publish_checkpoint"):
            said = f"it is of another training: its {option_of(name)} was {theirs}"
            raise InputError(f"{option} {checkpoint.root}: {said}; give one of its own checkpoints, or start without")
    if checkpoint.root.rsplit("/", 2)[1] != run.key and "publish_checkpoint" not in run.inputs:
        log.warning("the checkpoint is of another release or another split of the batch; the options are the same")


def require_world(checkpoint: Manifest, world: int, zero_stage: int) -> None:
    """InputError when the optimizer's state cannot be spread over this many processes: plain data parallelism has all
    of it in one file, ZeRO a part a process."""
    saved, stage = checkpoint.facts["world"], checkpoint.facts["zero_stage"]
    where = f"the checkpoint {checkpoint.root}"
    if stage != zero_stage:
        raise InputError(f"{where} is of ZeRO stage {stage}, this training of {zero_stage}; give the same --deepspeed")
    if stage and saved != world:
        said = (
            f"{where} holds the ZeRO-{stage} optimizer of {saved} processes, this training has {world}; start it with"
        )
        mend = "or publish the checkpoint with --publish-checkpoint and train on from its result"
        raise InputError(f"{said} {saved} processes, {mend}")
