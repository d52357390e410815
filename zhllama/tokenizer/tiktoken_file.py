"""Llama 3's own `tokenizer.model`, lines of "token in Base64, rank" as tiktoken reads them ↔ tokenizer.json.

tiktoken merges the neighbours whose concatenation has the best rank; a tokenizer.json lists merges. As transformers
converts it, the list is every split of every token whose halves are tokens, by rank. Special tokens are in no line: 256
ids after the last rank, whose names the model's release decides. A vocabulary that was extended keeps them where they
are, and its new ranks come after: the file then has a gap of 256 ranks. tiktoken itself takes that (ranks and special
tokens are given to it by number); Meta's own tokenizer.py, which counts the lines to find the special ids, does not.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any

from zhllama.errors import InputError
from zhllama.tokenizer.byte_alphabet import BYTE_OF, spelt
from zhllama.tokenizer.byte_level import ByteLevelEncoder
from zhllama.tokenizer.effective_model import CONFIG, FAST
from zhllama.tokenizer.gguf_tokenizer import PRE, byte_level_json, pre_of
from zhllama.tokenizer.sentencepiece_model import TOKENIZER_MODEL

SPECIAL = 256
"""How many special ids there are."""
BEGIN, END, TURN, MESSAGE, PAD = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|finetune_right_pad_id|>"
)  # fmt: skip
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,8})")
_LARGEST = 64 * 2**20
"""Bytes; Llama 3's has 2 MB."""
_LONGEST = 512
"""Bytes of a token; Llama 3's longest has 128."""
_PRE = "llama-bpe"


def _reserved(first: int, count: int) -> list[str]:
    return [f"<|reserved_special_token_{number}|>" for number in range(first, first + count)]


def special_tokens(scaled: bool) -> list[str]:
    """The names of the special ids, in order: of Llama 3, or (`scaled`, by params.json) of 3.1 and later."""
    header = ["<|start_header_id|>", "<|end_header_id|>"]
    if not scaled:
        return [BEGIN, END, *_reserved(0, 4), *header, *_reserved(4, 1), TURN, *_reserved(5, 246)]
    return [
        BEGIN,
        END,
        *_reserved(0, 2),
        PAD,
        *_reserved(2, 1),
        *header,
        MESSAGE,
        TURN,
        "<|python_tag|>",
        *_reserved(3, 245),
    ]


def is_tiktoken(content: bytes) -> bool:
    """Whether a tokenizer.model begins as such a file does."""
    return _LINE.fullmatch(content[: _LONGEST * 2].partition(b"\n")[0].rstrip(b"\r")) is not None


