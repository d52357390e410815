"""The tokenizer of a GGUF ↔ the tokenizer files of a model folder, both kinds, both directions.

`llama` is SentencePiece's BPE: pieces, scores and types, whose numbers are SentencePiece's own. `gpt2` is byte-level
BPE: tokens and merges, and a name (`pre`) for how a text is cut before, of which llama.cpp knows what it means. PRE is
that table; a name that is not in it is refused, and so is, the other way, a tokenizer.json that cuts otherwise.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, cast

from zhllama.errors import InputError
from zhllama.tokenizer.byte_level import ByteLevelEncoder
from zhllama.tokenizer.effective_model import CONFIG, FAST
from zhllama.tokenizer.encoder import Encoder
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    TOKENIZER_MODEL,
    UNKNOWN,
    new_model,
    parse_model,
)
from zhllama.tokenizer.sentencepiece_model import USER_DEFINED as TEXT

UNUSED = 5
"""A type of tokens: rows that nobody names."""
_AT = "tokenizer.ggml."
_PADDING = re.compile(r"\[PAD(\d+)\]")
"""What llama.cpp's converter calls a row without a token, by its number."""
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Special tokens by the names of a model folder → GGUF's."""
_ENDS = ("eos", "eot", "eom")
"""Tokens that end an answer, as GGUF calls them."""
_WRONG = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)

Object = dict[str, Any]


class Pre(NamedTuple):
    """How a text is cut before merges: the parts of a tokenizer.json, and what llama.cpp does where nothing is said."""

    pre_tokenizer: Object
    ignore_merges: bool = False
    bos: bool = False
    nfc: bool = False


def _split(pattern: str) -> Object:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(regex: bool) -> Object:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def _sequence(*parts: Object) -> Object:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _words(digits: str) -> Object:
    contractions, rest = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return _sequence(_split(rf"{contractions}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{rest}"), _bytes(False))


_DIGITS: Object = {"type": "Digits", "individual_digits": True}
_FALCON = _sequence(
    {"type": "Punctuation", "behavior": "Contiguous"}, _bytes(True), {"type": "Digits", "individual_digits": False},
    _split("[0-9][0-9][0-9]"),
)  # fmt: skip
PRE = {
    "llama-bpe": Pre(_words(r"\p{N}{1,3}"), ignore_merges=True, bos=True),
    "qwen2": Pre(_words(r"\p{N}"), nfc=True),
    "smollm": Pre(_sequence(_DIGITS, _bytes(True))),
    "gpt-2": Pre(_bytes(True)),
    "falcon": Pre(_FALCON),
}
"""llama.cpp's name → how transformers says it."""
_ALSO = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "starcoder": "smollm",
    "refact": "smollm", "command-r": "smollm", "phi-2": "gpt-2", "default": "falcon",
}  # fmt: skip
"""Names for the same."""


def tokenizer_files_of(fields: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """Name → content of the tokenizer files that these fields of a GGUF are of: tokenizer.model or tokenizer.json, and
    tokenizer_config.json. InputError for a kind that is not done, and for fields that do not belong together."""
    kind = fields.get(f"{_AT}model")
    if kind not in ("llama", "gpt2"):
        said = f"its tokenizer is of the kind {kind!s:.40} (tokenizer.ggml.model)" if kind else "no tokenizer is in it"
        raise InputError(f"{where}: {said}; SentencePiece's BPE (llama) and byte-level BPE (gpt2) are read")
    try:
        tokens = fields[f"{_AT}tokens"]
        ids = _special_ids(fields, tokens)
        config = {f"{name}_token": tokens[index] for name, index in ids.items()}
        template = fields.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise ValueError("its chat template is no text")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **config} | (
            {"chat_template": template} if template else {}
        )
        if kind == "llama":
            files = {TOKENIZER_MODEL: sentencepiece_of(fields)}
        else:
            files = {FAST: _text(byte_level_of(fields, where))}
        return files | {CONFIG: _text(config)}
    except _WRONG as error:
        said = f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{where}: its vocabulary is none ({said}); fetch or export it again") from error


def ends_of(fields: Mapping[str, Any]) -> list[int]:
    """The ids that end an answer, EOS first."""
    found = [fields.get(f"{_AT}{name}_token_id") for name in _ENDS]
    return list(dict.fromkeys(index for index in found if type(index) is int))


def _special_ids(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, int]:
    found = {}
    for name, field in _IDS.items():
        index = fields.get(f"{_AT}{field}_token_id")
        if index is None or index == 2**32 - 1:
            continue
        if type(index) is not int or not 0 <= index < len(tokens):
            raise ValueError(f"{field}_token_id is {index!r:.20}, and there are {len(tokens)} tokens")
        found[name] = index
    return found


