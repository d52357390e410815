"""Hugging Face safetensors → GGUF, as a stream: each tensor is read by rows, put into llama.cpp's order, and written.

The header (metadata, the tokenizer, where each tensor lies) is made by the `gguf` package; the tensors follow it, as
long as the model is, straight into the store. Memory: 64 MB of rows and the header, whatever the model. What llama.cpp
wants of a LLaMA: rows of q and k in Meta's order, one-dimensional tensors in float32, as many embedding rows as the
tokenizer has pieces (rows that only pad are left out).

The tokenizer inside is SentencePiece's, piece by piece: text, score, type, special ids, whether a space goes before.
llama.cpp merges by score and from the left as SentencePiece does, so that even tied scores give the same ids.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.progress import Progress
from zhllama.tokenizer.prompt import CHAT_TEMPLATE
from zhllama.tokenizer.sentencepiece_model import parse_model
from zhllama.tokenizer.vocabulary import Encoder, load_encoder
from zhllama.weights.meta_format import EMBEDDING, HEAD, ROPE_THETA, TOKENIZER, places, unpermute
from zhllama.weights.quantised import refuse_quantised
from zhllama.weights.safetensors_io import Checkpoint, Sink

if TYPE_CHECKING:
    import torch

CHUNK = 64 * 2**20
"""Bytes of a tensor that are in memory at once."""
PRECISIONS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""What a GGUF may hold unquantised → torch's name."""
_ALIGNMENT = 32
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}


@dataclass(frozen=True)
class LlamaSettings:
    """config.json of a LLaMA model, as far as GGUF says it. `stretch`: linear scaling of positions, 1 for none."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_width: int
    norm_eps: float
    positions: int
    rope_theta: float
    stretch: float
    tied: bool


@dataclass(frozen=True)
class Tensor:
    """A tensor of the GGUF: its name there and in the model, its shape, and the heads of its rows (0: not q or k)."""

    name: str
    source: str
    shape: tuple[int, ...]
    heads: int

    def nbytes(self, precision: str) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count * (4 if len(self.shape) == 1 or precision == "f32" else 2)


@dataclass(frozen=True)
class GgufModel:
    """A model that can be written as GGUF: all that is known before a weight is read."""

    checkpoint: Checkpoint
    settings: LlamaSettings
    encoder: Encoder
    chat_template: str
    tensors: tuple[Tensor, ...]
    name: str

    @property
    def parameters(self) -> int:
        return sum(tensor.nbytes("f32") for tensor in self.tensors) // 4

    @property
    def own_precision(self) -> str:
        """The precision that holds this model's weights unchanged."""
        own = {info.dtype for info in self.checkpoint.tensors.values() if len(info.shape) > 1}
        return next((short for short, name in PRECISIONS.items() if own == {name}), "f32")

    def nbytes(self, precision: str) -> int:
        """Bytes of the file, all but exactly: the tensors, and the header."""
        return sum(_padded(tensor.nbytes(precision)) for tensor in self.tensors) + self.header_bytes

    @cached_property
    def header_bytes(self) -> int:
        """The header's length, the same for every precision: types and offsets are numbers of fixed width."""
        return len(self.header("f32"))

    def header(self, precision: str, tensors: bool = True) -> bytes:
        """Everything before the tensors' bytes. Without `tensors`: a file of its own, with the tokenizer alone."""
        return _header(self, precision, self.tensors if tensors else ())


def plan_gguf(model: Artifact, name: str) -> GgufModel:
    """Checks a model from its headers and small files. InputError for what llama.cpp's LLaMA cannot hold."""
    where = f"--model {model.root}"
    settings = _settings(model, where)
    encoder = load_encoder(model, "--model")
    checkpoint = Checkpoint(model)
    refuse_quantised(checkpoint, where)
    rows = checkpoint.info(EMBEDDING).shape[0]
    if rows < encoder.size:
        raise InputError(
            f"{where}: {TOKENIZER} has {encoder.size} pieces and the model {rows} rows; they do not belong together"
        )
    tensors = tuple(_tensors(checkpoint, settings, encoder.size, where))
    # a copy of the embedding may be in the file, and is left out
    tied = {HEAD} if settings.tied else set()
    unknown = sorted(set(checkpoint.tensors) - {tensor.source for tensor in tensors} - tied)
    if unknown:
        raise InputError(f"{where}: tensor {unknown[0]} is none of a LLaMA model; GGUF's LLaMA has no place for it")
    return GgufModel(checkpoint, settings, encoder, _chat_template(model), tensors, name)


