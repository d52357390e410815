"""Converting Meta checkpoints of 0.8 and 1.7 GB to Hugging Face files: memory against model size, and speed.

Beside it: a plain copy of the same bytes with one SHA-256 over them, the least that a verified step can cost. Ours
verifies what it reads, joins the shards, permutes, and writes with the digests of files and blocks. Wall times are of
the work, imports left out; every figure is of a program of its own.
"""

import hashlib
import os
import time
from pathlib import Path

from tests.bench.measure import Table, measured

ROWS = 32_000
SHARDS = 2
SIZES = {"0.8 GB": (2048, 5), "1.7 GB": (2048, 14)}
"""Name → hidden size, layers."""
LARGEST_MB = ROWS * 2048 * 2 / 2**20
BAR_MB = 3 * LARGEST_MB + 600
ENVIRONMENT = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}


def run(scratch: Path) -> list[Table]:
    table = Table(
        f"Meta's checkpoint to Hugging Face, {SHARDS} shards, folder to folder, float16",
        ("model", "way", "wall", "processor", "peak memory", "of a hashed copy"),
    )
    peaks = []
    for name, (width, layers) in SIZES.items():
        folder = scratch / name.replace(" ", "")
        weights = measured(make, str(folder), width, layers, environment=ENVIRONMENT).result
        copied = measured(copy, weights, str(folder / "copied"), environment=ENVIRONMENT)
        ours = measured(convert, weights, str(folder / "ours"), environment=ENVIRONMENT)
        peaks.append(ours.peak_mb)
        for way, cost in (("hashed copy", copied), ("ours", ours)):
            figures = (f"{cost.wall:.1f} s", f"{cost.cpu:.1f} s", f"{cost.peak_mb:,.0f} MB")
            table.rows.append((name, way, *figures, f"{cost.wall / copied.wall:.2f}"))
    table.note = (
        f"Bar: under {BAR_MB:,.0f} MB (3 x the largest tensor of {LARGEST_MB:.0f} MB, and 600), whatever the size. "
        f"From the smaller to the larger model the peak grew by {peaks[1] - peaks[0]:+.0f} MB."
    )
    return [table]


# --- programs ---------------------------------------------------------------------------------------------------------


def tokenizer(pieces: int) -> bytes:
    """A tokenizer.model of LLaMA's kind with so many pieces: bytes, letters, and words that nobody wrote."""
    import io
    import itertools
    import string

    import sentencepiece

    from zhllama.tokenizer.sentencepiece_model import parse_model

    made = io.BytesIO()
    letters = string.ascii_lowercase
    words = ["".join(pair) for pair in itertools.product(letters, repeat=2)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words)] * 3),
        model_writer=made,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    proto = parse_model(made.getvalue())
    known = {piece.piece for piece in proto.pieces}
    more = ("".join(each) for length in (2, 3, 4) for each in itertools.product(letters, repeat=length))
    for text in itertools.islice((text for text in more if text not in known), pieces - len(proto.pieces)):
        proto.pieces.add(piece=text, score=-float(len(proto.pieces)))
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return bytes(proto.SerializeToString())


def make(folder: str, width: int, layers: int) -> str:
    """Weights in Meta's layout, as fetch_weights publishes them; returns the reference."""
    from contextlib import ExitStack

    import torch

    from zhllama.artifacts.writer import ArtifactWriter
    from zhllama.models.architecture import HEAD
    from zhllama.weights.meta_format import MetaParams, extents, places, shard_name
    from zhllama.weights.torch_zip import PthStream

    params = MetaParams(width, layers, width // 128, 1e-6)
    shapes = {
        **dict.fromkeys(("tok_embeddings", "output"), (ROWS, width)),
        **dict.fromkeys(("w1", "w3"), (params.width, width)),
        "w2": (width, params.width),
        **dict.fromkeys(("wq", "wk", "wv", "wo"), (width, width)),
    }
    out = ArtifactWriter(folder, "fetch_weights", f"{layers:032x}")
    chance = torch.Generator().manual_seed(layers)
    declared: list[dict[str, tuple[str, tuple[int, ...]]]] = [{} for _ in range(SHARDS)]
    for place in places(layers, params.n_heads, params.kv_heads):
        shape = list(shapes.get(place.meta.split(".")[-2], (width,)))
        for index in range(SHARDS):
            part = list(shape)
            if place.axis is not None:
                part[place.axis] = extents(shape[place.axis], SHARDS, place.hf == HEAD)[index]
            declared[index][place.meta] = ("float16", tuple(part))
    with ExitStack() as files:
        for index in range(SHARDS):
            stream = PthStream(files.enter_context(out.writer(shard_name(index))), declared[index])
            copies = torch.Generator().manual_seed(7)
            for name, (_, part) in declared[index].items():
                # the norms are the same in every shard
                made = torch.randn(part, generator=copies if len(part) == 1 else chance)
                stream.write(name, (made * 0.02).half())
            stream.close()
    out.add_bytes("params.json", params.to_json())
    out.add_bytes("tokenizer.model", tokenizer(ROWS))
    return out.publish("meta-weights").reference


def convert(weights: str, store: str) -> dict[str, float]:
    import transformers  # noqa: F401 - the tokenizer's conversion loads it

    from components.convert_weights.converter import convert_weights
    from components.convert_weights.options import ConvertWeights
    from zhllama.stage.run import run_stage

    begin = time.perf_counter()
    run_stage(ConvertWeights(store=store, weights=weights), convert_weights)
    return {"seconds": time.perf_counter() - begin}


def copy(weights: str, target: str) -> dict[str, float]:
    """Every file through one SHA-256 into another file, on the disk at the end."""
    begin = time.perf_counter()
    Path(target).mkdir()
    for path in Path(weights).parent.iterdir():
        running = hashlib.sha256()
        with open(path, "rb", buffering=0) as source, open(Path(target) / path.name, "wb", buffering=0) as copied:
            while chunk := source.read(8 * 2**20):
                running.update(chunk)
                copied.write(chunk)
            os.fsync(copied.fileno())
    return {"seconds": time.perf_counter() - begin}
