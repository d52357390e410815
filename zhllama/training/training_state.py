"""All that a training is made of between two steps: taken to the host in a moment, put back to the last bit.

Nothing here is pickled. A state is a tree of dictionaries, lists and numbers, written as JSON, whose tensors stand in
a safetensors file: nothing in it can run. (DeepSpeed 0.19's own loader calls torch.load with weights_only=False.)
Taking it costs one copy to host memory; a thread writes it to the store while the training goes on.
"""

import json
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.training.checkpoints import (
    AVERAGED,
    SHARED,
    TRAINER,
    VERSION_FACT,
    WEIGHTS,
    Run,
    clean,
    commit,
    state_of,
    write_part,
)
from zhllama.training.model import trainable
from zhllama.weights.safetensors_io import Checkpoint, SafetensorsStream

log = logging.getLogger("training")

Tree = Any
"""Dictionaries with texts or whole numbers as keys, lists, tuples, numbers, texts, None and tensors."""
Tensors = dict[str, torch.Tensor]


def flatten(tree: Tree, tensors: Tensors, name: str = "") -> Any:
    """The tree as JSON; its tensors go into `tensors`, by their way in the tree. ValueError for anything else."""
    if isinstance(tree, torch.Tensor):
        tensors[name or "tensor"] = tree.detach()
        return {"tensor": name or "tensor"}
    if isinstance(tree, dict):
        for key in tree:
            if type(key) not in (str, int):
                raise ValueError(f"{key!r}: a key of a checkpoint is a text or a whole number")
        return {"dict": [[key, flatten(value, tensors, f"{name}/{key}")] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        content = [flatten(value, tensors, f"{name}/{index}") for index, value in enumerate(tree)]
        return {"list" if isinstance(tree, list) else "tuple": content}
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    raise ValueError(f"{name}: a {type(tree).__name__} has no place in a checkpoint")


def unflatten(places: Any, tensors: Mapping[str, torch.Tensor]) -> Tree:
    """The tree of which `flatten` made `places` and `tensors`. KeyError or ValueError when they do not fit."""
    if not isinstance(places, dict):
        return places
    ((kind, content),) = places.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(value, tensors) for key, value in content}
    made = [unflatten(value, tensors) for value in content]
    if kind not in ("list", "tuple"):
        raise ValueError(f"{kind}: no such kind of branch in a checkpoint")
    return made if kind == "list" else tuple(made)


@dataclass
class Part:
    """One rank's share of a checkpoint, in host memory: file name → JSON, file name → tensors."""

    step: int
    documents: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensors] = field(default_factory=dict)


def copied(tensors: Mapping[str, torch.Tensor], file: str, buffers: Tensors) -> Tensors:
    """Copies in host memory, complete when a GPU is synchronized. `buffers` are used again: fresh pages cost more."""
    made = {}
    for name, tensor in tensors.items():
        key = f"{file}:{name}"
        kept = buffers.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        made[name] = kept.copy_(tensor, non_blocking=True)
    return made


def take(trainer: Any, buffers: Tensors) -> Part:
    """This rank's part of a checkpoint of the step that has just ended. To be called by all ranks at once."""
    part = Part(trainer.state.global_step)
    first = trainer.args.process_index == 0
    scaler = trainer.accelerator.scaler
    shared: Tree = {"scheduler": trainer.lr_scheduler.state_dict(), "scaler": scaler and scaler.state_dict()}
    # the Trainer's sum of losses since its last log line: with it, a line that spans a restart is the same
    loss = {"sum": float(trainer._tr_loss.item()), "total": float(trainer._total_loss_scalar)}
    own: Tree = {"random": random_state(), "loss": loss | {"logged": int(trainer._globalstep_last_logged)}}
    shared |= {name: one.state() for name, one in trainer.kept.items()}
    with _partitioned(trainer):
        if trainer.is_deepspeed_enabled:
            own["optimizer"] = _of_engine(trainer.model_wrapped)
        elif first:
            shared["optimizer"] = trainer.optimizer.state_dict()
        _add(part, state_of(trainer.args.process_index), own, buffers)
    weights: Tensors = {name: parameter.detach() for name, parameter in trainable(trainer.model).items()}
    if _lies_in_parts(trainer):
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        # one after another
        for name, parameter in trainable(trainer.model).items():
            with GatheredParameters([parameter]):
                if first:
                    weights[name] = parameter.detach().to("cpu", copy=True)
    if trainer.average is not None:
        shared["averaged_steps"] = trainer.average.steps
        averages = trainer.average.whole() if first or trainer.is_deepspeed_enabled else {}
        if first:
            part.tensors[AVERAGED] = copied(averages, AVERAGED, buffers)
    if first:
        _add(part, SHARED, shared, buffers)
        part.tensors[WEIGHTS] = copied(weights, WEIGHTS, buffers)
        part.documents[TRAINER] = asdict(trainer.state)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return part


