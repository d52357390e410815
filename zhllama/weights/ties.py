"""Is a model's head its embedding? Decided here for every stage; and whether it still is under an adapter.

A tied model has one table. An adapter that trains one use of it (modules_to_save, LoRA) leaves the other use the old
table: the result is not tied. Rows of the embedding that are trained are the head's as well, and what comes alike for
both (peft's ensure_weight_tying) is one table still. So it is while peft runs the adapter beside the model; its own
merge adds LoRA to the one tensor, for both uses, and twice where both have it: that is another model.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zhllama.errors import InputError
from zhllama.models.architecture import EMBEDDING, HEAD
from zhllama.weights.safetensors_io import Checkpoint

if TYPE_CHECKING:
    from zhllama.weights.adapter import Adapter

log = logging.getLogger("weights")

ROWS = 4096
"""Rows that are compared at once."""


def is_tied(checkpoint: Checkpoint) -> bool:
    """config.json says so, or there is no head among the tensors. A head that lies beside a tied embedding is not
    read, by no stage: some engines read it, others do not."""
    return bool(checkpoint.settings().get("tie_word_embeddings")) or HEAD not in checkpoint.tensors


def settle(checkpoint: Checkpoint, adapters: Sequence["Adapter"]) -> bool:
    """Whether the model is tied once the adapters are merged. The tensors that must be written are put right: without
    a head; or with one, whose rows are read from the embedding, and which changes as that did until they part."""
    if not is_tied(checkpoint):
        return False
    parted = None
    for index, adapter in enumerate(adapters):
        if parted is None and not stays_tied(adapter):
            parted = index
            log.info("%s: it changes embedding and head, which were one, apart; the head is now its own", adapter.where)
    checkpoint.leave_out(HEAD)
    if parted is None:
        return True
    for adapter in adapters[:parted]:
        _put(adapter, HEAD, _changes(adapter, EMBEDDING))
    checkpoint.tensors[HEAD] = replace(checkpoint.info(EMBEDDING), name=HEAD)
    return False


def stays_tied(adapter: "Adapter") -> bool:
    """Whether a tied model stays so under the adapter, whose changes of the table are then the embedding's alone;
    else what it changes of either is named for each. InputError for what has no one meaning."""
    saved = {name: key for name in (EMBEDDING, HEAD) if (key := adapter.replaced.get(name)) is not None}
    # saved beside what is trained, it is the table that both have
    common = next((key for name, key in saved.items() if not adapter.config.saves(name.removesuffix(".weight"))), None)
    if common is not None:
        adapter.replaced |= {EMBEDDING: common, HEAD: common} | saved
    if EMBEDDING in adapter.tokens:
        if HEAD in adapter.updates:
            said = "it trains rows of the embedding and LoRA on the head, which are one in this model"
            raise InputError(f"{adapter.where}: {said}; train it again with either")
        if HEAD not in saved and HEAD not in adapter.tokens:
            adapter.tokens[HEAD] = adapter.tokens[EMBEDDING]
    one = all(map(_alike, [adapter] * 3, _changes(adapter, EMBEDDING), _changes(adapter, HEAD)))
    _put(adapter, HEAD, (None, None, None) if one else _changes(adapter, HEAD))
    return one


def _changes(adapter: "Adapter", name: str) -> tuple[Any, ...]:
    return tuple(kind.get(name) for kind in (adapter.replaced, adapter.updates, adapter.tokens))


def _put(adapter: "Adapter", name: str, changes: Sequence[Any]) -> None:
    kinds: tuple[dict[str, Any], ...] = (adapter.replaced, adapter.updates, adapter.tokens)
    for kind, change in zip(kinds, changes, strict=True):
        kind.pop(name, None)
        if change is not None:
            kind[name] = change
    adapter.touched = {*adapter.replaced, *adapter.updates, *adapter.tokens}


def _alike(adapter: "Adapter", embedding: Any, head: Any) -> bool:
    """Whether two changes of one kind are the same."""
    if embedding is None or head is None or embedding == head:
        return bool(embedding == head)
    if isinstance(embedding, str):
        return _equal(adapter, embedding, head)
    if len(embedding) == 2:
        return bool(list(embedding[1]) == list(head[1])) and _equal(adapter, embedding[0], head[0])
    if not embedding.embedding or head.embedding or embedding.scale != head.scale:
        return False
    # peft gives the head the embedding's factors, transposed
    return _transposed(adapter, embedding.a, head.b) and _transposed(adapter, embedding.b, head.a)


def _equal(adapter: "Adapter", one: str, other: str) -> bool:
    import torch

    shape = tuple(adapter.stored[one].shape)
    return shape == tuple(adapter.stored[other].shape) and all(
        torch.equal(*(adapter.read(key, first, min(ROWS, shape[0] - first)) for key in (one, other)))
        for first in range(0, shape[0], ROWS)
    )


def _transposed(adapter: "Adapter", one: str, other: str) -> bool:
    import torch

    return torch.equal(adapter.read(one).T, adapter.read(other))
