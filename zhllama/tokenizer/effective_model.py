"""The SentencePiece model of a folder: its tokenizer.model, with whatever else the folder names as tokens.

Trainers of ChatML or of a `[PAD]` leave tokenizer.model alone and name their tokens in added_tokens.json,
tokenizer.json or tokenizer_config.json. Each has a row, so each is a piece: special ones of type CONTROL (their text in
a user's words stays text), others USER_DEFINED. Contract, extension, merge and exports then know them without knowing
of these files. What only added_tokens.json names, which does not say, is special. BOS, EOS and padding are those that
tokenizer_config.json (else special_tokens_map.json) names. A special token that is named without an id has the next
row, as transformers gives it; where the model has none left, there is no such token.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from zhllama.errors import InputError
from zhllama.tokenizer.sentencepiece_model import CONTROL, TOKENIZER_MODEL, UNKNOWN, USER_DEFINED, parse_model

log = logging.getLogger("tokenizer")

PAD_PIECE = "[PAD]"
_PADDINGS = (PAD_PIECE, "<pad>", "<PAD>", "<|pad|>")
"""What padding is called where a file names it and does not say what it is for."""
ADDED, FAST, CONFIG, SPECIAL = "added_tokens.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
VOCABULARY = f"the vocabulary of {FAST}"
MODEL_CONFIG = "config.json"
"""Says how many rows there are."""
DESCRIBED = (ADDED, FAST, CONFIG, SPECIAL, MODEL_CONFIG)
"""The files that say something of the vocabulary beside tokenizer.model."""
_NAMED = ("bos", "eos", "pad")
_ORDER = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""In which transformers gives ids to special tokens that have none; others come after these."""


class _Named(NamedTuple):
    file: str
    text: str
    id: int
    special: bool | None
    """None where the file does not say."""


def effective_model(model: bytes, described: Mapping[str, Mapping[str, Any]], where: str) -> bytes:
    """`model`, the bytes of a tokenizer.model, with the tokens that the files `described` (name → content) name beyond
    its pieces; the same bytes where they name none. InputError, naming the token, for one that cannot be a piece."""
    proto = parse_model(model, f"{where}/{TOKENIZER_MODEL}")
    appended = append_named(proto, described, where)
    return bytes(proto.SerializeToString()) if name_specials(proto, described) or appended else model


def append_named(proto: Any, described: Mapping[str, Mapping[str, Any]], where: str) -> int:
    """Appends to a model's pieces the tokens that are not there; how many they were."""
    size = len(proto.pieces)
    rows = described.get(MODEL_CONFIG, {}).get("vocab_size")
    rows = rows if type(rows) is int else None
    texts = {index: piece.piece for index, piece in enumerate(proto.pieces)}
    special = put_in(texts, described, where)
    without_row = put_in_nameless(texts, described, where, rows)
    special |= dict.fromkeys(_specials(described, where), True)
    if rows is not None and size <= rows == len(texts) - 1 and is_padding(last := texts.get(rows, ""), described):
        # Llama-2's mirrors name a <pad> that was never given a row: nothing is ever computed of it
        without_row.append(last)
        del texts[rows]
    if without_row:
        log.warning("%s: %s is named, and has no row: it is left out", where, ", ".join(without_row))
    for index, text in sorted((index, text) for index, text in texts.items() if index >= size):
        if index != len(proto.pieces):
            raise InputError(
                f"{where}: it names {text} as token {index}, and nothing as token {len(proto.pieces)}; name the tokens "
                f"between in {ADDED}, or give a folder with all its tokenizer files"
            )
        if text not in special:
            raise InputError(
                f"{where}: {VOCABULARY} has {text!r} as piece {index}, and {TOKENIZER_MODEL} has {size} pieces: they "
                "are of two tokenizers; take the one that is not the model's away"
            )
        if " " in text and not (special[text] and text.strip()):
            raise InputError(
                f"{where}: it names {text!r} as token {index}, and SentencePiece reads no spaces in a token; give a "
                "model whose own pieces spell white space"
            )
        proto.pieces.add(piece=text, score=0.0, type=CONTROL if special[text] else USER_DEFINED)
    if rows is not None and max(rows, size) < len(proto.pieces):
        beyond = ", ".join(piece.piece for piece in proto.pieces[max(rows, size) :][:5])
        raise InputError(
            f"{where}: it names tokens that the model has no rows for ({beyond}; {MODEL_CONFIG} says {rows} rows); "
            f"take them out of {ADDED} and the other tokenizer files, or give the model that was trained with them"
        )
    new = (text for index, text in texts.items() if index >= size and not is_padding(text, described))
    if any(map(special.get, new)) and _marks_first_alone(described):
        said = (
            "its tokenizer puts no space mark before a text that follows a special token; here one is put, as in GGUF"
        )
        log.warning("%s: %s", where, said)
    return len(proto.pieces) - size


