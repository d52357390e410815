"""A byte-level BPE tokenizer, as GPT-2's, LLaMA 3's, Qwen's: from the bytes of a tokenizer.json.

The `tokenizers` library encodes, so its ids are transformers' and vLLM's; many texts at once by byte_segments.py, to
the same ids. Two kinds of rule: an explicit list of merges (Qwen), or every split of a piece whose halves are pieces,
by its rank (tiktoken's; LLaMA 3). A special token in a user's text stays text; one that is added and not special is
read as itself, as every engine does.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Self

from zhllama.errors import InputError
from zhllama.tokenizer.byte_alphabet import BYTE_OF, LETTER_OF
from zhllama.tokenizer.byte_level_rules import read_rules
from zhllama.tokenizer.effective_model import (
    CONFIG,
    FAST,
    MODEL_CONFIG,
    PAD_PIECE,
    is_padding,
    put_in,
    put_in_nameless,
    special_texts,
)
from zhllama.tokenizer.encoder import Encoder, digests_of
from zhllama.tokenizer.prompt import BY_TEMPLATE

if TYPE_CHECKING:
    import numpy as np

    from zhllama.tokenizer.byte_segments import ByteSegments

log = logging.getLogger("tokenizer")

VOCAB, MERGES = "vocab.json", "merges.txt"
_NAMES = ("bos", "eos", "pad", "unk")


class ByteLevelEncoder(Encoder):
    """`content`: of the tokenizer.json; `names`: bos, eos, pad, unk → the text of that piece."""

    unknown = -1

    def __init__(self, content: bytes, names: Mapping[str, str], where: str = FAST, listed: bool = False) -> None:
        from tokenizers import Tokenizer

        self.where, self.listed = where, listed
        """listed: whether vocab.json and merges.txt are written as well."""
        self._fast = _parsed(content, where)
        self.rules = read_rules(self._fast, where)
        # ids of added tokens are counted anew as a file is read, after those of the vocabulary
        if self._fast.get("truncation") or self._fast.get("padding") or _moves(self._fast):
            self._fast = _in_vocabulary(self._fast) | {"truncation": None, "padding": None}
            content = _as_json(self._fast)
        self.content = content
        try:
            self._tokenizer = Tokenizer.from_str(content.decode())
        except Exception as error:  # the library has no other class for what it cannot read
            raise InputError(f"{where}: it cannot be read ({error}); fetch it again") from error
        self._tokenizer.encode_special_tokens = True
        self.added: dict[str, bool] = {one["content"]: bool(one["special"]) for one in self._fast["added_tokens"]}
        """Tokens that are no product of merges; whether they are special."""
        ids = self._ids
        self.size = len(ids)
        self._names = {name: text for name, text in names.items() if text in ids}
        if self.rules.begin:
            self._names["bos"] = self.rules.begin
        self.bos = ids[self.rules.begin] if self.rules.begin else None
        if "eos" not in self._names:
            raise InputError(f"{where}: nothing says which token ends a text; name eos_token in {CONFIG} beside it")
        self.eos = ids[self._names["eos"]]
        if (unknown := self._fast["model"].get("unk_token")) in ids:
            self.unknown = ids[unknown]
        for text, index in self.special.items():
            if self.encode(text) == [index]:
                raise InputError(f"{where}: {text!r} in a text would be the special token; name that otherwise")

    @classmethod
    def described(
        cls,
        content: bytes,
        described: Mapping[str, Mapping[str, Any]],
        where: str,
        listed: bool = False,
        before: "ByteLevelEncoder | None" = None,
    ) -> Self:
        """Of a folder's tokenizer.json, and of what its other files name beyond it; with `before`, whose content it
        then is, what these do not name is as there. InputError for files that contradict one another."""
        names = {} if before is None else dict(before._names)
        names |= {name.removesuffix("_token"): text for name, text in special_texts(described).items()}
        fast = _parsed(content, f"{where}/{FAST}")
        changed = _with_named(fast, described, where)
        if "eos" not in names:
            ends = described.get(MODEL_CONFIG, {}).get("eos_token_id")
            first = ends[0] if isinstance(ends, list) and ends else ends
            for one in fast["added_tokens"]:
                if one["id"] == first:
                    names["eos"] = one["content"]
        names = {name: text for name, text in names.items() if name in _NAMES}
        changed = _with_specials(changed or fast, names.values()) or changed
        return cls(_as_json(changed) if changed else content, names, f"{where}/{FAST}", listed)

    # --- what it is made of

    @cached_property
    def _ids(self) -> dict[str, int]:
        ids: dict[str, int] = self._fast["model"]["vocab"]
        ids = ids | {one["content"]: one["id"] for one in self._fast["added_tokens"]}
        there = set(ids.values())
        if missing := [index for index in range(len(ids)) if index not in there]:
            raise InputError(f"{self.where}: nothing is token {missing[0]}, and others come after it; fetch it again")
        wrong = next((text for text in self.added if self._tokenizer.token_to_id(text) != ids[text]), None)
        if wrong is not None:
            raise InputError(f"{self.where}: {wrong!r} is not read as token {ids[wrong]}, as it says; fetch it again")
        return ids

    @cached_property
    def pieces(self) -> list[str]:
        return sorted(self._ids, key=self._ids.__getitem__)

    @cached_property
    def piece_bytes(self) -> list[bytes]:
        """The text of each piece."""
        made = (piece.encode() if piece in self.added else self._bytes_of(piece) for piece in self.pieces)
        return list(made)

    def _bytes_of(self, piece: str) -> bytes:
        try:
            return bytes(map(BYTE_OF.__getitem__, piece))
        except KeyError as error:
            raise InputError(f"{self.where}: its piece {piece!r} is not spelt in bytes; fetch it again") from error

    @cached_property
    def texts(self) -> list[str]:
        fragments = self.fragments
        ordinary = (at for at, piece in enumerate(self.pieces) if piece not in self.added and at not in fragments)
        return [self.piece_bytes[at].decode() for at in ordinary]

    @cached_property
    def fragments(self) -> frozenset[int]:
        found = set()
        for at, content in enumerate(self.piece_bytes):
            try:
                content.decode()
            except UnicodeDecodeError:
                found.add(at)
        return frozenset(found)

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """As the file has them, in their order."""
        given = self._fast["model"]["merges"]
        return [tuple(one.split(" ") if isinstance(one, str) else one) for one in given]

    @cached_property
    def by_rank(self) -> bool:
        """Whether the merges are all splits of each piece whose halves are pieces, in the order of the pieces: then a
        file of ranks alone (tiktoken's) gives the same ids."""
        ranks = [self._ids.get(left + right, -1) for left, right in self.merges]
        if ranks != sorted(ranks):
            return False
        ordinary = {piece: index for piece, index in self._ids.items() if piece not in self.added}
        splits = sum(1 for piece in ordinary for _ in splits_of(piece, ordinary))
        return splits == len(set(self.merges)) == len(self.merges)

    @cached_property
    def named(self) -> Mapping[str, int]:
        ids = {name: self._ids[text] for name, text in self._names.items()}
        return ids if self.pad is None else ids | {"pad": self.pad}

    @cached_property
    def pad(self) -> int | None:
        """The id of `[PAD]`, or of what the files name."""
        if self.added.get(PAD_PIECE):
            return self._ids[PAD_PIECE]
        index = self._ids.get(self._names.get("pad", ""))
        return None if index in {self._ids[text] for name, text in self._names.items() if name != "pad"} else index

    @cached_property
    def special(self) -> Mapping[str, int]:
        return {text: self._ids[text] for text, special in self.added.items() if special}

    # --- texts and ids

    @cached_property
    def segments(self) -> "ByteSegments":
        """The quicker way to the same ids."""
        from zhllama.tokenizer.byte_merges import ByteMerges
        from zhllama.tokenizer.byte_segments import ByteSegments

        texts = [text for text, special in self.added.items() if not special]
        ordinary = [
            content for piece, content in zip(self.pieces, self.piece_bytes, strict=True) if piece not in self.added
        ]
        ids = self._ids
        byte_ids = {byte: ids[letter] for byte, letter in LETTER_OF.items() if letter in ids}
        merges = ByteMerges(byte_ids, [(ids[left], ids[right], ids[left + right]) for left, right in self.merges])
        return ByteSegments(self._tokenizer, self.rules, ordinary, texts, merges)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids, lengths = self.encode_flat(texts)
        every, ends = ids.tolist(), lengths.cumsum().tolist()
        return [every[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]

    def encode_flat(
        self, texts: Sequence[str], begin: bool = False, end: bool = False
    ) -> tuple["np.ndarray", "np.ndarray"]:
        import numpy as np

        ids, lengths = self.segments.encode(texts)
        ends = lengths.cumsum()
        if end:
            ids, lengths = np.insert(ids, ends, self.eos), lengths + 1
            ends = lengths.cumsum()
        if begin and self.bos is not None:
            ids, lengths = np.insert(ids, ends - lengths, self.bos), lengths + 1
        return ids.astype(np.int32, copy=False), lengths

    def segmented(self, piece: str) -> list[int]:
        """The ids that merges make of a pretoken, spelt as a piece."""
        return [token.id for token in self._tokenizer.model.tokenize(piece)]

    def pretokens(self, text: str) -> list[str]:
        """What a text is cut into before anything is merged, spelt as pieces."""
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        return [piece for piece, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    def unknown_bytes(self, texts: Sequence[str]) -> list[int]:
        """Those that have no piece: some bases leave control characters out."""
        missing = bytes(byte for byte, letter in LETTER_OF.items() if letter not in self._ids)
        return [len(content) - len(content.translate(None, missing)) for content in map(str.encode, texts)]

    def decode(self, ids: Iterable[int]) -> str:
        special = set(self.special.values())
        return b"".join(self.piece_bytes[index] for index in ids if index not in special).decode(errors="replace")

    def written(self, ids: Sequence[int]) -> str:
        return b"".join(self.piece_bytes[index] for index in ids).decode(errors="replace")

    # --- what is written of it

    def files(self, max_length: int = 2048, template: Any = None) -> dict[str, bytes]:
        # our own templates begin with the BOS that they are told of
        untold = {"bos"} if isinstance(template, str) and template in BY_TEMPLATE and self.bos is None else ()
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": self.pieces[index] for name, index in self.named.items() if name not in untold},
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            **({"chat_template": template} if template else {}),
        }
        made = {FAST: self.content, CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
        if self.listed:
            lines = (" ".join(merge) for merge in self.merges)
            made[VOCAB] = _as_json(self._fast["model"]["vocab"])
            made[MERGES] = "\n".join(["#version: 0.2", *lines, ""]).encode()
        return made

    def extended(self, merges: Sequence[tuple[str, str]], special: Sequence[str] = ()) -> "ByteLevelEncoder":
        """With these merges after all others, the piece of each with the next id, and then these special tokens."""
        fast = _in_vocabulary(self._fast)
        model = fast["model"]
        vocab = model["vocab"]
        for left, right in merges:
            if left + right in vocab:
                raise ValueError(f"{left + right!r} is there already")
            vocab[left + right] = len(vocab)
        if self.by_rank:
            # an old piece can have new halves too; its old ones keep their order
            ordinary = {piece: index for piece, index in vocab.items() if piece not in self.added}
            splits: dict[str, list[tuple[str, str]]] = {piece: [] for piece in ordinary}
            for left, right in self.merges:
                splits[left + right].append((left, right))
            for piece, old in splits.items():
                old += [split for split in splits_of(piece, ordinary) if split not in old]
            every: Iterable[tuple[str, str]] = chain.from_iterable(splits.values())
        else:
            every = [*self.merges, *merges]
        for text in special:
            index = vocab.setdefault(text, len(vocab))
            fast["added_tokens"].append(_added(index, text))
        model["merges"] = [list(merge) for merge in every]
        return type(self)(_as_json(fast), self._names, self.where, self.listed)

    def without_last(self) -> Self:
        last = self.pieces[-1]
        fast = self._fast | {"added_tokens": [one for one in self._fast["added_tokens"] if one["content"] != last]}
        fast["model"] = fast["model"] | {
            "vocab": {text: at for text, at in fast["model"]["vocab"].items() if text != last}
        }
        return type(self)(_as_json(fast), self._names, self.where, self.listed)

    def digests(self, sizes: Iterable[int]) -> dict[int, str]:
        """Of the pieces, of the merges among them, and of the rules."""
        found = {}
        # of an old piece with a new half, the newest counts
        needs = [max(self._ids[left], self._ids[right], self._ids[left + right]) for left, right in self.merges]
        for size, digest in digests_of(self.pieces, sizes).items():
            own = hashlib.sha256(f"{digest} {self.rules}".encode())
            own.update("".join(f"\n{a} {b}" for (a, b), need in zip(self.merges, needs) if need < size).encode())
            found[size] = own.hexdigest()
        return found


def splits_of(piece: str, ordinary: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The halves of a piece that are pieces, in the order in which transformers writes them."""
    found = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
    yield from sorted(
        (pair for pair in found if pair[0] in ordinary and pair[1] in ordinary),
        key=lambda pair: (ordinary[pair[0]], ordinary[pair[1]]),
    )


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    try:
        fast = json.loads(content)
        fast["added_tokens"] = fast.get("added_tokens") or []
        for one in fast["added_tokens"]:
            one["special"] = bool(one.get("special"))
            if type(one["id"]) is not int or not isinstance(one["content"], str):
                raise ValueError(f"an added token {one!r:.60}")
        vocab = fast["model"]["vocab"]
        if not all(type(index) is int for index in vocab.values()) or not isinstance(fast["model"]["merges"], list):
            raise ValueError("its ids are no numbers, or its merges no list")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: it does not say its tokens as it should ({error}); fetch it again") from error
    return dict(fast)


def _as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _added(index: int, text: str, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **flags, "special": special}


def _moves(fast: Mapping[str, Any]) -> bool:
    """Whether an added token would not get the id that the file says."""
    vocab, free = fast["model"]["vocab"], len(fast["model"]["vocab"])
    for one in fast["added_tokens"]:
        if one["content"] not in vocab:
            if one["id"] != free:
                return True
            free += 1
    return False


def _in_vocabulary(fast: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with the added tokens in the vocabulary, where their ids are what it says."""
    vocab = fast["model"]["vocab"] | {one["content"]: one["id"] for one in fast["added_tokens"]}
    ordered = dict(sorted(vocab.items(), key=lambda item: item[1]))
    return {**fast, "model": {**fast["model"], "vocab": ordered}, "added_tokens": list(fast["added_tokens"])}


def _with_named(fast: dict[str, Any], described: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any] | None:
    """With the tokens that a folder's other files name beyond its tokenizer.json; None where they name none."""
    ids = fast["model"]["vocab"] | {one["content"]: one["id"] for one in fast["added_tokens"]}
    texts = {index: text for text, index in ids.items()}
    rows = described.get(MODEL_CONFIG, {}).get("vocab_size")
    rows = rows if type(rows) is int else None
    others = {name: said for name, said in described.items() if name != FAST}
    special = put_in(texts, others, where)
    without_row = put_in_nameless(texts, others, where, rows)
    if rows is not None and len(texts) == rows + 1 and is_padding(texts.get(rows, ""), described):
        without_row.append(texts.pop(rows))
    if without_row:
        log.warning("%s: %s is named, and has no row: it is left out", where, ", ".join(without_row))
    if rows is not None and len(texts) > rows:
        raise InputError(
            f"{where}: it names {len(texts)} tokens, and {MODEL_CONFIG} says {rows} rows; give the model that was "
            "trained with them, or the tokenizer that belongs to it"
        )
    new = {index: text for index, text in sorted(texts.items()) if text not in ids}
    gone = [one for one in fast["added_tokens"] if one["content"] in without_row]
    if not new and not gone:
        return None
    vocab = {text: index for text, index in fast["model"]["vocab"].items() if index in texts}
    added = [one for one in fast["added_tokens"] if one not in gone]
    added += [_added(index, text, special.get(text, True)) for index, text in new.items()]
    return fast | {"added_tokens": added, "model": fast["model"] | {"vocab": vocab}}


def _with_specials(fast: dict[str, Any], texts: Iterable[str]) -> dict[str, Any] | None:
    """With these tokens as special ones, which transformers makes of them; None where they are."""
    there = {one["content"]: one for one in fast["added_tokens"]}
    vocab = fast["model"]["vocab"]
    plain = [text for text in dict.fromkeys(texts) if text in there and not there[text]["special"]]
    new = [text for text in dict.fromkeys(texts) if text not in there and text in vocab]
    if not plain and not new:
        return None
    added = [one | {"special": True} if one["content"] in plain else one for one in fast["added_tokens"]]
    return fast | {"added_tokens": added + [_added(vocab[text], text) for text in new]}
