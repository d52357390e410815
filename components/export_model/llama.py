"""The model to export: what its headers and small files say, checked for either format before a weight is read."""

from dataclasses import dataclass
from typing import Any

from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.vocabulary import load_encoder
from zhllama.weights.fit import require_rows
from zhllama.weights.meta_format import DROPPED, EMBEDDING, HEAD, MetaParams, Place, places
from zhllama.weights.model_config import model_config
from zhllama.weights.rope import Rope
from zhllama.weights.safetensors_io import Checkpoint, TensorInfo
from zhllama.weights.ties import is_tied


@dataclass(frozen=True)
class Llama:
    """A LLaMA model: its shape as Meta says it, and what only other formats can say. `config`: config.json as
    model_config gives it."""

    artifact: Artifact
    checkpoint: Checkpoint
    encoder: SentencePieceEncoder
    places: tuple[Place, ...]
    config: dict[str, Any]
    params: MetaParams
    feed_forward: int
    head_width: int
    positions: int
    rope: Rope
    tied: bool

    def info(self, place: Place) -> TensorInfo:
        """Of a tied model's head, which is not in the file, the embedding's."""
        return self.checkpoint.info(EMBEDDING if place.hf == HEAD and self.tied else place.hf)


def open_llama(model: Artifact, form: str, ropes: tuple[str, ...]) -> Llama:
    """InputError for what `form` (as `Meta's format`) cannot hold; ropes: the rotary positions that it can say."""
    where = f"--model {model.root}"
    checkpoint = Checkpoint(model)
    checkpoint.refuse_quantised()
    config = model_config(checkpoint)
    rope = Rope.of(config, where)
    if rope.kind not in ropes:
        raise InputError(
            f"{where}: config.json stretches the rotary positions ({rope.kind}), which is not exported to {form}"
        )
    heads = config["num_attention_heads"]
    params = MetaParams(
        config["hidden_size"], config["num_hidden_layers"], heads, config.get("rms_norm_eps", 1e-6),
        n_kv_heads=config.get("num_key_value_heads"), rope_theta=rope.theta,
    )  # fmt: skip
    width = config.get("head_dim") or params.head_dim
    encoder = load_encoder(model, "--model")
    if not isinstance(encoder, SentencePieceEncoder):
        raise InputError(f"{where}: its tokenizer is byte-level, which is not exported to {form}")
    rows = checkpoint.info(EMBEDDING).shape[0]
    require_rows(encoder.size, rows, where, "the model")
    all_places = places(params.n_layers, params.n_heads, params.kv_heads)
    wanted = tuple(place for place in all_places if place.hf == HEAD or checkpoint.info(place.hf))
    unknown = sorted(set(checkpoint.tensors) - {place.hf for place in wanted})
    if unknown := [name for name in unknown if not DROPPED.search(name)]:
        raise InputError(f"{where}: tensor {unknown[0]} is none of a LLaMA model; {form} has no place for it")
    sizes = config["intermediate_size"], width, config["max_position_embeddings"]
    return Llama(model, checkpoint, encoder, wanted, config, params, *sizes, rope, is_tied(checkpoint))
