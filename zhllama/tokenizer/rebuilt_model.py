"""The SentencePiece model that a tokenizer.json was converted from, put together again.

What transformers, trl or mergekit save of a LLaMA tokenizer is tokenizer.json alone. Its vocabulary has the pieces in
their order, its merges the order of their scores: a piece's score is the rank of the first merge that makes it. White
space that is merged last keeps LLaMA's −1e9, so that an extension's pieces come before it. The result is held against
the file on lines made of its own pieces; another kind of tokenizer is refused, and what is byte-level is none of these.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from zhllama.errors import InputError
from zhllama.tokenizer.sentencepiece_model import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, new_model

_SPACE = "▁"
_BYTES = {f"<0x{value:02X}>" for value in range(256)}
_WHITE = -1e9
_STEP = 64.0
"""Between scores of white space: float32 has no smaller steps there."""
_ELSE = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
"""Settings of the BPE that SentencePiece has not."""


def is_byte_level(fast: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is a byte-level one, as LLaMA 3's or GPT-2's, or none at all."""
    parts = _parts(fast.get("pre_tokenizer"), fast.get("decoder"))
    return "model" not in fast or any(part.get("type") == "ByteLevel" for part in parts)


def rebuilt_model(fast: Mapping[str, Any], where: str) -> Any:
    """The ModelProto of a tokenizer.json's object (without the tokens that it adds above its vocabulary). InputError
    where it is none that SentencePiece could have written."""
    try:
        return _rebuilt(fast)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{where}: no SentencePiece model can be made of it ({error}); give a tokenizer.model, or LLaMA's "
            "tokenizer as it was saved"
        ) from error


def _rebuilt(fast: Mapping[str, Any]) -> Any:
    model = fast["model"]
    if (kind := model.get("type", "BPE")) != "BPE":
        raise ValueError(f"it is {kind}, not BPE")
    for name in _ELSE:
        if model.get(name):
            raise ValueError(f"it has {name}")
    vocabulary: dict[str, int] = model["vocab"]
    texts = {index: text for text, index in vocabulary.items()}
    added = dict.fromkeys(_read_whole(fast), False)
    added |= {one["content"]: bool(one["special"]) for one in fast.get("added_tokens") or ()}
    texts |= {one["id"]: one["content"] for one in fast.get("added_tokens") or () if one["id"] < len(texts)}
    if sorted(texts) != list(range(len(texts))) or len(set(texts.values())) < len(texts):
        raise ValueError("its ids have holes, or a piece has two")
    unknown = model.get("unk_token") or "<unk>"
    if unknown not in vocabulary:
        raise ValueError(f"{unknown} is not in its vocabulary")
    fallback = bool(model.get("byte_fallback"))
    if fallback and not vocabulary.keys() >= _BYTES:
        raise ValueError("it falls back to bytes, and not all 256 are in its vocabulary")

    scores = _scores([one if isinstance(one, list) else one.split(" ") for one in model["merges"]])
    lowest = min((score for score in scores.values() if score > _WHITE), default=0.0)
    pieces = []
    for index in range(len(texts)):
        text = texts[index]
        kind = NORMAL
        if text == unknown:
            kind = UNKNOWN
        elif text in added:
            kind = CONTROL if added[text] else USER_DEFINED
        elif fallback and text in _BYTES:
            kind = BYTE
        if kind == NORMAL and text not in scores:
            lowest -= 1.0
        pieces.append({"piece": text, "score": scores.get(text, lowest) if kind == NORMAL else 0.0, "type": kind})
    return new_model(
        pieces=pieces,
        trainer_spec={
            "model_type": BPE,
            "vocab_size": len(pieces),
            "byte_fallback": fallback,
            "unk_piece": unknown,
            "unk_id": vocabulary[unknown],
            "pad_id": -1,
        },
        normalizer_spec={
            "name": "identity",
            "add_dummy_prefix": _has_prefix(fast),
            "remove_extra_whitespaces": False,
            "escape_whitespaces": True,
        },
    )


def _scores(merges: list[list[str]]) -> dict[str, float]:
    """The score of each piece that is merged, one apart from the best, 0, on."""
    made = list(dict.fromkeys(left + right for left, right in merges))
    last = len(made)
    while last and not made[last - 1].strip(_SPACE):
        last -= 1
    scores = {text: -float(rank) for rank, text in enumerate(made[:last])}
    return scores | {text: _WHITE - _STEP * rank for rank, text in enumerate(made[last:], 1)}


def _has_prefix(fast: Mapping[str, Any]) -> bool:
    """Whether a ▁ is put before a text."""
    return any(
        part.get("prepend") == _SPACE
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in _parts(fast.get("normalizer"), fast.get("pre_tokenizer"))
    )


def _read_whole(fast: Mapping[str, Any]) -> set[str]:
    """The alternatives by which a text is cut: what is read whole and never merged, as user-defined pieces are."""
    patterns = (part["pattern"] for part in _parts(fast.get("pre_tokenizer")) if part.get("type") == "Split")
    texts = (pattern.get("Regex", "") for pattern in patterns if isinstance(pattern, dict))
    return {re.sub(r"\\(.)", r"\1", one) for text in texts for one in re.findall(r"(?:\\.|[^|\\])+", text)}


def _parts(*settings: Any) -> Iterator[dict[str, Any]]:
    """Every object in these, at any depth."""
    left = list(settings)
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield one
        left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()


def require_same_ids(content: bytes, encoder: Any, lines: list[str], where: str) -> None:
    """InputError where the `tokenizers` library encodes a line by this tokenizer.json otherwise than `encoder`."""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(content.decode()).encode_batch(lines, add_special_tokens=False)
    except Exception as error:  # the library has no other class for what it cannot read
        raise InputError(f"{where}: it cannot be read ({error}); fetch it again") from error
    for line, one, ids in zip(lines, found, encoder.encode_batch(lines), strict=True):
        if one.ids != ids:
            raise InputError(
                f"{where}: the SentencePiece model made of it gives other ids for {line!r}; give a tokenizer.model"
            )