def write_gguf(plan: GgufModel, precision: str, sink: Sink) -> None:
    """Writes the whole file. InputError for a weight that is not finite, or not in this precision."""
    sink.write(plan.header(precision))
    with Progress(f"writing {precision}", plan.nbytes(precision)) as bar:
        for tensor in plan.tensors:
            written = 0
            for rows in _rows(plan, tensor):
                content = _encoded(rows, tensor, precision, plan.checkpoint.artifact.root)
                sink.write(content)
                written += len(content)
                bar.advance(len(content))
            sink.write(b"\0" * (_padded(written) - written))


# --- the model --------------------------------------------------------------------------------------------------------


def _settings(model: Artifact, where: str) -> LlamaSettings:
    if "config.json" not in model:
        raise InputError(f"{where}: no config.json in it; a Hugging Face model folder is needed")
    try:
        given = read_object(model, "config.json")
        kind = given.get("model_type")
        if kind != "llama":
            raise InputError(f"{where}: a {kind} model; only LLaMA models are exported as GGUF")
        width, heads = int(given["hidden_size"]), int(given["num_attention_heads"])
        theta, stretch = _rope(given, where)
        settings = LlamaSettings(
            layers=int(given["num_hidden_layers"]),
            width=width,
            feed_forward=int(given["intermediate_size"]),
            heads=heads,
            kv_heads=int(given.get("num_key_value_heads") or heads),
            head_width=int(given.get("head_dim") or width // heads),
            norm_eps=float(given["rms_norm_eps"]),
            positions=int(given.get("max_position_embeddings", 2048)),
            rope_theta=theta,
            stretch=stretch,
            tied=bool(given.get("tie_word_embeddings")),
        )
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{where}: config.json is not a LLaMA model's ({error}); give another model") from error
    return settings


def _rope(given: Mapping[str, Any], where: str) -> tuple[float, float]:
    """(theta, linear stretch factor); transformers 5 keeps both in rope_parameters, older ones in two places."""
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear"):
        raise InputError(f"{where}: config.json stretches the rotary positions ({kind}), which is not exported as GGUF")
    theta = float(rope.get("rope_theta") or given.get("rope_theta") or ROPE_THETA)
    return theta, float(rope["factor"]) if kind == "linear" else 1.0


def _tensors(checkpoint: Checkpoint, settings: LlamaSettings, pieces: int, where: str) -> Iterator[Tensor]:
    """Every tensor in the order of the file, its shape checked against config.json."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, settings.layers)
    width, wide = settings.width, settings.feed_forward
    q, kv = settings.heads * settings.head_width, settings.kv_heads * settings.head_width
    expected = {
        "q_proj": (q, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (width, q),
        "gate_proj": (wide, width), "up_proj": (wide, width), "down_proj": (width, wide),
    }  # fmt: skip
    for place in places(settings.layers, settings.heads, settings.kv_heads):
        if place.hf == HEAD and (settings.tied or HEAD not in checkpoint.tensors):
            continue  # llama.cpp then takes the embedding
        module = place.hf.removesuffix(".weight")
        found = checkpoint.info(place.hf).shape
        if place.hf in (EMBEDDING, HEAD):
            wanted: tuple[int, ...] = (max(pieces, found[0]), width)
        else:
            wanted = expected.get(module.rpartition(".")[2], (width,))
        if found != wanted:
            raise InputError(
                f"{where}: {place.hf} is {found} where config.json and the tokenizer say {wanted}; publish or fetch "
                "the model again"
            )
        shape = (pieces, width) if place.hf in (EMBEDDING, HEAD) else found
        yield Tensor(f"{names.get_name(module)}.weight", place.hf, shape, place.heads)


def _chat_template(model: Artifact) -> str:
    """The model's own, else the training's: every model that this project trains is asked with that."""
    if "chat_template.jinja" in model:
        return model.read("chat_template.jinja").decode()
    if "tokenizer_config.json" in model:
        try:
            template = read_object(model, "tokenizer_config.json").get("chat_template")
        except (ValueError, AttributeError) as error:
            raise InputError(
                f"--model {model.root}: tokenizer_config.json is damaged ({error}); fetch it again"
            ) from error
        if isinstance(template, str):
            return template
    return CHAT_TEMPLATE


# --- the header -------------------------------------------------------------------------------------------------------


def _header(plan: GgufModel, precision: str, tensors: tuple[Tensor, ...]) -> bytes:
    import numpy as np
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType, size_label

    settings = plan.settings
    writer = GGUFWriter(None, "llama")
    writer.add_type("model")
    writer.add_name(plan.name)
    writer.add_size_label(size_label(plan.parameters, plan.parameters, 0, 0))
    writer.add_languages(["zh", "en"])
    writer.add_string("zhllama.model", plan.checkpoint.artifact.digest)
    writer.add_file_type(LlamaFileType[_FILE_TYPES[precision]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(settings.layers)
    writer.add_context_length(settings.positions)
    writer.add_embedding_length(settings.width)
    writer.add_feed_forward_length(settings.feed_forward)
    writer.add_head_count(settings.heads)
    writer.add_head_count_kv(settings.kv_heads)
    writer.add_key_length(settings.head_width)
    writer.add_value_length(settings.head_width)
    writer.add_layer_norm_rms_eps(settings.norm_eps)
    writer.add_rope_dimension_count(settings.head_width)
    writer.add_rope_freq_base(settings.rope_theta)
    if settings.stretch != 1.0:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(settings.stretch)
    writer.add_vocab_size(plan.encoder.size)
    add_tokenizer(writer, plan.encoder, plan.chat_template)
    kinds = {"f32": GGMLQuantizationType.F32, "f16": GGMLQuantizationType.F16, "bf16": GGMLQuantizationType.BF16}
    for tensor in tensors:
        kind = GGMLQuantizationType.F32 if len(tensor.shape) == 1 else kinds[precision]
        # the package looks at the dtype of bytes only (raw_dtype says what they are); uint8 would mean packed blocks
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.uint16), tensor.nbytes(precision), raw_dtype=kind)
    with tempfile.TemporaryDirectory(prefix="zhllama-") as folder:
        path = Path(folder, "header.gguf")
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        content = path.read_bytes()
    return content + b"\0" * (_padded(len(content)) - len(content))


def add_tokenizer(writer: Any, encoder: Encoder, chat_template: str) -> None:
    """SentencePiece's pieces as they are: GGUF's token types are SentencePiece's numbers."""
    proto = parse_model(encoder.model)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece.encode() for piece in proto.pieces])
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_types([piece.type for piece in proto.pieces])
    writer.add_bos_token_id(encoder.bos)
    writer.add_eos_token_id(encoder.eos)
    writer.add_unk_token_id(proto.trainer_spec.unk_id)
    if encoder.pad is not None:
        writer.add_pad_token_id(encoder.pad)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(proto.normalizer_spec.remove_extra_whitespaces)
    writer.add_chat_template(chat_template)


