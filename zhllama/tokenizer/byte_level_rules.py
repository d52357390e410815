"""What a byte-level tokenizer.json says beside its pieces, to the last setting: done, harmless, or refused by name.

Done: no normaliser or NFC; text cut by regular expressions (`Split`, `ByteLevel`'s own) and digits; BPE with merges, a
whole pretoken that is a piece taken as it is (`ignore_merges`) or not; BOS by a post-processor, or none. Truncation and
padding are whoever encodes' own business, and taken out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zhllama.errors import InputError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""ByteLevel's own expression."""
_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = _CL100K % r"\p{N}{1,3}", _CL100K % r"\p{N}"
DIGITS = "digits"

_TOP = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"}
_MODEL = {"type", "vocab", "merges", "unk_token", "fuse_unk", "ignore_merges"}
_OFF = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
"""Settings of the BPE that have to be off."""
_FLAGS = ("single_word", "lstrip", "rstrip")
"""Of an added token, likewise: no other engine has them."""


@dataclass(frozen=True)
class Rules:
    """How a text is cut before it is merged."""

    nfc: bool
    steps: tuple[tuple[str, str], ...]
    """("split", an expression) or ("digits", "each" or "runs"), in turn."""
    whole: bool
    """Whether a pretoken that is a piece is taken as it is (`ignore_merges`)."""
    begin: str
    """The special token that a text begins with; "" for none."""

    @property
    def expressions(self) -> list[str]:
        return [said for kind, said in self.steps if kind == "split"]

    def __str__(self) -> str:
        """For digests: `begin` is told by the special ids."""
        return repr((self.nfc, self.steps, self.whole))


def read_rules(fast: Mapping[str, Any], where: str) -> Rules:
    """Of a tokenizer.json's object. InputError that names what is neither done nor harmless."""
    try:
        model = fast["model"]
        _refuse_others(fast, _TOP | {"model"}, "")
        _refuse_others(model, _MODEL | set(_OFF), "model.")
        if (kind := model.get("type", "BPE")) != "BPE":
            raise ValueError(f"model.type {kind}")
        for name in _OFF:
            if model.get(name):
                raise ValueError(f"model.{name} {model[name]!r}")
        for one in fast.get("added_tokens") or ():
            for name in _FLAGS:
                if one.get(name):
                    raise ValueError(f"{name} of the added token {one['content']!r}")
        normalizers = [one["type"] for one in _parts(fast.get("normalizer"), "normalizers")]
        if wrong := [kind for kind in normalizers if kind != "NFC"]:
            raise ValueError(f"the normalizer {wrong[0]}")
        for one in _parts(fast.get("decoder"), "decoders"):
            if one["type"] != "ByteLevel":
                raise ValueError(f"the decoder {one['type']}")
        steps = tuple(_steps(fast.get("pre_tokenizer")))
        return Rules(bool(normalizers), steps, bool(model.get("ignore_merges")), _begin(fast.get("post_processor")))
    except ValueError as error:
        raise InputError(
            f"{where}: it has {error}, which is not supported; take a model with another tokenizer"
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: it does not say what a tokenizer.json has to ({error}); fetch it again") from error


def _refuse_others(given: Mapping[str, Any], known: set[str], before: str) -> None:
    if others := sorted(given.keys() - known):
        raise ValueError(f"a setting {before}{others[0]}")


def _parts(given: Any, several: str) -> Iterator[dict[str, Any]]:
    """The steps of a setting that may be none, one or a sequence."""
    if given is None:
        return
    if given["type"] == "Sequence":
        for one in given[several]:
            yield from _parts(one, several)
    else:
        yield given


def _steps(given: Any) -> Iterator[tuple[str, str]]:
    parts = list(_parts(given, "pretokenizers"))
    for number, one in enumerate(parts, 1):
        kind = one["type"]
        if (kind == "ByteLevel") != (number == len(parts)):
            raise ValueError(f"the pre_tokenizer {kind} " + ("at the end" if number == len(parts) else "before others"))
        if kind == "ByteLevel":
            if one.get("add_prefix_space"):
                raise ValueError("add_prefix_space of ByteLevel")
            if one.get("use_regex", True):
                yield "split", GPT2
        elif kind == "Digits":
            yield DIGITS, "each" if one.get("individual_digits") else "runs"
        elif kind == "Split":
            if "Regex" not in one["pattern"] or one.get("behavior") != "Isolated" or one.get("invert"):
                raise ValueError(f"a pre_tokenizer Split by {one['pattern']!r:.60}, {one.get('behavior')}")
            yield "split", one["pattern"]["Regex"]
        else:
            raise ValueError(f"the pre_tokenizer {kind}")
    if not parts:
        raise ValueError("no pre_tokenizer")


def _begin(given: Any) -> str:
    begin = ""
    for one in _parts(given, "processors"):
        if one["type"] == "ByteLevel":  # offsets alone
            continue
        if one["type"] != "TemplateProcessing":
            raise ValueError(f"the post_processor {one['type']}")
        names = ["" if "Sequence" in part else part["SpecialToken"]["id"] for part in one["single"]]
        if names[-1:] != [""] or len(names) > 2 or begin:
            raise ValueError(f"a post_processor that makes {names} of a text")
        begin = names[0]
    return begin
