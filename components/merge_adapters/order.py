"""Do these adapters fit this model, in this order? Pure; no weight is read.

By the vocabulary contract: each adapter has the vocabulary before it, or one that extends it and brings the new rows.
By the lineage: an adapter of ours names the model it was trained on and what had been merged into it, which must be
what has been merged so far; a plain peft folder names nothing. When only the order is wrong, the right one is named.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.tokenizer.vocabulary import Relation, Vocabulary

_MOST_TRIED = 5
"""Adapters for which every order is tried (120)."""


@dataclass(frozen=True)
class Step:
    """An adapter: digest, vocabulary, whether it replaces every embedding, and the lineage it was trained on."""

    name: str
    digest: str
    vocabulary: Vocabulary | None
    brings_rows: bool
    trained_on: tuple[str, ...] | None


def _misfit(before: str, vocabulary: Vocabulary | None, lineage: tuple[str, ...], steps: Sequence[Step]) -> str | None:
    """The first reason why these do not fit, in this order; None when they do."""
    for step in steps:
        if vocabulary is not None and step.vocabulary is not None:
            relation = step.vocabulary.relation_to(vocabulary)
            both = f"{step.name} has {step.vocabulary} and {before} has {vocabulary}"
            if relation is Relation.FOREIGN:
                return f"{step.name} has {step.vocabulary}, foreign to the {vocabulary} of {before}"
            if relation is Relation.SHRINKS:
                return f"{both}: the first {relation.value} the second where it must be equal or extend it"
            if relation is Relation.EXTENDS and not step.brings_rows:
                return f"{both}: it extends them, but its modules_to_save bring no embedding rows for the new pieces"
        if step.trained_on is not None and step.trained_on != lineage:
            trained, here = _named(step.trained_on), _named(lineage)
            return f"{step.name} was trained on {trained}, and here it would be merged into {here}"
        vocabulary, before = step.vocabulary or vocabulary, step.name
        lineage = (*lineage, step.digest)
    return None


def _named(lineage: Sequence[str]) -> str:
    model, *merged = (digest[:12] for digest in lineage)
    return f"the model {model}" + (f" with {', '.join(merged)} merged" if merged else "")


def require_fit(model: Artifact, vocabulary: Vocabulary | None, steps: Sequence[Step]) -> list[str]:
    """The lineage of the merged model. InputError when the adapters do not fit, with the order that does, if any."""
    base = f"--model {model.root}", vocabulary, tuple(model.manifest.facts.get("lineage", [model.digest]))
    reason = _misfit(*base, steps)
    if reason is None:
        return [*base[2], *(step.digest for step in steps)]
    orders = permutations(steps) if 1 < len(steps) <= _MOST_TRIED else ()
    right = next((order for order in orders if _misfit(*base, order) is None), None)
    if right is None:
        raise InputError(f"--adapters: {reason}; merge the adapters into the model that they were trained on")
    names = ",".join(step.name for step in right)
    raise InputError(f"--adapters: the order is wrong ({reason}); give --adapters {names}")
