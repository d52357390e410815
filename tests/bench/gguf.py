"""Export to GGUF: what it costs to write and to quantise 0.8 GB, and that the tokenizer inside is SentencePiece's.

The peer of the quantised files is the f16 file that llama.cpp makes them of. Ids are compared on 20,000 lines, for a
vocabulary with distinct scores and for the recipe's, whose Chinese pieces all have score 0.
"""

import time
from pathlib import Path

from tests.bench.measure import Table, measured
from tests.bench.merge import ENVIRONMENT, make

KINDS = ("f16", "q8_0", "q4_k_m")
LINES = 20_000


def run(scratch: Path) -> list[Table]:
    written = Table(
        "GGUF of a LLaMA of 0.8 GB, folder to folder", ("way", "wall", "peak memory", "size", "bits a weight")
    )
    model, _ = measured(make, str(scratch / "model"), 2048, 5504, 8, environment=ENVIRONMENT).result
    measured(add_tokenizer, model, str(scratch / "with-tokenizer"), environment=ENVIRONMENT)
    for kind in KINDS:
        cost = measured(export, str(scratch / "with-tokenizer"), kind, str(scratch / kind), environment=ENVIRONMENT)
        size, bits = f"{cost.result['bytes'] / 1e6:,.0f} MB", f"{cost.result['bits_per_weight']:.2f}"
        written.rows.append((kind, f"{cost.wall:.1f} s", f"{cost.peak_mb:,.0f} MB", size, bits))
    written.note = (
        "f16 is a stream; a quantised file is made by llama.cpp, from a local f16 file that is made anew for each."
    )

    encoded = Table("Ids of llama.cpp and of SentencePiece", ("vocabulary", "lines", "lines that differ"))
    for name, distinct in (("distinct scores (ours)", True), ("score 0 (the recipe's)", False)):
        found = measured(differing, str(scratch / name.split()[0]), distinct, environment=ENVIRONMENT).result
        encoded.rows.append((name, f"{found['lines']:,}", str(found["differ"])))
    encoded.note = "Bar: none."
    return [written, encoded]


# --- programs ---------------------------------------------------------------------------------------------------------


def add_tokenizer(model: str, target: str) -> None:
    """The model of the merge's benchmark as a plain folder with a tokenizer, of fewer pieces than it has rows."""
    from zhllama.artifacts.open import open_artifact

    folder = open_artifact(model).fetch(Path(target))
    (folder / "tokenizer.model").write_bytes(_tokenizer(distinct=True))


def export(model: str, kind: str, store: str) -> dict[str, float]:
    import torch  # noqa: F401 - its import is no part of the figure

    from components.export_model.exporter import export_model
    from components.export_model.options import ExportModel
    from zhllama.stage.run import run_stage

    options = ExportModel(store=store, model=model, format="gguf", quantization=kind)
    begin = time.perf_counter()
    manifest = run_stage(options, export_model)
    return {"seconds": time.perf_counter() - begin, **manifest.facts["files"][kind]}


def differing(folder: str, distinct: bool) -> dict[str, int]:
    """How many lines llama.cpp encodes otherwise than SentencePiece, with a vocabulary extended in one way."""
    import gguf

    from components.export_model.gguf_writer import add_tokenizer as add
    from components.export_model.llama_cpp_tools import encode
    from tests.texts import mixed_lines
    from zhllama.tokenizer.prompt import RECIPE
    from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder

    encoder = SentencePieceEncoder(_tokenizer(distinct))
    Path(folder).mkdir()
    path = Path(folder, "vocabulary.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(encoder.size)
    add(writer, encoder, RECIPE.template)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
        write()
    writer.close()
    lines = mixed_lines(LINES)
    wanted = [[encoder.bos, *ids] for ids in encoder.encode_batch(lines)]
    found = encode(path, lines)
    return {"lines": len(lines), "differ": sum(left != right for left, right in zip(found, wanted, strict=True))}


def _tokenizer(distinct: bool) -> bytes:
    """A tokenizer of LLaMA's shape, 2,000 pieces, and the Chinese pieces of another, in one of two ways."""
    from itertools import islice

    from components.train_tokenizer.sentencepiece_trainer import trained
    from tests.texts import chinese_sentences, code_lines, llama_shaped
    from zhllama.tokenizer.sentencepiece_model import parse_model

    proto = parse_model(llama_shaped((" ".join(line.split()) for line in islice(code_lines(), 20_000)), 2000))
    there = {piece.piece for piece in proto.pieces}
    chinese = parse_model(trained(list(islice(chinese_sentences(), 5000)), 1500, 0.9995, "chinese"))
    for index, piece in enumerate(new for new in chinese.pieces if new.piece not in there):
        proto.pieces.add(piece=piece.piece, score=-31_741.0 - index if distinct else 0.0)
    return bytes(proto.SerializeToString())