def tokenizer_files_of(
    content: bytes, scaled: bool, where: str, config: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """Name → content of the tokenizer files of a model folder, of such a tokenizer.model. config: a
    tokenizer_config.json beside it, whose added_tokens_decoder, where it has one, names the special ids. InputError for
    what is no such file."""
    config = dict(config or {})
    try:
        ranks = ranks_of(content)
        names = special_tokens(scaled)
        first = special_base(ranks)
        for index, token in (config.get("added_tokens_decoder") or {}).items():
            names[int(index) - first] = str(token["content"])
        if len(set(names)) < SPECIAL:
            raise ValueError("two special ids have one name")
        fast = fast_of(ranks, dict(enumerate(names, first)))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: no tokenizer of Llama 3's kind ({error}); fetch it again") from error
    # a base's end; what ends a turn in a chat is said in generation_config.json
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
    said |= {"pad_token": PAD} if PAD in names else {}
    known = {"chat_template", "pad_token", *said}
    return {FAST: _text(fast), CONFIG: _text(said | {name: config[name] for name in config if name in known})}


def ends_of(files: Mapping[str, bytes]) -> list[int]:
    """The ids that end an answer, EOS first, where nothing else says them."""
    ids = {one["content"]: one["id"] for one in json.loads(files[FAST])["added_tokens"]}
    return [ids[name] for name in (END, MESSAGE, TURN) if name in ids]


def ranks_of(content: bytes) -> dict[bytes, int]:
    """Token → rank, in the order of the ranks. ValueError for a line that is none, and for a token or rank twice."""
    if len(content) > _LARGEST:
        raise ValueError(f"it has {len(content):,} bytes")
    found: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        matched = _LINE.fullmatch(line)
        try:
            token = base64.b64decode(matched[1], validate=True) if matched else b""
        except binascii.Error:
            token = b""
        if not matched or not 0 < len(token) <= _LONGEST or token in found:
            raise ValueError(f"line {number} is no new token and its rank")
        found[token] = int(matched[2])
    ordered = dict(sorted(found.items(), key=lambda item: item[1]))
    if len(set(ordered.values())) < len(ordered):
        raise ValueError("two tokens have one rank")
    if missing := [value for value in range(256) if bytes([value]) not in ordered]:
        raise ValueError(f"the byte {missing[0]} is no token")
    base = special_base(ordered)
    beyond = list(ordered.values())[base:]
    if beyond and beyond != list(range(base + SPECIAL, base + SPECIAL + len(beyond))):
        raise ValueError(f"the rank {base} is missing, and what follows does not begin {SPECIAL} after it")
    return ordered


def special_base(ranks: Mapping[bytes, int]) -> int:
    """The first special id: the first number that is no rank."""
    return next((number for number, rank in enumerate(ranks.values()) if number != rank), len(ranks))


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every split of every token whose halves are tokens, by the token's rank, then by the halves'."""
    found = []
    for token in ranks:
        halves = ((token[:at], token[at:]) for at in range(1, len(token)))
        known = [(left, right) for left, right in halves if left in ranks and right in ranks]
        found += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return found


def fast_of(ranks: Mapping[bytes, int], special: Mapping[int, str]) -> dict[str, Any]:
    """The tokenizer.json. special: id → name."""
    texts = {token: spelt(token) for token in ranks}
    return byte_level_json(
        {texts[token]: rank for token, rank in ranks.items()},
        [[texts[left], texts[right]] for left, right in merges_of(ranks)],
        {index: (name, True) for index, name in special.items()},
        PRE[_PRE],
        special[min(special)],
    )


def tiktoken_file_of(fast: Mapping[str, Any], where: str) -> bytes:
    """The tokenizer.model of a tokenizer.json of Llama 3's kind, extended or not. InputError for what it cannot say:
    another way to cut texts, merges that do not follow from ranks, other special ids than 256 in a row."""
    pre = pre_of(fast, where)
    if pre != _PRE or fast.get("normalizer"):
        raise InputError(f"{where}: {FAST} cuts texts as {pre}, and Meta's {TOKENIZER_MODEL} is {_PRE}'s")
    model = fast["model"]
    special = {one["id"] for one in fast.get("added_tokens") or ()}
    ordinary = {text: index for text, index in model["vocab"].items() if index not in special}
    try:
        ranks = {bytes(BYTE_OF[letter] for letter in text): rank for text, rank in ordinary.items()}
        content = b"".join(
            base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        )
        ranks = ranks_of(content)
    except (KeyError, ValueError) as error:
        raise InputError(f"{where}: {FAST} cannot be said in Meta's {TOKENIZER_MODEL} ({error})") from error
    first = special_base(ranks)
    if special != set(range(first, first + SPECIAL)):
        said = f"{len(special)} added tokens, and Meta's {TOKENIZER_MODEL} has {SPECIAL} from {first} on"
        raise InputError(f"{where}: {FAST} has {said}; export the model to GGUF, or as it is")
    listed = [tuple(one.split(" ") if isinstance(one, str) else one) for one in model["merges"]]
    wanted = [(spelt(left), spelt(right)) for left, right in merges_of(ranks)]
    made = [ordinary.get("".join(one), -1) for one in listed]
    # the order of one token's splits says nothing: an extension lists the new ones of an old token last
    if made != sorted(made) or sorted(listed) != sorted(wanted):
        odd = min(set(listed) ^ set(wanted), default=("their", "order"))
        raise InputError(
            f"{where}: the merges of {FAST} do not follow from ranks, as Meta's {TOKENIZER_MODEL} has them "
            f"({' '.join(odd)!r:.60}); export the model to GGUF, or as it is"
        )
    return content


def beside(encoder: ByteLevelEncoder) -> dict[str, Any]:
    """What such a file does not say, as fields of a tokenizer_config.json: names of special ids, and which is what."""
    decoder = {str(index): {"content": text, "special": True} for text, index in encoder.special.items()}
    names = {f"{name}_token": encoder.pieces[index] for name, index in encoder.named.items()}
    return {**names, "added_tokens_decoder": decoder}


def _text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
