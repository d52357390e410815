"""Hugging Face safetensors → GGUF, as a stream: each tensor is read by rows, put into llama.cpp's order, and written.

The tensors follow the header straight into the store. Memory: 64 MB of rows and the header. llama.cpp wants rows of q
and k in Meta's order, one-dimensional tensors in float32, no rows that only pad, and SentencePiece's pieces, scores and
types as they are: it merges by score and from the left, so ties give the same ids.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.export_model.llama import Llama, open_llama
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.progress import Progress
from zhllama.storage.private import temporary_folder
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import parse_model
from zhllama.weights.chat_template import Template, chosen, without_markers
from zhllama.weights.meta_format import EMBEDDING, HEAD, unpermute
from zhllama.weights.model_card import Origin, origin_of
from zhllama.weights.rope import DEFAULT
from zhllama.weights.safetensors_io import Sink
from zhllama.weights.settings import ids_of

if TYPE_CHECKING:
    import torch

CHUNK = 64 * 2**20
"""Bytes of a tensor that are in memory at once."""
PRECISIONS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""What a GGUF may hold unquantised → torch's name."""
_ALIGNMENT = 32
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None, "mscale": 0, "mscale_all_dim": 0}
"""Settings of yarn, and what they are in every engine where nothing is said."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the GGUF: its name there and in the model, its shape, and the heads of its rows (0: not q or k)."""

    name: str
    source: str
    shape: tuple[int, ...]
    heads: int

    def nbytes(self, precision: str) -> int:
        return math.prod(self.shape) * (4 if len(self.shape) == 1 or precision == "f32" else 2)


@dataclass(frozen=True)
class GgufModel:
    """A model that can be written as GGUF: all that is known before a weight is read."""

    llama: Llama
    tensors: tuple[Tensor, ...]
    name: str
    chat_template: Template
    origin: Origin
    further: tuple[int, ...] = ()
    """Ids that end an answer as EOS does."""

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def own_precision(self) -> str:
        """The precision that holds this model's weights unchanged."""
        own = {info.dtype for info in self.llama.checkpoint.tensors.values() if len(info.shape) > 1}
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
        import gguf
        import numpy as np

        llama, shape = self.llama, self.llama.params
        writer = gguf.GGUFWriter(None, "llama")
        writer.add_type("model")
        writer.add_name(self.name)
        writer.add_size_label(gguf.size_label(self.parameters, self.parameters, 0, 0))
        writer.add_languages(["zh", "en"])
        origin = self.origin
        for field in ("license", "license_name", "license_link"):
            if said := getattr(origin, field):
                getattr(writer, f"add_{field}")(said)
        if origin.base:
            owner, _, repository = origin.base.partition("/")
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, repository)
            writer.add_base_model_organization(0, owner)
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{origin.base}")
        writer.add_string("zhllama.model", llama.artifact.digest)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if precision == "f32" else f"MOSTLY_{precision.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, value in {
            "block_count": shape.n_layers, "context_length": llama.positions, "embedding_length": shape.dim,
            "feed_forward_length": llama.feed_forward, "head_count": shape.n_heads, "head_count_kv": shape.kv_heads,
            "key_length": llama.head_width, "value_length": llama.head_width, "layer_norm_rms_eps": shape.norm_eps,
            "rope_dimension_count": llama.head_width, "rope_freq_base": shape.rope_theta,
        }.items():  # fmt: skip
            getattr(writer, f"add_{name}")(value)
        if llama.rope.kind != DEFAULT:
            writer.add_rope_scaling_type(gguf.RopeScalingType(llama.rope.kind))
            writer.add_rope_scaling_factor(llama.rope.settings["factor"])
        if llama.rope.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(llama.rope.settings["original_max_position_embeddings"])
        writer.add_vocab_size(llama.encoder.size)
        add_tokenizer(writer, llama.encoder, self.chat_template)
        if self.further:
            # llama.cpp knows of one more end by its id, and of the usual ones by their text
            writer.add_eot_token_id(self.further[0])
        for tensor in self.tensors if tensors else ():
            kind = gguf.GGMLQuantizationType["F32" if len(tensor.shape) == 1 else precision.upper()]
            # raw_dtype says what the bytes are; of the dtype only uint8 is looked at, which would mean packed blocks
            given = tensor.name, tensor.shape, np.dtype(np.uint16), tensor.nbytes(precision)
            writer.add_tensor_info(*given, raw_dtype=kind)
        with temporary_folder() as folder:
            path = Path(folder, "header.gguf")
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            content = path.read_bytes()
        return content + b"\0" * (_padded(len(content)) - len(content))


def plan_gguf(model: Artifact, name: str) -> GgufModel:
    """Checks a model from its headers and small files. InputError for what llama.cpp's LLaMA cannot hold."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    llama = open_llama(model, "GGUF", ("default", "linear", "yarn"))
    params, rope = llama.params, llama.rope
    if odd := [name for name, value in rope.settings.items() if name in _YARN and value != _YARN[name]]:
        raise InputError(f"--model {model.root}: config.json sets {odd[0]} of its rope, which is not exported to GGUF")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, params.n_layers)
    pieces, width = llama.encoder.size, params.dim
    tensors = []
    for place in llama.places:
        if place.hf == HEAD and llama.tied:
            continue  # llama.cpp then takes the embedding
        module = place.hf.removesuffix(".weight")
        shape = (pieces, width) if place.hf in (EMBEDDING, HEAD) else llama.info(place).shape
        tensors.append(Tensor(f"{names.get_name(module)}.weight", place.hf, shape, place.heads))
    further = ids_of(llama.checkpoint, llama.encoder).further
    return GgufModel(llama, tuple(tensors), name, without_markers(chosen(model)[0]), origin_of(model), further)


def write_gguf(plan: GgufModel, precision: str, sink: Sink) -> None:
    """Writes the whole file. InputError for a weight that is not finite, or not in this precision."""
    sink.write(plan.header(precision))
    checkpoint = plan.llama.checkpoint
    with Progress(f"writing {precision}", plan.nbytes(precision)) as bar:
        for tensor in plan.tensors:
            info, count, written = checkpoint.info(tensor.source), tensor.shape[0], 0
            # whole heads at a time where rows are permuted within a head
            head = count // tensor.heads if tensor.heads else 1
            step = max(1, CHUNK // (info.length // info.shape[0] * head)) * head
            for first in range(0, count, step):
                rows = checkpoint.read(tensor.source, first, min(step, count - first))
                if tensor.heads:
                    rows = unpermute(rows, rows.shape[0] // head)
                content = _encoded(rows, tensor, precision, plan.llama.artifact.root)
                sink.write(content)
                written += len(content)
                bar.advance(len(content))
            sink.write(b"\0" * (_padded(written) - written))


def add_tokenizer(writer: Any, encoder: SentencePieceEncoder, chat_template: Template) -> None:
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
    if encoder.named_pad is not None:
        writer.add_pad_token_id(encoder.named_pad)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(proto.normalizer_spec.remove_extra_whitespaces)
    writer.add_chat_template(chat_template)


def _padded(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


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
