"""The model to export: what its headers and small files say, checked for either format before a weight is read."""

from dataclasses import dataclass
from typing import Any

from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.tokenizer.vocabulary import Encoder, load_encoder
from zhllama.weights.fit import require_rows
from zhllama.weights.meta_format import EMBEDDING, HEAD, ROPE_THETA, MetaParams, Place, places
from zhllama.weights.safetensors_io import Checkpoint, TensorInfo
from zhllama.weights.ties import is_tied


@dataclass(frozen=True)
class Llama:
    """A LLaMA model: its shape as Meta says it, and what only other formats can say. `stretch`: linear scaling of
    positions, 1 for none. `config`: config.json as it is."""

    artifact: Artifact
    checkpoint: Checkpoint
    encoder: Encoder
    places: tuple[Place, ...]
    config: dict[str, Any]
    params: MetaParams
    feed_forward: int
    head_width: int
    positions: int
    stretch: float
    tied: bool

    def info(self, place: Place) -> TensorInfo:
        """Of a tied model's head, which is not in the file, the embedding's."""
        return self.checkpoint.info(EMBEDDING if place.hf == HEAD and self.tied else place.hf)


def open_llama(model: Artifact, form: str, ropes: tuple[str, ...]) -> Llama:
    """InputError for what `form` (as `Meta's format`) cannot hold; ropes: the rotary positions that it can say."""
    where = f"--model {model.root}"
    if "config.json" not in model:
        raise InputError(f"{where}: no config.json in it; a Hugging Face model folder is needed")
    try:
        config = read_object(model, "config.json")
        if (kind := config.get("model_type")) != "llama":
            raise InputError(f"{where}: a {kind} model; only LLaMA models are exported")
        # transformers 5 keeps both in rope_parameters, older ones in two places
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ropes:
            raise InputError(
                f"{where}: config.json stretches the rotary positions ({kind}), which is not exported to {form}"
            )
        params = MetaParams(
            int(config["hidden_size"]), int(config["num_hidden_layers"]), int(config["num_attention_heads"]),
            float(config["rms_norm_eps"]), n_kv_heads=int(config.get("num_key_value_heads") or 0) or None,
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or ROPE_THETA),
        )  # fmt: skip
        rest: dict[str, Any] = {
            "feed_forward": int(config["intermediate_size"]),
            "head_width": int(config.get("head_dim") or params.head_dim),
            "positions": int(config.get("max_position_embeddings", 2048)),
            "stretch": float(rope["factor"]) if kind == "linear" else 1.0,
        }
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{where}: config.json is not a LLaMA model's ({error}); give another model") from error
    encoder = load_encoder(model, "--model")
    checkpoint = Checkpoint(model)
    checkpoint.refuse_quantised()
    rows = checkpoint.info(EMBEDDING).shape[0]
    require_rows(encoder.size, rows, where, "the model")
    all_places = places(params.n_layers, params.n_heads, params.kv_heads)
    wanted = tuple(place for place in all_places if place.hf == HEAD or checkpoint.info(place.hf))
    if unknown := sorted(set(checkpoint.tensors) - {place.hf for place in wanted}):
        raise InputError(f"{where}: tensor {unknown[0]} is none of a LLaMA model; {form} has no place for it")
    return Llama(model, checkpoint, encoder, wanted, config, params, **rest, tied=is_tied(checkpoint))
