"""On how many lines the published tokenizer differs from SentencePiece, by scores and pieces; and how full blocks are.

The base has LLaMA's shape; two Chinese models, one of each kind, are appended in turn. The lines are of every kind
(tests/texts.py). Fill: the sentences of the text as documents at 512, best-fit beside one document a block; and what
the recipe's plain concatenation, which is always full, cuts.
"""

from itertools import islice
from pathlib import Path
from typing import Any

from tests.bench.measure import Table, measured
from tests.texts import chinese_sentences, code_lines, llama_shaped, mixed_lines, unigram_model

LINES = 21_000
BLOCK = 512
CASES = (("distinct", "han"), ("distinct", "all"), ("zero", "han"), ("zero", "all"))


def run(scratch: Path) -> list[Table]:
    measured(make, str(scratch))
    parity = Table(
        f"parity: lines of {LINES:,} on which AutoTokenizer's ids differ from SentencePiece's",
        (
            "--scores",
            "--pieces",
            "appended",
            "that complete others",
            "unreachable",
            "lines that differ",
            "English lines",
        ),
        note="Bar: none with distinct scores. The recipe is zero and all. English lines: of the code and prose among "
        "them, those whose ids are not the base's any more.",
    )
    for scores, pieces in CASES:
        result = measured(compare, str(scratch), scores, pieces).result
        parity.rows.append((scores, pieces, *(f"{value:,}" for value in result)))
    packing = Table(
        f"packing: {BLOCK} tokens a block",
        ("", "filled", "documents cut"),
        note="Bar: 99% filled, and no document cut that fits in a block.",
    )
    for name, filled, cut in measured(fill, str(scratch)).result:
        packing.rows.append((name, f"{100 * filled:.2f}%", f"{100 * cut:.1f}%"))
    return [parity, packing]


def make(scratch: str) -> None:
    from components.train_tokenizer.sentencepiece_trainer import trained

    base = llama_shaped((" ".join(line.split()) for line in code_lines()), 8000)
    sentences = list(islice(chinese_sentences(), 30_000))
    mixed = mixed_lines(6000, seed=9)
    models = {
        "base": base,
        "bpe": trained(sentences + mixed, 6000, 0.9995, "text"),
        "unigram": unigram_model(sentences, 1500),
    }
    for name, model in models.items():
        Path(scratch, f"{name}.model").write_bytes(model)


def compare(scratch: str, scores: Any, pieces: Any) -> list[int]:
    """Appended, completing, unreachable, differing lines, English lines with other ids."""
    from transformers import AutoTokenizer

    from components.extend_tokenizer.pieces import extended, unreachable
    from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder

    read = {name: Path(scratch, f"{name}.model").read_bytes() for name in ("base", "bpe", "unigram")}
    chinese = [(name, read[name]) for name in ("bpe", "unigram")]
    made = extended(read["base"], chinese, scores, pieces, pad=True)
    folder = Path(scratch, f"{scores}-{pieces}")
    folder.mkdir()
    for name, content in SentencePieceEncoder(made.model).files().items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    before, after = SentencePieceEncoder(read["base"]), SentencePieceEncoder(made.model)
    special = [after.pieces[index] for index in (0, after.bos, after.eos, after.pad or 0)]
    lines = [line for line in mixed_lines(LINES + 100) if not any(text in line for text in special)][:LINES]
    ids = after.encode_batch(lines)
    published = AutoTokenizer.from_pretrained(folder)(lines)["input_ids"]
    differ = sum([after.bos, *ours] != found for ours, found in zip(ids, published, strict=True))
    changed = sum(line.isascii() and before.encode(line) != ours for line, ours in zip(lines, ids, strict=True))
    return [len(made.appended), len(made.completing), unreachable(made), differ, changed]


def fill(scratch: str) -> list[tuple[str, float, float]]:
    """Way → share of the places filled, share of the documents cut."""
    import numpy as np

    from components.extend_tokenizer.pieces import extended
    from components.prepare_dataset.best_fit import BestFit, cut
    from zhllama.data.packed import Segments
    from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder

    base, chinese = (Path(scratch, f"{name}.model").read_bytes() for name in ("base", "bpe"))
    encoder = SentencePieceEncoder(extended(base, [("bpe", chinese)], "distinct", "han", pad=True).model)
    texts = _documents(60_000)
    ids, sizes = encoder.encode_flat(texts, begin=True, end=True)
    segments = Segments(ids, sizes, np.zeros_like(sizes))
    packer = BestFit(BLOCK)
    blocks = sum(len(some.counts) for some in (*packer.add(segments), *packer.finish()))
    documents_cut = sum(len(cut(segments.part(at, at + 1), BLOCK)) > 1 for at in np.flatnonzero(sizes > BLOCK // 2))
    ends = sizes.cumsum()
    concatenated = np.count_nonzero((ends - sizes) // BLOCK != (ends - 1) // BLOCK) / len(sizes)
    longer = float((sizes > BLOCK).mean())
    return [
        ("best-fit (the default)", float(sizes.sum() / (blocks * BLOCK)), documents_cut / len(sizes)),
        ("concatenation (faithful)", 1.0, float(concatenated)),
        ("one document a block", float(np.minimum(sizes, BLOCK).sum() / (len(sizes) * BLOCK)), longer),
    ]


def _documents(count: int) -> list[str]:
    """Documents of natural lengths: mostly one to three sentences, a few of hundreds."""
    import random

    chance, sentences = random.Random(1), chinese_sentences()
    return ["".join(islice(sentences, max(1, min(200, int(chance.lognormvariate(0.5, 1)))))) for _ in range(count)]
