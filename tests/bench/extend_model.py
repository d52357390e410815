"""Extending the vocabulary of a model of LLaMA-7B's width from 32,000 to 49,954 pieces: time and memory.

Beside it: transformers' way with the same result as the recipe's (load, resize_token_embeddings with N(0, 0.02) rows,
save). Its default, rows drawn from the old ones' covariance, took 220 s at a quarter of this width. Ours computes the
mean of each new piece's old pieces, makes the fast tokenizer, and tries it against SentencePiece, too. The model has
one layer: the rest of a larger one is copied, within a store by the server.
"""

import time
from pathlib import Path

from tests.bench.convert import ROWS, tokenizer
from tests.bench.measure import Table, measured
from tests.folders import add_folder

WIDTH, FEED_FORWARD = 4096, 11008
PIECES = 49_954
ENVIRONMENT = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def run(scratch: Path) -> list[Table]:
    model, chinese = measured(make, str(scratch), environment=ENVIRONMENT).result
    ours = measured(extend, model, chinese, str(scratch / "ours"), environment=ENVIRONMENT)
    peer = measured(resize, model, str(scratch / "peer"), environment=ENVIRONMENT)
    table = Table(
        f"Extending 32,000 to {ours.result['rows']:,} pieces x {WIDTH}, float16",
        ("way", "wall", "processor", "peak memory"),
        note="Bars: under 10 s, under 1,500 MB. Imports left out of the wall times.",
    )
    for way, cost in (("ours: stage extend_tokenizer", ours), ("transformers: load, resize, save", peer)):
        table.rows.append((way, f"{cost.wall:.1f} s", f"{cost.cpu:.1f} s", f"{cost.peak_mb:,.0f} MB"))
    return [table]


# --- programs ---------------------------------------------------------------------------------------------------------


def make(folder: str) -> tuple[str, str]:
    """A model of one layer as convert_weights lays it out, and a Chinese tokenizer: (reference, folder)."""
    import torch
    from safetensors.torch import save_file

    from zhllama.artifacts.writer import ArtifactWriter
    from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
    from zhllama.weights.safetensors_io import index_json

    base = tokenizer(ROWS)
    layer = "model.layers.0"
    shapes = {f"{layer}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {f"{layer}.mlp.{name}_proj.weight": (FEED_FORWARD, WIDTH) for name in ("gate", "up")}
    shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, FEED_FORWARD)
    norms = {f"{layer}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    tables = {"model.embed_tokens.weight": (ROWS, WIDTH), "lm_head.weight": (ROWS, WIDTH)}
    files = {
        "model-embeddings.safetensors": tables,
        "model-00001.safetensors": {**shapes, **norms, "model.norm.weight": (WIDTH,)},
    }
    chance = torch.Generator().manual_seed(1)
    source = Path(folder) / "source"
    source.mkdir()
    for name, wanted in files.items():
        made = {key: (torch.randn(shape, generator=chance) * 0.02).half() for key, shape in wanted.items()}
        save_file(made, source / name, metadata={"format": "pt"})
    place_of = {key: name for name, wanted in files.items() for key in wanted}
    (source / "model.safetensors.index.json").write_bytes(index_json(place_of, 0))
    for name, content in SentencePieceEncoder(base).files(2048).items():
        (source / name).write_bytes(content)
    out = ArtifactWriter(folder, "convert_weights", "0" * 32)
    add_folder(out, source)
    out.add_json("config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": ROWS, "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD, "num_hidden_layers": 1, "num_attention_heads": 32, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
        "dtype": "float16",
    })  # fmt: skip
    chinese = Path(folder) / "chinese"
    chinese.mkdir()
    (chinese / "tokenizer.model").write_bytes(_chinese(base))
    return out.publish("hf-model").reference, str(chinese)


def _chinese(base: bytes) -> bytes:
    """The recipe's number of new pieces: 6,000 characters, and words of two of them."""
    from zhllama.tokenizer.sentencepiece_model import parse_model

    proto = parse_model(base)
    # control, unknown and byte pieces stay; the words give way
    del proto.pieces[259:]
    characters = [chr(0x4E00 + number) for number in range(6000)]
    words = [first + second for apart in (1, 2) for first, second in zip(characters, characters[apart:])]
    for text in [*characters, *words][: PIECES - 1 - ROWS]:
        proto.pieces.add(piece=text, score=-float(len(proto.pieces)))
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return bytes(proto.SerializeToString())


def extend(model: str, chinese: str, store: str) -> dict[str, float]:
    import transformers  # noqa: F401 - the tokenizer's conversion loads it

    from components.extend_tokenizer.extender import extend_tokenizer
    from components.extend_tokenizer.options import ExtendTokenizer
    from zhllama.stage.run import run_stage

    begin = time.perf_counter()
    manifest = run_stage(ExtendTokenizer(store=store, model=model, chinese_tokenizer=chinese), extend_tokenizer)
    assert manifest.vocabulary is not None
    return {"seconds": time.perf_counter() - begin, "rows": manifest.vocabulary.rows}


def resize(model: str, target: str) -> dict[str, float]:
    import torch
    from transformers import LlamaForCausalLM

    begin = time.perf_counter()
    loaded = LlamaForCausalLM.from_pretrained(Path(model).parent, dtype=torch.float16)
    loaded.resize_token_embeddings(PIECES, mean_resizing=False)
    loaded.save_pretrained(target)
    return {"seconds": time.perf_counter() - begin}