def _typed(fields: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Tokens and their types, without the rows at the end that only pad."""
    tokens = fields[f"{_AT}tokens"]
    types = fields.get(f"{_AT}token_type") or [NORMAL] * len(tokens)
    found = list(zip(tokens, types, strict=True))
    if not found or not all(isinstance(text, str) and type(kind) is int for text, kind in found):
        raise ValueError("its tokens are no texts with types")
    while found and found[-1] == (f"[PAD{len(found) - 1}]", UNUSED):
        found.pop()
    return found


def sentencepiece_of(fields: Mapping[str, Any]) -> bytes:
    """The bytes of the tokenizer.model that these pieces, scores and types are of. ValueError, LookupError, TypeError
    where they are of none."""
    typed = _typed(fields)
    scores = fields[f"{_AT}scores"][: len(typed)]
    pieces = [{"piece": text, "score": score, "type": kind} for (text, kind), score in zip(typed, scores, strict=True)]
    ids: Object = {"pad_id": -1}
    for name, index in _special_ids(fields, fields[f"{_AT}tokens"]).items():
        # SentencePiece finds them by their texts
        ids |= {f"{name}_id": index, f"{name}_piece": pieces[index]["piece"]}
    model = new_model(
        pieces=pieces,
        trainer_spec={
            "model_type": BPE,
            "byte_fallback": any(kind == BYTE for _, kind in typed),
            "vocab_size": len(pieces),
            **ids,
        },
        normalizer_spec={
            "name": "identity",
            "add_dummy_prefix": bool(fields.get(f"{_AT}add_space_prefix", True)),
            "remove_extra_whitespaces": bool(fields.get(f"{_AT}remove_extra_whitespaces", False)),
        },
    )
    return bytes(model.SerializeToString())


def pre_named(name: str, where: str) -> Pre:
    """InputError for a name that is not known here."""
    if (found := PRE.get(_ALSO.get(name, name))) is None:
        done = ", ".join((*PRE, *_ALSO))
        raise InputError(
            f"{where}: its tokenizer cuts texts as {name!s:.40} (tokenizer.ggml.pre), which is not known here ({done} "
            "are); give the model as a folder of transformers'"
        )
    return found


def byte_level_of(fields: Mapping[str, Any], where: str) -> Object:
    """The tokenizer.json of these fields, as an object. InputError for a `pre` that is not done."""
    said = fields.get(f"{_AT}pre", "default")
    pre = pre_named(said if isinstance(said, str) else repr(said), where)
    typed = _typed(fields)
    texts = [text for text, _ in typed]
    if len(set(texts)) < len(texts):
        raise ValueError("a token is in it twice")
    merges = [one.split(" ") for one in fields[f"{_AT}merges"]]
    if wrong := [one for one in merges if len(one) != 2]:
        raise ValueError(f"{' '.join(wrong[0])!r:.80} is no merge of two tokens")
    known = set(texts)
    if wrong := [one for one in merges if not known.issuperset((*one, "".join(one)))]:
        raise ValueError(f"the merge {' '.join(wrong[0])!r:.80} is of tokens that are not in it")
    ordinary = max((index for index, (_, kind) in enumerate(typed) if kind in (NORMAL, UNUSED, BYTE)), default=-1) + 1
    bos = _special_ids(fields, fields[f"{_AT}tokens"]).get("bos")
    begins = bos is not None and bool(fields.get(f"{_AT}add_bos_token", pre.bos))
    return byte_level_json(
        # what stands above all that can be merged, `tokenizers` wants among the added tokens alone
        {text: index for index, text in enumerate(texts[:ordinary])},
        merges,
        {index: (text, kind != TEXT) for index, (text, kind) in enumerate(typed) if kind in (CONTROL, TEXT, UNKNOWN)},
        pre,
        texts[bos] if begins and bos is not None else None,
    )


def byte_level_json(
    vocabulary: Mapping[str, int],
    merges: list[list[str]],
    added: Mapping[int, tuple[str, bool]],
    pre: Pre,
    begins_with: str | None = None,
) -> Object:
    """A tokenizer.json. added: id → text, and whether it is special; begins_with: what a text begins with."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    after: Object = _bytes(True) | {"trim_offsets": False}
    if begins_with is not None:
        index = next(index for index, (text, _) in added.items() if text == begins_with)
        begin = {"SpecialToken": {"id": begins_with, "type_id": 0}}
        second = [{"SpecialToken": {"id": begins_with, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
        first = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
        template = {
            "type": "TemplateProcessing",
            "single": first,
            "pair": [*first, *second],
            "special_tokens": {begins_with: {"id": begins_with, "ids": [index], "tokens": [begins_with]}},
        }
        after = {"type": "Sequence", "processors": [after, template]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": text, **flags, "special": special}
            for index, (text, special) in sorted(added.items())
        ],
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": pre.pre_tokenizer,
        "post_processor": after,
        "decoder": _bytes(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": dict(vocabulary),
            "merges": merges,
        },
    }


# --- the other direction ----------------------------------------------------------------------------------------------


def tokenizer_fields(encoder: Encoder, where: str) -> Object:
    """GGUF's fields of a tokenizer, in the order in which they are written. InputError for a byte-level one that cuts
    texts as llama.cpp has no name for."""
    named = encoder.named
    ids = {f"{field}_token_id": named[name] for name, field in _IDS.items() if name in named}
    begins = {"add_bos_token": encoder.bos is not None, "add_eos_token": False}
    if isinstance(encoder, ByteLevelEncoder):
        fields = byte_level_fields(json.loads(encoder.content), where, encoder.size)
        return fields | {f"{_AT}{name}": value for name, value in {**ids, **begins, "add_space_prefix": False}.items()}
    proto = parse_model(cast(SentencePieceEncoder, encoder).model)
    spec = proto.normalizer_spec
    said = {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.piece.encode() for piece in proto.pieces],
        "scores": [piece.score for piece in proto.pieces],
        "token_type": [piece.type for piece in proto.pieces],
        **ids,
        **begins,
        "add_space_prefix": spec.add_dummy_prefix,
        "remove_extra_whitespaces": spec.remove_extra_whitespaces,
    }
    return {f"{_AT}{name}": value for name, value in said.items()}


def pre_of(fast: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name for how a tokenizer.json cuts a text. InputError where it has none."""
    model, normalizer = fast["model"], fast.get("normalizer")
    normalizes = normalizer is not None and normalizer.get("type") == "NFC"
    cut = _plain(fast.get("pre_tokenizer"))
    for name, pre in PRE.items():
        same = _cuts()[name] == cut and pre.ignore_merges == bool(model.get("ignore_merges"))
        if same and (normalizer is None or normalizes):
            return name
    raise InputError(
        f"{where}: {FAST} cuts texts in a way that llama.cpp has no name for here ({', '.join(PRE)} are known); a GGUF "
        "of it would give other ids"
    )


@cache
def _cuts() -> dict[str, str]:
    return {name: _plain(pre.pre_tokenizer) for name, pre in PRE.items()}


def _plain(part: Any) -> str:
    """What decides ids of a pre-tokenizer, as a text: offsets do not, nor does a sequence of one."""
    if isinstance(part, dict) and part.get("type") == "Sequence" and len(part["pretokenizers"]) == 1:
        return _plain(part["pretokenizers"][0])
    if isinstance(part, dict):
        said = {name: value for name, value in part.items() if name != "trim_offsets"}
        return json.dumps({name: _plain(value) for name, value in sorted(said.items())})
    return json.dumps([_plain(one) for one in part] if isinstance(part, list) else part)


def byte_level_fields(fast: Mapping[str, Any], where: str, rows: int | None = None) -> Object:
    """GGUF's fields, without the ids, of a tokenizer.json's object: `pre`, tokens, types and merges. rows: of the
    model; those beyond the tokens are named as llama.cpp's converter names them."""
    added = {one["id"]: one for one in fast.get("added_tokens") or ()}
    texts = {index: text for text, index in fast["model"]["vocab"].items()} | {
        index: one["content"] for index, one in added.items()
    }
    size = max(texts) + 1 if rows is None else rows
    if beyond := sorted(index for index in texts if index >= size):
        raise InputError(f"{where}: {FAST} has {texts[beyond[0]]!r} as token {beyond[0]}, and there are {size} rows")
    types = [
        (CONTROL if added[index].get("special") else TEXT) if index in added else NORMAL if index in texts else UNUSED
        for index in range(size)
    ]
    return {
        f"{_AT}model": "gpt2",
        f"{_AT}pre": pre_of(fast, where),
        f"{_AT}tokens": [texts.get(index, f"[PAD{index}]") for index in range(size)],
        f"{_AT}token_type": types,
        f"{_AT}merges": [one if isinstance(one, str) else " ".join(one) for one in fast["model"]["merges"]],
    }


def _text(value: Object) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
