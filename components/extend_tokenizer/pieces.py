"""Which pieces are appended to LLaMA's vocabulary, and with which scores.

The recipe's rule (`zero`, `all`): each absent piece in the Chinese model's order, score 0, then `[PAD]`; settings stay.
The defaults depart from it. Scores are one apart, below the lowest ordinary piece (LLaMA's white space at −1e9 is none:
float32 has steps of 64 there), because engines break ties each their own way. Only pieces that no English text can hold
are appended: others changed the ids of 113 to 327 of 3,000 English lines. Of those, ones with a character that has no
piece stay away (`tokenizers` takes it apart into bytes), and ones with two spaces (LLaMA's own, which tie).

A unigram model's pieces need not be the sum of two others (笔|记|本 without 笔记: 143 of 6,020). The intermediates are
appended after all others and grow from the first Chinese part outwards. Under zero scores they are only counted.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from components.extend_tokenizer.options import ExtendTokenizer, Pieces, Scores
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.tokenizer.han import HAN
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import CONTROL, NORMAL, parse_model
from zhllama.tokenizer.vocabulary import PAD_PIECE, Encoder, tokenizer_model_in

SPACE = "▁"
SHOWN = 20
"""Pieces that the manifest shows of those it counts."""

_CHINESE = re.compile(
    "["
    f"{HAN}"
    "\u3000-\u303f"  # CJK symbols and punctuation: 、。々〇《》「」
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"  # full-width punctuation: ！（），：；？
    "]"
)


def is_chinese(piece: str) -> bool:
    """Whether a piece holds a Han character or full-width punctuation, so that no English text contains it."""
    return _CHINESE.search(piece) is not None


class Extended(NamedTuple):
    """A base's tokenizer with new pieces: those of them that are whole characters, the base's own ids of each, what the
    manifest says of them, and what of that the summary does."""

    encoder: Encoder
    texts: list[str]
    splits: list[list[int]]
    facts: dict[str, Any]
    said: str


class Extension(NamedTuple):
    """An extended `tokenizer.model`, the texts that were appended (`[PAD]` included), and what was not, counted.
    `completing`: the appended ones that no model has, there so that merges reach others. `dropped`: pieces that merges
    do not reach even so."""

    model: bytes
    appended: list[str]
    present: int
    left_out: int
    completing: list[str]
    dropped: list[str]


def extended(base: bytes, chinese: Sequence[tuple[str, bytes]], scores: Scores, pieces: Pieces, pad: bool) -> Extension:
    """Appends to the model `base` the pieces of each Chinese model (a name for messages, its bytes) in turn. InputError
    when a model is not SentencePiece's, or gives nothing new."""
    proto = parse_model(base)
    there = {piece.piece for piece in proto.pieces}
    appended: list[str] = []
    present = left_out = 0
    for name, model in chinese:
        before = len(appended)
        given = [piece.piece for piece in parse_model(model, name).pieces]
        wanted = set(given)
        if pieces == "han":
            # with two spaces, a merge on the way ties with one of LLaMA's white space
            wanted = {piece for piece in given if is_chinese(piece) and SPACE * 2 not in piece}
            letters = {piece for piece in wanted | there if len(piece) == 1}
            wanted = {piece for piece in wanted if letters.issuperset(piece)}
        for piece in given:
            if piece in there:
                present += 1
            elif piece not in wanted:
                left_out += 1
            else:
                appended.append(piece)
                there.add(piece)
        if len(appended) == before:
            raise InputError(f"{name}: all its Chinese pieces are in the vocabulary already; leave it out")
    completing, dropped = ([], []) if scores == "zero" else _completed(base, appended)
    _append(proto, appended, scores)
    if pad and PAD_PIECE not in there:
        _append(proto, [PAD_PIECE], scores)
        if scores == "distinct":
            # no text is ever encoded to it
            proto.pieces[-1].type = CONTROL
        appended.append(PAD_PIECE)
    if not appended:
        raise InputError(
            f"nothing to append: {PAD_PIECE} is there already; give --chinese-tokenizer, or skip this stage"
        )
    return Extension(proto.SerializeToString(), appended, present, left_out, completing, dropped)


