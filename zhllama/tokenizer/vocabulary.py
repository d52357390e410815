"""The vocabulary contract and the one encoder.

The contract is what two artifacts must agree on before a weight is loaded: the ordered pieces (digests of the first
32,000, 49,953, 49,954 …, so that *extends* can be told from *foreign*), the special ids, tying, padding and dtype. It
travels in every manifest. Encoding is SentencePiece's own; special ids are put in by id, so that `</s>` in a user's
text stays text.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from zhllama.errors import InputError
from zhllama.tokenizer.effective_model import (
    DESCRIBED,
    FAST,
    MODEL_CONFIG,
    PAD_PIECE,
    append_named,
    effective_model,
    name_specials,
)
from zhllama.tokenizer.rebuilt_model import is_byte_level, rebuilt_model, require_same_ids
from zhllama.tokenizer.sentencepiece_model import NORMAL, TOKENIZER_MODEL

if TYPE_CHECKING:
    import numpy as np

    from zhllama.artifacts.reader import Artifact
    from zhllama.tokenizer.segments import SegmentEncoder

_LINES = ("你好，世界！𠀀🤗", "The quick brown fox, 3.14:\n\tand more", f"a  two{' ' * 37}spaces", "é\x01")
RECIPE_SIZES = (32_000, 49_953, 49_954)
"""LLaMA, Chinese-LLaMA, Chinese-Alpaca: sizes whose prefix digest every contract records."""
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\n")
"""How LLaMA 3's tokenizer.model begins: a token in Base64 and its rank."""


class Relation(Enum):
    EQUAL = "equal"
    EXTENDS = "extends"
    SHRINKS = "shrinks"
    FOREIGN = "foreign"


