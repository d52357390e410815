"""Do these fit together? One answer for every stage, before a weight is read: a tokenizer and the rows of its model;
a dataset, or an adapter that is trained further, and the model; adapters and what they are merged into.

Adapters by the vocabulary contract: each has the vocabulary before it, or one that extends it and brings the new rows.
And by what they were trained on: an adapter of ours names the model's weights, by their bytes, and its lineage: the
model and what had been merged into that. A plain peft folder names nothing. When only the order is wrong, the right
one is named.
"""

import hashlib
import logging
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

from zhllama.artifacts.manifest import File, digest_of
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.tokenizer.vocabulary import Encoder, Relation, Vocabulary

log = logging.getLogger("adapter")

_MOST_TRIED = 5
"""Adapters for which every order is tried (120)."""


def rows_fit(pieces: int, rows: int, contract: Vocabulary | None) -> bool:
    """Whether embeddings of `rows` rows belong to `pieces` pieces: as many, or as many as the contract says; where
    there is none (a plain folder), padded to a multiple of eight, which is what people pad to: how far, nobody says."""
    if contract is not None:
        return rows in (pieces, contract.rows)
    return rows == pieces or (rows > pieces and rows % 8 == 0)


def require_rows(pieces: int, rows: int, where: str, what: str, fit: bool | None = None) -> None:
    """InputError for rows that do not belong to the pieces: fewer, or what `fit` (rows_fit) says where padding counts.
    `what` has the rows, as `the model`; `where` begins the message."""
    if not (rows >= pieces if fit is None else fit):
        raise InputError(
            f"{where}: its tokenizer has {pieces} pieces and {what} {rows} rows; give a model and a tokenizer that "
            "belong together, or extend the model first"
        )


def require_equal(have: Vocabulary | None, want: Vocabulary | None, have_name: str, want_name: str) -> None:
    """InputError unless both contracts are there and equal. Names say what is compared: `--dataset s3://…`."""
    if have is None or want is None:
        missing = have_name if have is None else want_name
        raise InputError(f"{missing}: carries no vocabulary contract; give an artifact with a tokenizer")
    relation = have.relation_to(want)
    if relation is not Relation.EQUAL:
        raise InputError(
            f"{have_name} has {have} and {want_name} has {want}: the first {relation.value} the second where they must "
            "be equal; use the artifacts of one extension"
        )


def require_trained_on(adapter: Artifact, model: Artifact, where: str) -> None:
    """InputError for an adapter that names another model than this one as its own. What has no manifest may be what it
    names: its digest is of whatever files lie there."""
    trained, here = trained_on(adapter), lineage_of(model)
    if trained in (None, here, (model.digest,)):
        return
    if (named := base_weights(adapter)) and named == weights_of(model):
        return
    if model.verified:
        raise InputError(
            f"{where}: it was trained on {_named(trained)}, not on {_named(here)}; give that model, or merge the "
            "adapter and start a new one"
        )
    said = "%s: it was trained on %s; %s has no manifest: taken as that"
    log.warning(said, where, _named(trained), model.root)


def weights_of(model: Artifact) -> str:
    """The digest of a model's weights, by the bytes of its files: the same however the model came here, whatever lies
    beside them. Files whose SHA-256 nobody knows (of a plain folder) are read."""

    def sha256(file: File) -> str:
        if file.sha256:
            return file.sha256
        found = hashlib.sha256()

        def take(piece: memoryview) -> int:
            found.update(piece)
            return len(piece)

        model.pour(file.path, take)
        return found.hexdigest()

    own = [file for file in model.manifest.files if "/" not in file.path]
    weights = [file for file in own if file.path.endswith(".safetensors")]
    return digest_of(sorted(map(sha256, weights or [file for file in own if file.path.endswith(".bin")])))


def base_weights(adapter: Artifact) -> str:
    """The digest (`weights_of`) of the model that an adapter was trained on; empty when it does not say."""
    return str(adapter.manifest.facts.get("base_weights", ""))


def lineage_of(model: Artifact) -> tuple[str, ...]:
    """A model's digest; or, of one that adapters were merged into, the base's digest and theirs."""
    return tuple(model.manifest.facts.get("lineage", [model.digest]))


def trained_on(adapter: Artifact) -> tuple[str, ...] | None:
    """The lineage of the model that an adapter was trained on; None when it does not say."""
    facts = adapter.manifest.facts
    named = facts.get("base_lineage") or [facts.get("base_digest")]
    return tuple(named) if all(named) else None