def _padded(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


# --- the tensors ------------------------------------------------------------------------------------------------------


def _rows(plan: GgufModel, tensor: Tensor) -> Iterator["torch.Tensor"]:
    """A tensor by rows, whole heads at a time where rows are permuted within a head."""
    rows = tensor.shape[0]
    head = rows // tensor.heads if tensor.heads else 1
    row_bytes = plan.checkpoint.info(tensor.source).length // plan.checkpoint.info(tensor.source).shape[0]
    step = max(1, CHUNK // (row_bytes * head)) * head
    for first in range(0, rows, step):
        part = plan.checkpoint.read_rows(tensor.source, first, min(step, rows - first))
        yield unpermute(part, part.shape[0] // head) if tensor.heads else part


def _encoded(rows: "torch.Tensor", tensor: Tensor, precision: str, root: str) -> memoryview:
    import torch

    kind = torch.float32 if len(tensor.shape) == 1 else getattr(torch, PRECISIONS[precision])
    made = rows.to(kind).contiguous()
    if not torch.isfinite(made).all():
        mend = f"{precision} cannot hold it: give --quantization bf16"
        if not torch.isfinite(rows).all():
            mend = "it holds NaN or infinity: train or fetch the model again"
        raise InputError(f"--model {root}: {tensor.source} is not finite in the GGUF; {mend}")
    flat: memoryview = made.reshape(-1).view(torch.uint8).numpy().data
    return flat