@dataclass(frozen=True)
class Vocabulary:
    """The contract. `prefixes`: a number of pieces (as text, for JSON) → the digest of that many."""

    size: int
    digest: str
    bos: int
    eos: int
    pad: int | None
    prefixes: Mapping[str, str] = field(default_factory=dict)
    padding_multiple: int = 1
    tied: bool | None = None
    dtype: str | None = None

    @property
    def rows(self) -> int:
        """Rows of the embedding: the pieces, rounded up to the padding multiple."""
        return -(-self.size // self.padding_multiple) * self.padding_multiple

    def relation_to(self, other: "Vocabulary") -> Relation:
        """How this vocabulary stands to `other`: it *extends* other when other's pieces are its first ones."""
        if (self.size, self.digest) == (other.size, other.digest):
            return Relation.EQUAL if (self.bos, self.eos) == (other.bos, other.eos) else Relation.FOREIGN
        # what is appended may be the new EOS (ChatML's <|im_end|>); among the pieces of both it must be the same
        most = min(self.size, other.size)
        if any(one != two and max(one, two) < most for one, two in ((self.bos, other.bos), (self.eos, other.eos))):
            return Relation.FOREIGN
        if self.prefixes.get(str(other.size)) == other.digest:
            return Relation.EXTENDS
        if other.prefixes.get(str(self.size)) == self.digest:
            return Relation.SHRINKS
        return Relation.FOREIGN

    def __str__(self) -> str:
        return f"{self.size} pieces ({self.digest[:8]})"


def padding_multiple(pieces: int, rows: int) -> int:
    """The smallest power of two that rounds `pieces` up to `rows`; `rows` itself where none does."""
    powers = (1 << power for power in range(rows.bit_length()))
    return next((multiple for multiple in powers if -(-pieces // multiple) * multiple == rows), rows)


class Encoder:
    """SentencePiece encoding by the ids used in training. Built from the bytes of a `tokenizer.model`."""

    def __init__(self, model: bytes, where: str = "tokenizer.model") -> None:
        import sentencepiece

        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise InputError(f"{where}: not a SentencePiece model ({error}); give a tokenizer.model") from error
        self.size: int = self._processor.get_piece_size()
        self.bos: int = self._processor.bos_id()
        self.eos: int = self._processor.eos_id()
        self.unknown: int = self._processor.unk_id()
        if self.bos < 0 or self.eos < 0:
            raise InputError(f"{where}: the model has no BOS or EOS id; a LLaMA-shaped SentencePiece model has 1 and 2")

    @cached_property
    def pieces(self) -> list[str]:
        return [self._processor.id_to_piece(index) for index in range(self.size)]

    @cached_property
    def pad(self) -> int | None:
        """The id of `[PAD]`, or of the model's own padding piece; None without one. A piece that is padding beside
        being EOS, BOS or the unknown one is none: what is padded with it could not be told from what is meant."""
        index = self._processor.piece_to_id(PAD_PIECE)
        if index != self.unknown:
            return index
        index = self._processor.pad_id()
        return index if index not in (-1, self.unknown, self.bos, self.eos) else None

    @cached_property
    def named_pad(self) -> int | None:
        """The padding that the files of a model name for other programs: `pad`, else the piece that is it as well."""
        from zhllama.tokenizer.sentencepiece_model import parse_model

        if self.pad is not None:
            return self.pad
        trainer = parse_model(self.model).trainer_spec
        index = trainer.pad_id
        return index if 0 <= index < self.size and self.pieces[index] == trainer.pad_piece else None

    @cached_property
    def _segments(self) -> "SegmentEncoder | None":
        """The quicker way to the same ids, where there is one."""
        from zhllama.tokenizer.segments import SegmentEncoder
        from zhllama.tokenizer.sentencepiece_model import parse_model

        proto = parse_model(self.model)
        return SegmentEncoder(self._processor, proto) if SegmentEncoder.fits(proto) else None

    def encode(self, text: str) -> list[int]:
        """Ids without BOS or EOS."""
        return list(self._processor.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As encode, many at a time, on SentencePiece's threads."""
        return [list(ids) for ids in self._processor.encode(list(texts))] if texts else []

    def encode_flat(
        self, texts: Sequence[str], begin: bool = False, end: bool = False
    ) -> tuple["np.ndarray", "np.ndarray"]:
        """As encode_batch, the ids of all texts one after another, int32, and how many each has, int64; with `begin`
        BOS stands before each, with `end` EOS after it."""
        import numpy as np

        if self._segments is not None:
            return self._segments.encode(texts, begin, end)
        # the ids are put in after the text was encoded, so a literal </s> stays text
        found = self._processor.encode(list(texts), out_type="numpy", add_bos=begin, add_eos=end) if texts else []
        arrays = [np.zeros(0, np.int32), *found]
        return np.concatenate(arrays), np.fromiter(map(len, arrays[1:]), np.int64, len(texts))

    def unknown_bytes(self, texts: Sequence[str]) -> list[int]:
        """How many bytes of UTF-8 of each text are unknown to it: none where it falls back to bytes."""
        counts = []
        for text, ids in zip(texts, self.encode_batch(texts), strict=True):
            pieces = self._processor.encode(text, out_type=str) if self.unknown in ids else ()
            spelt = (piece.replace("▁", " ") for piece, index in zip(pieces, ids) if index == self.unknown)
            counts.append(sum(len(piece.encode()) for piece in spelt))
        return counts

    def differing(self, texts: Sequence[str], found: Iterable[Sequence[int]]) -> int:
        """How many texts another tokenizer has `found` other ids for than BOS and SentencePiece's."""
        wanted = self.encode_batch(texts)
        return sum(list(ids) != [self.bos, *right] for ids, right in zip(found, wanted, strict=True))

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._processor.decode([int(index) for index in ids]))

    def vocabulary(self, also_at: Iterable[int] = (), **facts: Any) -> Vocabulary:
        """The contract of this tokenizer; `also_at`: more sizes whose prefix digest is recorded (the base's)."""
        marks = {size for size in (*RECIPE_SIZES, *also_at) if size < self.size}
        running = hashlib.sha256()
        prefixes: dict[str, str] = {}
        for index, piece in enumerate(self.pieces):
            if index in marks:
                prefixes[str(index)] = running.hexdigest()
            text = piece.encode()
            running.update(len(text).to_bytes(4, "little") + text)
        return Vocabulary(self.size, running.hexdigest(), self.bos, self.eos, self.pad, prefixes, **facts)


def mixtures(pieces: Sequence[str], lines: int, seed: int) -> list[str]:
    """Seeded lines of a vocabulary's own pieces, where a wrong score or a tie shows."""
    chance = random.Random(seed)
    return ["".join(chance.choices(pieces, k=12)).replace("▁", " ") for _ in range(lines)]


def has_tokenizer(artifact: "Artifact") -> bool:
    """Whether an artifact carries a tokenizer that SentencePiece can be: its tokenizer.model, or tokenizer.json alone
    where that is not byte-level (LLaMA 3's is carried along unread)."""
    if TOKENIZER_MODEL in artifact:
        return True
    return FAST in artifact and not is_byte_level(_object(artifact, FAST, artifact.root))


def tokenizer_model_in(artifact: "Artifact", option: str, meant: bytes | None = None) -> tuple[str, bytes]:
    """Where an artifact's SentencePiece model stands (for messages; `option`: as `--tokenizer`), and its bytes: of
    `tokenizer.model` (or the only .model file of a plain folder), else made of tokenizer.json, and in either case with
    the tokens that the folder names beyond it. meant: the tokenizer.model that these tokens are beyond, where the
    artifact has neither."""
    named = [name for name in artifact.names if name.endswith(".model")]
    name = named[0] if len(named) == 1 else TOKENIZER_MODEL
    where = f"{option} {artifact.root}"
    described = {file: _object(artifact, file, where) for file in DESCRIBED if file in artifact}
    if meant is None and name not in artifact and (FAST not in described or is_byte_level(described[FAST])):
        other = " (tokenizer.json alone, as LLaMA 3 has it, is none: byte-level tokenizers are not supported)"
        raise InputError(
            f"{where}: no tokenizer.model in it{other if FAST in artifact else ''}; give a SentencePiece "
            "tokenizer, or a model or adapter with one"
        )

    def read(file: str) -> bytes:
        return artifact.read(file) if meant is None else meant

    return described_model(FAST if meant is None and name not in artifact else name, read, described, where)


def described_model(
    name: str, read: Callable[[str], bytes], described: Mapping[str, Mapping[str, Any]], where: str
) -> tuple[str, bytes]:
    """As tokenizer_model_in, of files that are no artifact yet. `name`: of the SentencePiece model, or tokenizer.json;
    `described`: the contents of DESCRIBED, as far as they are there."""
    model = read(name)
    if name != FAST:
        if _TIKTOKEN.match(model):
            raise InputError(
                f"{where}/{name}: a byte-level BPE tokenizer as LLaMA 3's (tiktoken), where a SentencePiece model is "
                "needed; LLaMA 3 is not supported, give a model of LLaMA 1's or 2's shape"
            )
        return f"{where}/{name}", effective_model(model, described, where)
    return f"{where}/{name}", _rebuilt(model, described, where)


def load_encoder(artifact: "Artifact", option: str, meant: bytes | None = None) -> Encoder:
    """The encoder of an artifact that carries a SentencePiece model: a tokenizer, a model or an adapter. meant: as in
    tokenizer_model_in."""
    where, model = tokenizer_model_in(artifact, option, meant)
    return Encoder(model, where)


def contract_of(artifact: "Artifact", encoder: Encoder) -> Vocabulary:
    """The contract in an artifact's manifest, else of its own encoder; that too where it has more pieces: earlier
    releases left out of the manifest what the folder's other files name."""
    stated = artifact.manifest.vocabulary
    if stated is None:
        return encoder.vocabulary()
    multiple = padding_multiple(encoder.size, max(stated.rows, encoder.size))
    facts = {"tied": stated.tied, "dtype": stated.dtype, "padding_multiple": multiple}
    found = encoder.vocabulary(also_at=(stated.size, *map(int, stated.prefixes)), **facts)
    return found if found.relation_to(stated) is Relation.EXTENDS else stated


def _object(artifact: "Artifact", name: str, where: str) -> dict[str, Any]:
    try:
        return artifact.read_object(name)
    except ValueError as error:
        if name == MODEL_CONFIG:  # whoever needs more of it than the rows says what it is
            return {}
        raise InputError(f"{where}: {name} is no JSON object ({error}); fetch it again") from error


def _rebuilt(content: bytes, described: Mapping[str, Mapping[str, Any]], where: str) -> bytes:
    """The bytes of the SentencePiece model of a tokenizer.json. InputError where it gives other ids."""
    where_fast = f"{where}/{FAST}"
    proto = rebuilt_model(described[FAST], where_fast)
    ordinary = [piece.piece for piece in proto.pieces if piece.type == NORMAL]
    append_named(proto, described, where)
    name_specials(proto, described)
    model = bytes(proto.SerializeToString())
    # transformers 5 puts no mark before a text that begins with a space, where SentencePiece puts one
    lines = [line.lstrip(" ") for line in mixtures(ordinary, 200, seed=0)] if ordinary else []
    require_same_ids(content, Encoder(model, where_fast), [line for line in (*lines, *_LINES) if line], where_fast)
    return model