def contracts_of(artifacts: Sequence[Artifact], encoders: Sequence[Encoder | None]) -> list[Vocabulary | None]:
    """The contract of each: of its tokenizer (`encoders`; None where an artifact has none of its own), with prefix
    digests at the others' sizes, else its manifest's."""
    sizes = [encoder.size for encoder in encoders if encoder is not None]
    sizes += [one.manifest.vocabulary.size for one in artifacts if one.manifest.vocabulary is not None]
    return [
        encoder.vocabulary(also_at=sizes) if encoder is not None else one.manifest.vocabulary
        for encoder, one in zip(encoders, artifacts)
    ]


class Step(NamedTuple):
    """An adapter that is to be merged. What it was trained on: `trained_on`, `base_weights`."""

    name: str
    digest: str
    vocabulary: Vocabulary | None
    rows: int | None
    """Of the embedding that it brings; None: the embedding stays."""
    trained_on: tuple[str, ...] | None
    pieces: Sequence[str] = ()
    """Of its vocabulary, where they are known."""
    base_weights: str = ""
    verified: bool = True
    """Whether its digest is its own: that of a folder without a manifest is of whatever files lie there."""


def require_fit(model: Artifact, vocabulary: Vocabulary | None, rows: int, steps: Sequence[Step]) -> list[str]:
    """The lineage of the merged model. InputError when the adapters do not fit, with the order that does, if any. What
    has no manifest may be what an adapter names, and is then taken as that by the others too."""
    base = f"--model {model.root}", vocabulary, rows, lineage_of(model) if model.verified else None
    steps = _as_here(steps, model) if model.verified else steps
    reason = _misfit(*base, steps)
    if reason is None:
        return [*lineage_of(model), *(step.digest for step in steps)]
    orders = permutations(steps) if 1 < len(steps) <= _MOST_TRIED else ()
    right = next((order for order in orders if _misfit(*base, order) is None), None)
    if right is None:
        raise InputError(f"--adapters: {reason}; merge the adapters into the model that they were trained on")
    names = ",".join(step.name for step in right)
    raise InputError(f"--adapters: the order is wrong ({reason}); give --adapters {names}")


def _as_here(steps: Sequence[Step], model: Artifact) -> list[Step]:
    """With this model's lineage where they name it otherwise: by its digest alone, or as another model of the same
    weights, into which others were merged since."""
    here = lineage_of(model)
    others: set[tuple[str, ...]] = {(model.digest,)}
    strangers = [step for step in steps if step.base_weights and step.trained_on not in (None, here, (model.digest,))]
    if strangers:
        weights = weights_of(model)
        others |= {step.trained_on for step in strangers if step.trained_on and step.base_weights == weights}

    def renamed(step: Step) -> Step:
        for other in others:
            if step.trained_on is not None and step.trained_on[: len(other)] == other:
                return step._replace(trained_on=(*here, *step.trained_on[len(other) :]))
        return step

    return [renamed(step) for step in steps]


def _misfit(
    before: str, vocabulary: Vocabulary | None, rows: int, lineage: tuple[str, ...] | None, steps: Sequence[Step]
) -> str | None:
    """The first reason why these do not fit, in this order; None when they do. lineage: None where nobody knows."""
    for step in steps:
        rows = rows if step.rows is None else step.rows
        if vocabulary is not None and step.vocabulary is not None:
            relation = step.vocabulary.relation_to(vocabulary)
            both = f"{step.name} has {step.vocabulary} and {before} has {vocabulary}"
            if relation is Relation.FOREIGN:
                return f"{step.name} has {step.vocabulary}, foreign to the {vocabulary} of {before}"
            if relation is Relation.SHRINKS:
                return f"{both}: the first {relation.value} the second where it must be equal or extend it"
            if step.vocabulary.size > rows:
                new = ", ".join(step.pieces[rows : rows + 3]) or f"{step.vocabulary.size - rows} pieces"
                return f"{both}: it extends them, but its modules_to_save bring no embedding rows for {new}"
        trained = step.trained_on or lineage
        if trained and lineage and trained != lineage:
            both = f"{_named(trained)}, and here it would be merged into {_named(lineage)}"
            return f"{step.name} was trained on {both}"
        vocabulary, before = step.vocabulary or vocabulary, step.name
        lineage = (*trained, step.digest) if trained and step.verified else None
    return None


def _named(lineage: Sequence[str]) -> str:
    model, *merged = (digest[:12] for digest in lineage)
    return f"the model {model}" + (f" with {', '.join(merged)} merged" if merged else "")