def _add(part: Part, name: str, tree: Tree, buffers: Tensors) -> None:
    tensors: Tensors = {}
    part.documents[f"{name}.json"] = flatten(tree, tensors)
    part.tensors[f"{name}.safetensors"] = copied(tensors, name, buffers)


def _lies_in_parts(trainer: Any) -> bool:
    """Whether each parameter lies in pieces on all ranks, as under ZeRO-3."""
    return bool(trainer.is_deepspeed_enabled and trainer.model_wrapped.zero_optimization_stage() == 3)


_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_NOT_STATE = ("param_slice_mappings", "zero_stage", "universal_checkpoint_info", "loss_scaler")
"""Of a ZeRO optimizer's state_dict: what follows from the model and the configuration, or is an object."""
_SCALES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _of_engine(engine: Any) -> Tree:
    state = {name: value for name, value in engine.optimizer.state_dict().items() if name not in _NOT_STATE}
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {
        "zero": state,
        "scales": {name: getattr(scaler, name) for name in _SCALES if hasattr(scaler, name)},
        "counters": {name: int(getattr(engine, name)) for name in _COUNTERS},
    }


def _restore_engine(engine: Any, saved: Tree) -> None:
    optimizer = engine.optimizer
    state, scaler = dict(saved["zero"]), getattr(optimizer, "loss_scaler", None)
    for name, value in saved["scales"].items():
        setattr(scaler, name, value)
    state["loss_scaler"] = scaler
    # by rank; no other rank's is looked at
    optimizer.load_state_dict({dist.get_rank(): state}, load_from_fp32_weights=True)
    for name, value in saved["counters"].items():
        setattr(engine, name, value)


@contextmanager
def _partitioned(trainer: Any) -> Iterator[None]:
    """ZeRO-3's parameters in their pieces, as DeepSpeed brings them to save and to load; nothing to do elsewhere."""
    optimizer: Any = trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else None
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    yield
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()


_NUMPY = ("kind", "keys", "position", "has_gauss", "gauss")


def random_state() -> Tree:
    """The state of Python's, numpy's and torch's generators in this process."""
    version, words, following = random.getstate()
    numpy: dict[str, Any] = dict(zip(_NUMPY, np.random.get_state()))
    state = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": following},
        "numpy": numpy | {"keys": torch.from_numpy(numpy["keys"].astype(np.int64))},
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Tree) -> None:
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    numpy = numpy | {"keys": numpy["keys"].numpy().astype(np.uint32)}
    np.random.set_state(tuple(numpy[name] for name in _NUMPY))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


