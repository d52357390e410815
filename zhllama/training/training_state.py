"""All that a training is made of between two steps: taken to the host in a moment, put back to the last bit.

Nothing here is pickled. A state is a tree of dictionaries, lists and numbers, written as JSON, whose tensors stand in
a safetensors file: what is read back can hold numbers and nothing that runs. (DeepSpeed 0.19's own loader calls
torch.load with weights_only=False, which runs whatever the file says.) Taking it costs one copy to host memory, into
buffers that are kept for the next time; writing is for a thread (uploads.py).
"""

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer

from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.training.checkpoints import SHARED, TRAINER, WEIGHTS, state_of
from zhllama.weights.safetensors_io import Checkpoint, TensorInfo

Tree = Any
"""Dictionaries with texts or whole numbers as keys, lists, tuples, numbers, texts, None and tensors."""
Tensors = dict[str, torch.Tensor]


# --- trees ------------------------------------------------------------------------------------------------------------


def flatten(tree: Tree, tensors: Tensors, name: str = "") -> Any:
    """The tree as JSON; its tensors go into `tensors`, by their way in the tree. ValueError for anything else."""
    if isinstance(tree, torch.Tensor):
        tensors[name or "tensor"] = tree.detach()
        return {"tensor": name or "tensor"}
    if isinstance(tree, dict):
        return {"dict": [[_key(key), flatten(value, tensors, f"{name}/{key}")] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [flatten(value, tensors, f"{name}/{index}") for index, value in enumerate(tree)]}
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    raise ValueError(f"{name}: a {type(tree).__name__} has no place in a checkpoint")


def _key(key: Any) -> str | int:
    if type(key) not in (str, int):
        raise ValueError(f"{key!r}: a key of a checkpoint is a text or a whole number")
    return key


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


# --- taking -----------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """One rank's share of a checkpoint, in host memory: file name → JSON, file name → tensors."""

    step: int
    documents: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensors] = field(default_factory=dict)


class Buffers:
    """Host memory that is used again for each checkpoint (fresh pages cost more than the copy)."""

    def __init__(self) -> None:
        self._kept: Tensors = {}

    def copy(self, tensors: Mapping[str, torch.Tensor], file: str) -> Tensors:
        """Copies in host memory. From a GPU they are complete after the next `settle`."""
        made = {}
        for name, tensor in tensors.items():
            key = f"{file}:{name}"
            kept = self._kept.get(key)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._kept[key] = kept
            made[name] = kept.copy_(tensor, non_blocking=True)
        return made

    def settle(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def take(trainer: Trainer, buffers: Buffers) -> Part:
    """This rank's part of a checkpoint of the step that has just ended. To be called by all ranks at once."""
    part = Part(trainer.state.global_step)
    first = trainer.args.process_index == 0
    zero_stage = zero_stage_of(trainer)
    trainable = _trained(trainer)
    shared: Tree = {"scheduler": trainer.lr_scheduler.state_dict(), "scaler": _scaler(trainer)}  # type: ignore[union-attr]
    own: Tree = {"random": random_state(), "loss": _loss_since_logged(trainer)}
    with _partitioned(trainer):
        if trainer.is_deepspeed_enabled:
            own["optimizer"] = _of_engine(_engine(trainer))
        elif first:
            shared["optimizer"] = trainer.optimizer.state_dict()  # type: ignore[union-attr]
        _add(part, state_of(trainer.args.process_index), own, buffers)
    if zero_stage == 3:
        weights = _gathered(trainable, first)
    else:
        weights = {name: parameter.detach() for name, parameter in trainable.items()} if first else {}
    if first:
        _add(part, SHARED, shared, buffers)
        part.tensors[WEIGHTS] = buffers.copy(weights, WEIGHTS)
        part.documents[TRAINER] = asdict(trainer.state)
    buffers.settle()
    return part


def _add(part: Part, name: str, tree: Tree, buffers: Buffers) -> None:
    tensors: Tensors = {}
    part.documents[f"{name}.json"] = flatten(tree, tensors)
    part.tensors[f"{name}.safetensors"] = buffers.copy(tensors, name)


def zero_stage_of(trainer: Trainer) -> int:
    """0 without DeepSpeed, else its ZeRO stage."""
    return int(_engine(trainer).zero_optimization_stage()) if trainer.is_deepspeed_enabled else 0


def _engine(trainer: Trainer) -> Any:
    return trainer.model_wrapped


def _trained(trainer: Trainer) -> dict[str, nn.Parameter]:
    model: Any = trainer.model
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _gathered(parameters: Mapping[str, nn.Parameter], keep: bool) -> Tensors:
    """ZeRO-3's parameters, whole, one after another: each lies in pieces on all ranks. Copies, where `keep`."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    whole = {}
    for name, parameter in parameters.items():
        with GatheredParameters([parameter]):
            if keep:
                whole[name] = parameter.detach().to("cpu", copy=True)
    return whole


def _loss_since_logged(trainer: Trainer) -> Tree:
    """The Trainer's sum of losses since its last log line: with it, a line that spans a restart is the same."""
    return {
        "sum": float(trainer._tr_loss.item()),
        "total": float(trainer._total_loss_scalar),
        "logged": int(trainer._globalstep_last_logged),
    }


def _scaler(trainer: Trainer) -> Tree:
    scaler = trainer.accelerator.scaler
    return None if scaler is None else scaler.state_dict()


# --- DeepSpeed's engine -----------------------------------------------------------------------------------------------

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
    state = dict(saved["zero"])
    scaler = getattr(optimizer, "loss_scaler", None)
    for name, value in saved["scales"].items():
        setattr(scaler, name, value)
    if not engine.zero_optimization():
        optimizer.load_state_dict(state)
    else:
        state["loss_scaler"] = scaler
        # by rank; no other rank's is looked at
        optimizer.load_state_dict({dist.get_rank(): state}, load_from_fp32_weights=True)
    for name, value in saved["counters"].items():
        setattr(engine, name, value)


@contextmanager
def _partitioned(trainer: Trainer) -> Iterator[None]:
    """ZeRO-3's parameters in their pieces, as DeepSpeed brings them to save and to load; nothing to do elsewhere."""
    optimizer: Any = _engine(trainer).optimizer if trainer.is_deepspeed_enabled else None
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    yield
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()


# --- random numbers ---------------------------------------------------------------------------------------------------


def random_state() -> Tree:
    """The state of Python's, numpy's and torch's generators in this process."""
    version, words, following = random.getstate()
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": following},
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Tree) -> None:
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