def extended_sentencepiece(base: SentencePieceEncoder, given: Sequence[Artifact], config: ExtendTokenizer) -> Extended:
    """InputError as of `extended`, or for a model that is not SentencePiece's."""
    chinese = [tokenizer_model_in(each, "--chinese-tokenizer") for each in given]
    made = extended(base.model, chinese, config.scores, config.pieces, config.pad)
    facts = {
        "pieces_before": base.size,
        "appended": len(made.appended),
        "already_there": made.present,
        "left_out": made.left_out,
        "completing": {"count": len(made.completing), "first": made.completing[:SHOWN]},
        "dropped": {"count": len(made.dropped), "first": made.dropped[:SHOWN]},
        "unreachable": unreachable(made),
    }
    said = [
        (made.completing, f", {len(made.completing)} of them so that merges reach others"),
        (made.dropped, f", {len(made.dropped)} dropped that merges cannot reach"),
    ]
    found = splits(base.model, made.appended)
    return Extended(
        SentencePieceEncoder(made.model), made.appended, found, facts, "".join(text for holds, text in said if holds)
    )


def _append(proto: Any, texts: Iterable[str], scores: Scores) -> None:
    """With distinct scores, below the lowest of the pieces that merges make of text, white space apart."""
    lowest = min(piece.score for piece in proto.pieces if piece.type == NORMAL and piece.piece.strip(SPACE))
    for index, text in enumerate(texts):
        proto.pieces.add(piece=text, score=0.0 if scores == "zero" else lowest - 1 - index)


def _completed(base: bytes, appended: list[str]) -> tuple[list[str], list[str]]:
    """Appends to `appended` what it takes that merges make each of its pieces; takes out what cannot be helped. Returns
    what was put in and what was taken out."""
    letters = {piece.piece for piece in parse_model(base).pieces} | set(appended)
    # a character without a piece is bytes to some engines, and then no part of a longer piece
    completing = [letter for letter in dict.fromkeys("".join(appended)) if letter not in letters]
    appended += completing
    dropped: list[str] = []
    while missed := _missed(base, appended):
        have = set(appended)
        new = list(dict.fromkeys(text for parts in missed.values() for text in _steps(parts) if text not in have))
        if not new:
            dropped += missed
            appended[:] = [text for text in appended if text not in missed]
        appended += new
        completing += new
    return [text for text in completing if text not in dropped], dropped


def _missed(base: bytes, appended: list[str]) -> dict[str, list[str]]:
    """The pieces that merges cannot make, each with the parts where they stop."""
    proto = parse_model(base)
    _append(proto, appended, "distinct")
    model = proto.SerializeToString()
    pieces = SentencePieceEncoder(model).pieces
    made = zip(appended, splits(model, appended), strict=True)
    return {text: [pieces[index] for index in ids] for text, ids in made if len(ids) > 1}


def _steps(parts: list[str]) -> list[str]:
    """The intermediates from which merges make the whole of three parts or more, growing from the first Chinese one."""
    start = next((index for index, part in enumerate(parts) if is_chinese(part)), 0)
    right = ["".join(parts[start:end]) for end in range(start + 2, len(parts) + 1)]
    left = ["".join(parts[begin:]) for begin in range(start - 1, 0, -1)]
    return [text for text in right + left if text != "".join(parts)]


def splits(model: bytes, pieces: Iterable[str]) -> list[list[int]]:
    """The ids into which a tokenizer splits each piece as it stands, without a space put before it."""
    proto = parse_model(model)
    proto.normalizer_spec.add_dummy_prefix = False
    return SentencePieceEncoder(proto.SerializeToString()).encode_batch(list(pieces))


def unreachable(extension: Extension) -> int:
    """How many appended pieces merges cannot make, so that no text is ever encoded to them (`[PAD]` not counted)."""
    size = SentencePieceEncoder(extension.model).size
    first = size - len(extension.appended)
    made = splits(extension.model, extension.appended)
    return sum(ids != [first + index] for index, ids in enumerate(made) if extension.appended[index] != PAD_PIECE)
