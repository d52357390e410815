"""What becomes of a model when adapters are merged into it: known from headers and manifests, before a weight is read.

One answer for whoever merges them and whoever asks a model with them: which vocabulary each adapter has, whether they
fit, how many rows there are after each, and whether embedding and head are still one.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from zhllama.artifacts.manifest import digest_of
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.models.architecture import EMBEDDING
from zhllama.tokenizer.effective_model import DESCRIBED
from zhllama.tokenizer.vocabulary import Encoder, Vocabulary, has_tokenizer, load_encoder
from zhllama.weights.adapter import Adapter, Shape
from zhllama.weights.beside import require_known_tokens
from zhllama.weights.fit import Step, base_weights, contracts_of, require_fit, trained_on
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.ties import settle

log = logging.getLogger("adapter")


class Merged(NamedTuple):
    """A model once an adapter is merged into it."""

    adapter: Adapter
    encoder: Encoder | None
    rows: int
    """Of the embedding."""


@dataclass(frozen=True)
class MergePlan:
    """`steps`: the model after each adapter; the rest: after them all."""

    steps: list[Merged]
    encoder: Encoder | None
    vocabulary: Vocabulary | None
    shapes: Mapping[str, Shape]
    tied: bool
    lineage: list[str]


def plan_merge(
    model: Artifact, checkpoint: Checkpoint, given: Sequence[Artifact], names: Sequence[str], scale: float = 1.0
) -> MergePlan:
    """The tensors of `checkpoint` that must be written are put right (ties.settle). names: what the user calls each
    adapter. scale: of what each changes. InputError for adapters that do not fit the model, or one another."""
    adapters = [Adapter(one.require_kind("adapter", option="--adapters"), "--adapters", scale) for one in given]
    tied = settle(checkpoint, adapters)
    first = rows = checkpoint.info(EMBEDDING).shape[0]
    shapes: Mapping[str, Shape] = {name: info.shape for name, info in checkpoint.tensors.items()}
    encoder = load_encoder(model, "--model") if has_tokenizer(model) else None
    steps, own = [], [encoder]
    for adapter in adapters:
        rows = _rows_in(adapter) or rows
        own.append(encoder_of(adapter.artifact, "--adapters", encoder, rows))
        encoder = own[-1] or encoder
        if encoder is None:
            require_known_tokens(model, adapter.artifact, rows)
        steps.append(Merged(adapter, encoder, rows))
    vocabularies = contracts_of([model, *given], own)
    known, named = model.verified, []
    for adapter, name, vocabulary, its in zip(adapters, names, vocabularies[1:], own[1:], strict=True):
        artifact, trained = adapter.artifact, trained_on(adapter.artifact)
        if trained and not known and trained[0] != model.digest:
            log.warning("%s: it names its model by digest, and this has no manifest: taken as that", adapter.where)
        pieces, weights = its.pieces if its else (), base_weights(artifact)
        rows_in, verified = _rows_in(adapter), artifact.verified
        named.append(Step(name, artifact.digest, vocabulary, rows_in, trained, pieces, weights, verified))
        known = (known or trained is not None) and verified
    lineage = require_fit(model, vocabularies[0], first, named)
    if scale != 1:
        # what an adapter was trained on is the model with the whole of those before it
        before = len(lineage) - len(named)
        lineage = [*lineage[:before], *(digest_of([digest, scale]) for digest in lineage[before:])]
    for adapter, vocabulary in zip(adapters, vocabularies[1:]):
        shapes = adapter.fitted(shapes, model.root, vocabulary.size if vocabulary else None)
    last = next((found for found in reversed(vocabularies) if found is not None), None)
    return MergePlan(steps, encoder, last, shapes, tied, lineage)


def nothing_changed(names: Sequence[str], model: Artifact) -> InputError:
    """For adapters that leave every weight as it is: what they were merged for is not in them."""
    return InputError(
        f"--adapters {','.join(names)}: merging changes no weight of {model.root}; the adapters are all zero "
        "(untrained, or saved empty)"
    )


def _rows_in(adapter: Adapter) -> int | None:
    """Of the embedding that an adapter brings."""
    key = adapter.replaced.get(EMBEDDING)
    return None if key is None else int(adapter.stored[key].shape[0])


def encoder_of(adapter: Artifact, option: str, before: Encoder | None, rows: int) -> Encoder | None:
    """An adapter's own tokenizer, or that of the model `before` with the tokens that the adapter's files name; None
    where it has neither. Padding that has no row among `rows` is left out, as transformers does: no row is asked for
    what is masked."""
    if has_tokenizer(adapter):
        encoder = load_encoder(adapter, option)
    elif before is not None and any(name in adapter for name in DESCRIBED):
        encoder = load_encoder(adapter, option, before)
    else:
        return None
    if encoder.size == rows + 1 and encoder.pad == rows:
        log.warning("%s: its padding %s has no row: it is left out", adapter.root, encoder.pieces[rows])
        encoder = encoder.without_last()
    return encoder
