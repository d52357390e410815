"""Does the published fast tokenizer give SentencePiece's ids? Counted on a probe that travels with the code.

The probe is `probe.txt` (Chinese, English, code, white space, emoji, rare scripts) and lines made of the appended
pieces themselves, where ties would show. With distinct scores no line differs; with zero scores many do, and the
manifest says how many.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from zhllama.tokenizer.fast_tokenizer import load_fast
from zhllama.tokenizer.vocabulary import PAD_PIECE, Encoder

MADE_LINES = 400
PIECES_A_LINE = 12


def probe(appended: Sequence[str], seed: int) -> list[str]:
    """The lines of the probe: those of probe.txt, and seeded mixtures of the appended pieces."""
    lines = Path(__file__).with_name("probe.txt").read_text("utf-8").split("\n")
    chance = random.Random(seed)
    pieces = [piece for piece in appended if piece != PAD_PIECE]
    if pieces:
        lines += ["".join(chance.choices(pieces, k=PIECES_A_LINE)).replace("▁", " ") for _ in range(MADE_LINES)]
    return lines


def differing(files: dict[str, bytes], encoder: Encoder, lines: Sequence[str]) -> int:
    """How many lines the fast tokenizer of `files` encodes otherwise than BOS and SentencePiece's ids."""
    fast = load_fast(files).encode_batch(list(lines))
    return sum(found.ids != [encoder.bos, *ids] for found, ids in zip(fast, encoder.encode_batch(lines), strict=True))
