"""Do these models fit each other, so that their weights can be blended? Known from headers, manifests and settings,
before a weight is read: one architecture of one shape, one arithmetic, and vocabularies of which each is the next one's
beginning. Whose rows are whose follows from that.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.models import architecture
from zhllama.models.architecture import EMBEDDING, HEAD
from zhllama.models.rope import Rope
from zhllama.tokenizer.vocabulary import Encoder, Relation, Vocabulary, has_tokenizer, load_encoder
from zhllama.weights.fit import contracts_of
from zhllama.weights.model_config import model_config
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.ties import is_tied

log = logging.getLogger("merge")


class Rows(NamedTuple):
    """Whose the rows of a table are: below `blended` of all the models, below `own` of the model that is changed, the
    rest, up to `all`, of the other."""

    blended: int
    own: int
    all: int


class Source:
    """A model, opened. InputError for one that is quantised, or of which something is not done here."""

    def __init__(self, artifact: Artifact, option: str) -> None:
        self.artifact = artifact.require_kind("hf-model", option=option)
        self.checkpoint = Checkpoint(artifact, option)
        self.checkpoint.refuse_quantised()
        self.where = self.checkpoint.where
        self.settings = model_config(self.checkpoint)
        self.tied = is_tied(self.checkpoint)
        if self.tied:
            self.checkpoint.leave_out(HEAD)
        self.encoder = load_encoder(artifact, option) if has_tokenizer(artifact) else None
        self.rows = self.checkpoint.info(EMBEDDING).shape[0]
        self.vocabulary: Vocabulary | None = None
        """With the digests of as many pieces as the others have."""


@dataclass(frozen=True)
class BlendPlan:
    """`models` as they were given. `named`: the one whose tokenizer the result has."""

    models: Sequence[Source]
    named: Source
    rows: Mapping[str, Rows]
    """Of every tensor that is blended."""
    encoder: Encoder | None
    vocabulary: Vocabulary | None


def plan_blend(models: Sequence[Source]) -> BlendPlan:
    """models: the one that is changed, the other, and for a chat vector that one's base. InputError, by name, for what
    does not fit."""
    first, *others = models
    for other in others:
        _require_same_shape(first, other)
    vocabularies = contracts_of([one.artifact for one in models], [one.encoder for one in models])
    for one, vocabulary in zip(models, vocabularies, strict=True):
        one.vocabulary = vocabulary
    for one, other in combinations(models, 2):
        _require_related(one, other)
    named = models[1] if _pieces(models[1]) > _pieces(first) else first
    table = _rows_of(models, named)
    places = architecture(first.settings, first.where).places(first.settings)
    tensors = first.checkpoint.tensors
    whole = {place.hf: place.shape[0] for place in places if place.hf in tensors}
    rows = {name: table if name in (EMBEDDING, HEAD) else Rows(count, count, count) for name, count in whole.items()}
    # where one has a tokenizer and the other has none, they have as many rows
    encoder = named.encoder or next((one.encoder for one in models[:2] if one.encoder), None)
    vocabulary = named.vocabulary or next((one.vocabulary for one in models[:2] if one.vocabulary), None)
    return BlendPlan(models, named, rows, encoder, vocabulary)


def _pieces(model: Source) -> int:
    return model.vocabulary.size if model.vocabulary else 0


def _rows_of(models: Sequence[Source], named: Source) -> Rows:
    first, sizes = models[0], {_pieces(one) for one in models}
    if len(sizes) == 1 or 0 in sizes:
        # padding is padding to all
        return Rows(min(one.rows for one in models), first.rows, first.rows)
    own = first.rows if named is first else _pieces(first)
    return Rows(min(sizes), own, named.rows)


def _arithmetic(model: Source) -> dict[str, Any]:
    """What two models must have alike, by the names of config.json."""
    settings, kind = model.settings, architecture(model.settings, model.where)
    size, rope = kind.sizes(settings), Rope.of(settings, model.where)
    said = {
        "model_type": kind.model_type,
        "num_hidden_layers": settings["num_hidden_layers"],
        "hidden_size": size["width"],
        "intermediate_size": size["wide"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["key_heads"],
        "head_dim": size["head"],
        "hidden_act": settings.get("hidden_act", "silu").replace("swish", "silu"),
        "rms_norm_eps": settings.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.theta,
        "rope_scaling": {"type": rope.kind, **rope.settings},
        "sliding_window": kind.window_of(settings),
        "tie_word_embeddings": model.tied,
    }
    return said | {flag: bool(settings.get(flag)) for flag in kind.flags}


def _require_same_shape(first: Source, other: Source) -> None:
    one, two = _arithmetic(first), _arithmetic(other)
    for name in one | two:
        if one.get(name) != two.get(name):
            raise InputError(
                f"{other.where}: {name} is {two.get(name)} where {first.where} has {one.get(name)}; give models of one "
                "architecture and shape"
            )


def _require_related(one: Source, other: Source) -> None:
    """InputError unless one's vocabulary is the other's, or its beginning. Their ends may differ: an instruct model has
    <|im_end|> where its base has <|endoftext|>, among the same pieces."""
    mine, its = one.vocabulary, other.vocabulary
    if mine is None or its is None:
        lacks = one if mine is None else other
        if one.rows != other.rows:
            raise InputError(
                f"{lacks.where}: no tokenizer in it, and {other.where} has {other.rows} rows where {one.where} has "
                f"{one.rows}; give each with its tokenizer"
            )
        log.warning("%s: no tokenizer in it: its rows are taken for those of the others", lacks.where)
    elif replace(mine, eos=its.eos).relation_to(its) is Relation.FOREIGN:
        raise InputError(
            f"{other.where} has {its}, foreign to the {mine} of {one.where}; give models of one vocabulary, or one "
            "with the other's extended (extend_tokenizer)"
        )