class Saved:
    """A checkpoint as this rank needs it, read and verified before anything of the training is touched. What all ranks
    have alike is read by rank 0 and passed on when it is put back; until then no collective is held."""

    def __init__(self, checkpoint: Artifact, rank: int, world: int) -> None:
        def document(name: str) -> Any:
            return json.loads(checkpoint.read(name))

        self.manifest = checkpoint.manifest
        self.step: int = self.manifest.facts["step"]
        self.trainer: dict[str, Any] = document(TRAINER)
        self._shared_places = document(f"{SHARED}.json")
        self._shared = _tensors(checkpoint, f"{SHARED}.safetensors", rank == 0)
        self._weights = _tensors(checkpoint, WEIGHTS, rank == 0)
        self._averages = _tensors(checkpoint, AVERAGED, rank == 0) if AVERAGED in checkpoint else {}
        self._world, before = world, checkpoint.manifest.facts["world"]
        self._own: Tree = None
        if rank < before:
            own = _tensors(checkpoint, f"{state_of(rank)}.safetensors", True)
            self._own = unflatten(document(f"{state_of(rank)}.json"), own)
        if world == before:
            self._loss = self._own["loss"]
        else:
            # a mean over other ranks: what the log line that spans the restart is made of
            states = [dict(document(f"{state_of(other)}.json")["dict"]) for other in range(before)]
            losses = [unflatten(places["loss"], {}) for places in states]
            self._loss = {**losses[0], "sum": sum(one["sum"] for one in losses) / before}

    def restore(self, trainer: Any) -> None:
        """Weights, optimizer, scheduler, scales. To be called by all ranks, when the Trainer has wrapped the model."""
        shared = unflatten(self._shared_places, self._passed_on(self._shared))
        with torch.no_grad(), _partitioned(trainer):
            if not _lies_in_parts(trainer):
                parameters, saved = trainable(trainer.model), self._passed_on(self._weights)
                for name in sorted(parameters.keys() | saved.keys()):
                    if name not in saved or name not in parameters or saved[name].shape != parameters[name].shape:
                        where = f"the checkpoint {self.manifest.root}"
                        raise InputError(f"{where}: its weight {name} is none of this model's; give another")
                    parameters[name].data.copy_(saved[name])
            if trainer.is_deepspeed_enabled:
                _restore_engine(trainer.model_wrapped, self._own["optimizer"])
            else:
                trainer.optimizer.load_state_dict(shared["optimizer"])
        trainer.lr_scheduler.load_state_dict(shared["scheduler"])
        if trainer.accelerator.scaler is not None and shared["scaler"] is not None:
            trainer.accelerator.scaler.load_state_dict(shared["scaler"])
        for name, one in trainer.kept.items():
            one.restore(shared[name])
        if trainer.average is not None:
            trainer.average.restore(shared["averaged_steps"], self._passed_on(self._averages))
        # a copy of the optimizer's state lives on in the optimizer: this one may go
        self._shared, self._weights, self._averages = {}, {}, {}
        if self._own is not None:
            self._own.pop("optimizer", None)

    def _passed_on(self, tensors: Tensors) -> Tensors:
        """Rank 0's tensors, on all ranks."""
        if self._world > 1:
            on_gpu = dist.get_backend() == "nccl"
            for name, tensor in tensors.items():
                sent = tensor.cuda() if on_gpu else tensor
                dist.broadcast(sent, 0)
                tensors[name] = sent.cpu() if on_gpu else sent
        return tensors

    def restore_random(self) -> None:
        """A rank that the saved training had not keeps the seed's."""
        if self._own is not None:
            set_random_state(self._own["random"])

    def restore_loss(self, trainer: Any) -> None:
        trainer._tr_loss.fill_(self._loss["sum"])
        trainer._total_loss_scalar = self._loss["total"]
        trainer._globalstep_last_logged = self._loss["logged"]


def _tensors(checkpoint: Artifact, file: str, read: bool) -> Tensors:
    """The tensors of a file, verified; with `read` false, empty ones of their shapes."""
    reader = Checkpoint(checkpoint, "the checkpoint", single=file)
    if read:
        return {name: reader.read(name) for name in reader.tensors}
    return {name: torch.empty(info.shape, dtype=getattr(torch, info.dtype)) for name, info in reader.tensors.items()}


class NotFinite(Exception):
    """A weight or a moment is not a finite number: not worth keeping, and not to be mistaken for a good checkpoint."""


class Uploads:
    """What one rank sends to the store, in a thread of its own, one part at a time. Rank 0's also waits for the others'
    parts, completes the checkpoint and deletes what is older than the ones to keep. The threads speak to each other
    through the store alone; what the main threads have to know (busy, failed) they read here. It runs at a lower
    priority: without spare cores it takes what training leaves."""

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
        out.facts |= {"step": part.step, "world": self._world, VERSION_FACT: self._run.steps_version, **facts}
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
            if (manifest := commit(out, self._world, self.give_up)) is None:
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
        declared = {key: (str(one.dtype).removeprefix("torch."), tuple(one.shape)) for key, one in tensors.items()}
        with out.writer(name) as sink:
            stream = SafetensorsStream(sink, declared)
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