# --- restoring --------------------------------------------------------------------------------------------------------


class Saved:
    """A checkpoint as this rank needs it, read and verified before anything of the training is touched.

    What all ranks have alike is read by rank 0 and passed on when it is put back; `load` holds no collective.
    """

    def __init__(self, checkpoint: Artifact, rank: int) -> None:
        self.manifest = checkpoint.manifest
        self.step: int = checkpoint.manifest.facts["step"]
        self.trainer: dict[str, Any] = json.loads(checkpoint.read(TRAINER))
        self._rank = rank
        self._shared_places = json.loads(checkpoint.read(f"{SHARED}.json"))
        self._shared = _tensors(checkpoint, f"{SHARED}.safetensors", rank == 0)
        self._weights = _tensors(checkpoint, WEIGHTS, rank == 0)
        world = checkpoint.manifest.facts["world"]
        self._own: Tree = None
        if rank < world:
            self._own = _tree(checkpoint, state_of(rank))
        if world != _world():
            # a mean over other ranks: what the log line that spans the restart is made of
            losses = [json.loads(checkpoint.read(f"{state_of(other)}.json")) for other in range(world)]
            sums = [unflatten(_branch(places, "loss"), {}) for places in losses]
            self._loss = {**sums[0], "sum": sum(one["sum"] for one in sums) / world}
        else:
            self._loss = self._own["loss"]

    def restore(self, trainer: Trainer) -> None:
        """Weights, optimizer, scheduler, scales. To be called by all ranks, when the Trainer has wrapped the model."""
        shared = unflatten(self._shared_places, _passed_on(self._shared))
        zero_stage = zero_stage_of(trainer)
        weights = _passed_on(self._weights) if zero_stage != 3 else {}
        with torch.no_grad(), _partitioned(trainer) if trainer.is_deepspeed_enabled else nullcontext():
            if zero_stage != 3:
                _copy_into(_trained(trainer), weights, self.manifest.root)
            if trainer.is_deepspeed_enabled:
                _restore_engine(_engine(trainer), self._own["optimizer"])
            else:
                trainer.optimizer.load_state_dict(shared["optimizer"])  # type: ignore[union-attr]
        trainer.lr_scheduler.load_state_dict(shared["scheduler"])  # type: ignore[union-attr]
        if trainer.accelerator.scaler is not None and shared["scaler"] is not None:
            trainer.accelerator.scaler.load_state_dict(shared["scaler"])
        # a copy of the optimizer's state lives on in the optimizer: this one may go
        self._shared, self._weights = {}, {}
        if self._own is not None:
            self._own.pop("optimizer", None)

    def restore_random(self) -> None:
        """A rank that the saved training had not keeps the seed's."""
        if self._own is not None:
            set_random_state(self._own["random"])

    def restore_loss(self, trainer: Trainer) -> None:
        trainer._tr_loss.fill_(self._loss["sum"])
        trainer._total_loss_scalar = self._loss["total"]
        trainer._globalstep_last_logged = self._loss["logged"]


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _branch(places: Any, name: str) -> Any:
    return dict(places["dict"])[name]


def _tree(checkpoint: Artifact, name: str) -> Tree:
    tensors = _tensors(checkpoint, f"{name}.safetensors", True)
    return unflatten(json.loads(checkpoint.read(f"{name}.json")), tensors)


def _tensors(checkpoint: Artifact, file: str, read: bool) -> Tensors:
    """The tensors of a file, verified; with `read` false, empty ones of their shapes."""
    reader = Checkpoint(checkpoint, "the checkpoint", single=file)
    return {name: reader.read(name) if read else _empty(info) for name, info in reader.tensors.items()}


def _empty(info: TensorInfo) -> torch.Tensor:
    return torch.empty(info.shape, dtype=getattr(torch, info.dtype))


def _passed_on(tensors: Tensors) -> Tensors:
    """Rank 0's tensors, on all ranks."""
    if _world() > 1:
        on_gpu = dist.get_backend() == "nccl"
        for name, tensor in tensors.items():
            sent = tensor.cuda() if on_gpu else tensor
            dist.broadcast(sent, 0)
            tensors[name] = sent.cpu() if on_gpu else sent
    return tensors


def _copy_into(parameters: Mapping[str, nn.Parameter], saved: Mapping[str, torch.Tensor], where: str) -> None:
    for name in sorted(parameters.keys() | saved.keys()):
        if name not in saved or name not in parameters or saved[name].shape != parameters[name].shape:
            raise InputError(f"the checkpoint {where}: its weight {name} is none of this model's; give another")
        parameters[name].data.copy_(saved[name])


def weights_of(checkpoint: Artifact) -> Tensors:
    """What was trained, by the names of the model's parameters."""
    return _tensors(checkpoint, WEIGHTS, True)