def _marks_first_alone(described: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the folder's own tokenizer is not one of the `legacy` kind, as transformers calls it."""
    if FAST not in described:
        return described.get(CONFIG, {}).get("legacy") is False
    before = described[FAST].get("pre_tokenizer")
    return isinstance(before, dict) and before.get("prepend_scheme") == "first"


def put_in(texts: dict[int, str], described: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, bool]:
    """Puts into `texts` what the files name with an id. Of each that is named as a token, whether it is special."""
    ids = {text: index for index, text in texts.items()}
    special: dict[str, bool] = {}
    unsaid: set[str] = set()
    for one in _named(described, where):
        if texts.setdefault(one.id, one.text) != one.text or ids.setdefault(one.text, one.id) != one.id:
            other = texts[one.id] if texts[one.id] != one.text else f"{one.text} at {ids[one.text]}"
            raise InputError(
                f"{where}: {one.file} names {one.text} as token {one.id}, and {other} is in the vocabulary there "
                "already; give a folder whose tokenizer files belong together"
            )
        if one.special is not None:
            special.setdefault(one.text, one.special)
        elif one.file != VOCABULARY:
            unsaid.add(one.text)
    return dict.fromkeys(unsaid, True) | special


def put_in_nameless(
    texts: dict[int, str], described: Mapping[str, Mapping[str, Any]], where: str, rows: int | None
) -> list[str]:
    """Puts into `texts` the special tokens that no file gives an id, as far as the model has rows; those it has none
    for. InputError where BOS or EOS is among these: the model would begin or end with another."""
    there, free, without_row = set(texts.values()), max(texts) + 1, []
    for text in dict.fromkeys(_specials(described, where)):
        if text in there:
            continue
        if rows is not None and free < rows:
            texts[free] = text
            free += 1
            continue
        without_row.append(text)
        named = special_texts(described)
        for name in ("bos_token", "eos_token"):
            if named.get(name) == text:
                raise InputError(
                    f"{where}: {name} is {text}, which no file gives an id, and the model no row; correct it in "
                    f"{CONFIG} and {SPECIAL}, or name its id in {ADDED}"
                )
    return without_row


def name_specials(proto: Any, described: Mapping[str, Mapping[str, Any]]) -> bool:
    """Sets BOS, EOS and padding of a model to the pieces that the files name; whether that changes anything."""
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    trainer, changed = proto.trainer_spec, False
    named = special_texts(described)
    for name in _NAMED:
        text = named.get(f"{name}_token")
        if text not in ids or (name != "pad" and proto.pieces[ids[text]].type == UNKNOWN):
            continue
        if name == "pad" and PAD_PIECE in ids:  # is known by its text: the model keeps its bytes
            continue
        if (text, ids[text]) != (getattr(trainer, f"{name}_piece"), getattr(trainer, f"{name}_id")):
            setattr(trainer, f"{name}_piece", text)
            setattr(trainer, f"{name}_id", ids[text])
            changed = True
        if name != "pad" and proto.pieces[ids[text]].type != CONTROL:
            # SentencePiece takes no other type for these
            proto.pieces[ids[text]].type = CONTROL
            changed = True
    return changed


def is_padding(text: str, described: Mapping[str, Mapping[str, Any]]) -> bool:
    return text in (*_PADDINGS, special_texts(described).get("pad_token"))


def special_texts(described: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """`bos_token` … → its text, as tokenizer_config.json says, else special_tokens_map.json."""
    found: dict[str, str] = {}
    for file in (SPECIAL, CONFIG):
        for name, value in described.get(file, {}).items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str) and text:
                found[name] = text
    return found


def _specials(described: Mapping[str, Mapping[str, Any]], where: str) -> Iterator[str]:
    """The special tokens that have a name or stand in a list, in the order in which transformers gives them ids."""
    named = special_texts(described)
    yield from (named[name] for name in _ORDER if name in named)
    yield from (text for name, text in named.items() if name not in _ORDER)
    for file in (CONFIG, SPECIAL):
        for name in ("additional_special_tokens", "extra_special_tokens"):
            values = described.get(file, {}).get(name) or ()
            if not isinstance(values, dict | list | tuple):
                raise InputError(f"{where}: {name} of {file} is {values!r:.40}, no list of tokens; fetch it again")
            for value in values.values() if isinstance(values, dict) else values:
                text = value.get("content") if isinstance(value, dict) else value
                if isinstance(text, str) and text:
                    yield text


def _named(described: Mapping[str, Mapping[str, Any]], where: str) -> Iterator[_Named]:
    """Every token that a file names with its id."""
    file = FAST
    try:
        fast = described.get(FAST, {})
        for one in fast.get("added_tokens") or ():
            yield _checked(_Named(FAST, one["content"], one["id"], bool(one.get("special"))))
        vocabulary = (fast.get("model") or {}).get("vocab")
        if isinstance(vocabulary, dict):
            yield from (_checked(_Named(VOCABULARY, text, index, None)) for text, index in vocabulary.items())
        file = CONFIG
        for index, one in (described.get(CONFIG, {}).get("added_tokens_decoder") or {}).items():
            yield _checked(_Named(CONFIG, one["content"], int(index), bool(one.get("special"))))
        file = ADDED
        for text, index in described.get(ADDED, {}).items():
            yield _checked(_Named(ADDED, text, index, None))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: {file} does not say its tokens as it should ({error}); fetch it again") from error


def _checked(one: _Named) -> _Named:
    if not isinstance(one.text, str) or not one.text or type(one.id) is not int or one.id < 0:
        raise ValueError(f"{one.text!r} as token {one.id!r}")
    return one
