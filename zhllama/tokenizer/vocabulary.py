"""From an artifact, or a folder's files, to its encoder: SentencePiece's or a byte-level one, whichever lies there.

Who needs a tokenizer asks here alone, and asks it nothing but what an Encoder answers (encoder.py).
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zhllama.errors import InputError
from zhllama.tokenizer.byte_level import MERGES, VOCAB, ByteLevelEncoder
from zhllama.tokenizer.contract import Relation, Vocabulary, padding_multiple
from zhllama.tokenizer.effective_model import (
    DESCRIBED,
    FAST,
    MODEL_CONFIG,
    PAD_PIECE,
    append_named,
    effective_model,
    name_specials,
)
from zhllama.tokenizer.encoder import Encoder
from zhllama.tokenizer.rebuilt_model import is_byte_level, rebuilt_model, require_same_ids
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import NORMAL, TOKENIZER_MODEL

if TYPE_CHECKING:
    from zhllama.artifacts.reader import Artifact

__all__ = [
    "PAD_PIECE", "TOKENIZER_FILES", "Encoder", "Relation", "Vocabulary", "contract_of", "described_encoder",
    "has_tokenizer", "load_encoder", "mixtures", "padding_multiple", "tokenizer_model_in",
]  # fmt: skip

_LINES = ("你好，世界！𠀀🤗", "The quick brown fox, 3.14:\n\tand more", f"a  two{' ' * 37}spaces", "é\x01")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\n")
"""How LLaMA 3's tokenizer.model begins: a token in Base64 and its rank."""
TOKENIZER_FILES = (TOKENIZER_MODEL, VOCAB, MERGES)
"""With DESCRIBED, what a tokenizer is made of: written anew wherever a model is."""


def mixtures(texts: Sequence[str], lines: int, seed: int) -> list[str]:
    """Seeded lines of a vocabulary's own pieces, where a wrong score or a tie shows."""
    chance = random.Random(seed)
    return ["".join(chance.choices(texts, k=12)).replace("▁", " ") for _ in range(lines)]


def has_tokenizer(artifact: "Artifact") -> bool:
    """Whether an artifact carries a tokenizer: its tokenizer.model, or a tokenizer.json with a vocabulary."""
    return TOKENIZER_MODEL in artifact or (FAST in artifact and "model" in _object(artifact, FAST, artifact.root))


def _described(artifact: "Artifact", where: str) -> dict[str, dict[str, Any]]:
    return {file: _object(artifact, file, where) for file in DESCRIBED if file in artifact}


def _model_name(artifact: "Artifact") -> str:
    """The only .model file of a plain folder, whatever it is called; else tokenizer.model."""
    named = [name for name in artifact.names if name.endswith(".model")]
    return named[0] if len(named) == 1 else TOKENIZER_MODEL


def tokenizer_model_in(artifact: "Artifact", option: str, meant: bytes | None = None) -> tuple[str, bytes]:
    """Where an artifact's SentencePiece model stands (for messages; `option`: as `--tokenizer`), and its bytes: of
    `tokenizer.model` (or the only .model file of a plain folder), else made of tokenizer.json, and in either case with
    the tokens that the folder names beyond it. meant: the tokenizer.model that these tokens are beyond, where the
    artifact has neither."""
    name, where = _model_name(artifact), f"{option} {artifact.root}"
    described = _described(artifact, where)
    if meant is None and name not in artifact and (FAST not in described or is_byte_level(described[FAST])):
        other = " (its tokenizer.json is byte-level)" if FAST in artifact else ""
        raise InputError(
            f"{where}: no tokenizer.model in it{other}; give a SentencePiece tokenizer, or a model or adapter with one"
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
                "needed; give a model with its tokenizer.json"
            )
        return f"{where}/{name}", effective_model(model, described, where)
    return f"{where}/{name}", _rebuilt(model, described, where)


def described_encoder(
    name: str,
    read: Callable[[str], bytes],
    described: Mapping[str, Mapping[str, Any]],
    where: str,
    listed: bool = False,
) -> Encoder:
    """The encoder of files that are no artifact yet; as described_model. listed: whether vocab.json and merges.txt lie
    beside them."""
    byte_level = FAST in described and "model" in described[FAST] and is_byte_level(described[FAST])
    if byte_level and (name == FAST or _TIKTOKEN.match(read(name))):
        return ByteLevelEncoder.described(read(FAST), described, where, listed)
    place, model = described_model(name, read, described, where)
    return SentencePieceEncoder(model, place)


def load_encoder(artifact: "Artifact", option: str, before: Encoder | None = None) -> Encoder:
    """The encoder of an artifact that carries a tokenizer: a tokenizer, a model or an adapter. before: what the tokens
    that it names are beyond, where it has none. `option`: as `--tokenizer`, for messages."""
    name, where = _model_name(artifact), f"{option} {artifact.root}"
    if name not in artifact and FAST not in artifact and isinstance(before, ByteLevelEncoder):
        return ByteLevelEncoder.described(before.content, _described(artifact, where), where, before.listed, before)
    if name not in artifact and FAST not in artifact and isinstance(before, SentencePieceEncoder):
        where, model = tokenizer_model_in(artifact, option, before.model)
        return SentencePieceEncoder(model, where)
    described, listed = _described(artifact, where), VOCAB in artifact and MERGES in artifact
    if name not in artifact and "model" not in described.get(FAST, {}):
        other = f"; {VOCAB} and {MERGES} alone do not say how text is cut" if listed else ""
        raise InputError(
            f"{where}: no tokenizer.model in it, and no tokenizer.json with a vocabulary{other}; give a tokenizer, or "
            "a model or adapter with one"
        )
    return described_encoder(FAST if name not in artifact else name, artifact.read, described, where, listed)


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
    require_same_ids(
        content, SentencePieceEncoder(model, where_fast), [line for line in (*lines, *_LINES) if line], where_fast
    )
    return model
