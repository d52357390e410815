"""The upload of this rank's part of a checkpoint, in a thread of its own, while the training goes on. One at a time.

Rank 0's thread also waits for the parts of the others, completes the checkpoint and deletes what is older than the ones
to keep. The threads of different ranks speak to each other through the store alone; what the main threads have to know
(busy, failed) they read here. The thread runs at a lower priority: without spare cores it takes what training leaves.
"""

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.training.checkpoints import Run, clean, commit, write_part
from zhllama.training.training_state import Part
from zhllama.weights.safetensors_io import SafetensorsStream

log = logging.getLogger("training")


class NotFinite(Exception):
    """A weight or a moment is not a finite number: not worth keeping, and not to be mistaken for a good checkpoint."""


class Uploads:
    """What one rank sends to the store."""

    def __init__(self, run: Run, rank: int, world: int, keep: int) -> None:
        self._run, self._rank, self._world, self._keep = run, rank, world, keep
        self._thread = threading.Thread()
        self.give_up = threading.Event()  # another rank's part will not come: the checkpoint stays incomplete
        self.start = ""  # names this start of the training in its checkpoints' folders; told by rank 0
        self.step = 0  # of the upload that runs, or ran last
        self.failed_step = 0  # of the last upload that failed on this rank; 0: none
        self.why = ""  # why it failed
        self.newest: Manifest | None = None  # the newest complete checkpoint, on rank 0

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def begin(self, part: Part, **facts: object) -> None:
        """Starts the upload of a part; none may be running."""
        self.step = part.step
        self.give_up.clear()
        out = self._run.writer(part.step, self.start)
        out.facts |= facts
        self._begin(self._upload, part, out)

    def begin_cleaning(self) -> None:
        """Deletes in the background what an earlier start left incomplete, and what is too old. For rank 0."""
        self._begin(self._clean)

    def _begin(self, work: Callable[..., None], *given: Any) -> None:
        assert not self.busy
        self._thread = threading.Thread(target=work, args=given, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        if self.busy:
            self._thread.join(seconds)

    def _upload(self, part: Part, out: ArtifactWriter) -> None:
        try:
            _lower_priority()
            _write(part, out)
            if self._rank:
                write_part(out, self._rank)
                return
            manifest = commit(out, self._world, self.give_up)
            if manifest is None:
                return
            self.newest = manifest
            log.info("checkpoint of step %d is complete: %s", part.step, manifest.reference)
        except Exception as error:  # noqa: BLE001 - a thread that ended unheard would end all checkpoints
            self.why = f"{type(error).__name__}: {error}"
            self.failed_step = part.step
            said = "rank %d could not write its part of the checkpoint of step %d, the training goes on: %s"
            log.warning(said, self._rank, part.step, self.why)
            return
        self._clean()

    def _clean(self) -> None:
        try:
            _lower_priority()
            clean(self._run.folder, self._keep, self.start)
        except Exception as error:  # noqa: BLE001 - what could not be deleted is deleted next time
            log.warning("older checkpoints could not be cleaned away: %s", error)


def _write(part: Part, out: ArtifactWriter) -> None:
    for name, tensors in part.tensors.items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NotFinite(f"{key} is not finite any more")
        with out.writer(name) as sink:
            kinds = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items()}
            stream = SafetensorsStream(sink, {key: (kinds[key], tuple(one.shape)) for key, one in tensors.items()})
            for key, tensor in tensors.items():
                stream.write(key, tensor)
            stream.close()
    for name, document in part.documents.items():
        out.add_json(name, document)


def _lower_priority() -> None:
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    except OSError as error:
        log.debug("the upload keeps its priority: %s", error)
