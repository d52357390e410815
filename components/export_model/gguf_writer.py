"""Hugging Face safetensors → GGUF, as a stream: each tensor is read by rows, put into llama.cpp's order, and written.

The tensors follow the header straight into the store. Memory: 64 MB of rows and the header. llama.cpp wants rows of q
and k in Meta's order, one-dimensional tensors in float32, no rows that only pad, and SentencePiece's pieces, scores and
types as they are: it merges by score and from the left, so ties give the same ids.
"""

import logging
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.export_model.model import Exported, open_model, require_rope
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.models.rope import DEFAULT
from zhllama.progress import Progress
from zhllama.storage.private import temporary_folder
from zhllama.tokenizer.encoder import Encoder
from zhllama.tokenizer.gguf_tokenizer import tokenizer_fields
from zhllama.weights.chat_template import Template, chosen, without_markers
from zhllama.weights.meta_format import unpermute
from zhllama.weights.model_card import Origin, origin_of
from zhllama.weights.safetensors_io import Sink
from zhllama.weights.settings import ids_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger("export")

CHUNK = 64 * 2**20
"""Bytes of a tensor that are in memory at once."""
PRECISIONS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""What a GGUF may hold unquantised → torch's name."""
_ALIGNMENT = 32
FACTORS = "rope_freqs.weight"
"""What rotary frequencies are divided by: so a GGUF says llama3's stretching."""
_BY_TENSOR = ("llama3",)
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None, "mscale": 0, "mscale_all_dim": 0}
"""Settings of yarn, and what they are in every engine where nothing is said."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the GGUF: its name there and in the model (none: FACTORS), its shape, and the heads whose rows change
    their order (0: none)."""

    name: str
    source: str
    shape: tuple[int, ...]
    heads: int

    def nbytes(self, precision: str) -> int:
        return math.prod(self.shape) * (4 if len(self.shape) == 1 or precision == "f32" else 2)


@dataclass(frozen=True)
class GgufModel:
    """A model that can be written as GGUF: all that is known before a weight is read."""

    model: Exported
    tensors: tuple[Tensor, ...]
    name: str
    chat_template: Template
    origin: Origin
    further: tuple[int, ...] = ()
    """Ids that end an answer as EOS does."""

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors if tensor.source)

    @property
    def positions(self) -> int:
        """Of prompt and answer together: no more than a window has, since llama.cpp keeps to none here."""
        kind, config = self.model.architecture, self.model.config
        return kind.window_of(config) or int(config["max_position_embeddings"])

    @property
    def own_precision(self) -> str:
        """The precision that holds this model's weights unchanged."""
        own = {info.dtype for info in self.model.checkpoint.tensors.values() if len(info.shape) > 1}
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

        model, config, rope = self.model, self.model.config, self.model.rope
        size = model.architecture.sizes(config)
        writer = gguf.GGUFWriter(None, model.architecture.gguf)
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
        writer.add_string("zhllama.model", model.artifact.digest)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if precision == "f32" else f"MOSTLY_{precision.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, value in {
            "block_count": config["num_hidden_layers"], "context_length": self.positions,
            "embedding_length": size["width"], "feed_forward_length": size["wide"], "head_count": size["heads"],
            "head_count_kv": size["key_heads"], "key_length": size["head"], "value_length": size["head"],
            "layer_norm_rms_eps": config.get("rms_norm_eps", 1e-6), "rope_dimension_count": size["head"],
            "rope_freq_base": rope.theta,
        }.items():  # fmt: skip
            getattr(writer, f"add_{name}")(value)
        if rope.kind not in (DEFAULT, *_BY_TENSOR):
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope.kind))
            writer.add_rope_scaling_factor(rope.settings["factor"])
        if rope.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope.settings["original_max_position_embeddings"])
        writer.add_vocab_size(model.encoder.size)
        add_tokenizer(writer, model.encoder, self.chat_template, model.where)
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
    """Checks a model from its headers and small files. InputError for what llama.cpp cannot hold."""
    exported = open_model(model)
    kind, rope, pieces = exported.architecture, exported.rope, exported.encoder.size
    require_rope(exported, "GGUF", kind.gguf_ropes)
    if odd := [name for name, value in rope.settings.items() if name in _YARN and value != _YARN[name]]:
        raise InputError(f"{exported.where}: config.json sets {odd[0]} of its rope, which is not exported to GGUF")
    if exported.architecture.window_of(exported.config):
        said = "%s: llama.cpp keeps to no sliding window; the GGUF says %s positions, as many as the window has"
        log.warning(said, exported.where, f"{exported.architecture.window_of(exported.config):,}")
    tensors = []
    if rope.kind in _BY_TENSOR:
        tensors.append(Tensor(FACTORS, "", (kind.sizes(exported.config)["head"] // 2,), 0))
    for place in kind.places(exported.config):
        if place.kind == "head" and exported.tied:
            continue  # llama.cpp then takes the embedding
        shape = (pieces, *place.shape[1:]) if place.kind in ("embedding", "head") else place.shape
        tensors.append(Tensor(place.gguf, place.hf, shape, place.heads))
    further = ids_of(exported.checkpoint, exported.encoder).further
    return GgufModel(exported, tuple(tensors), name, without_markers(chosen(model)[0]), origin_of(model), further)


def write_gguf(plan: GgufModel, precision: str, sink: Sink) -> None:
    """Writes the whole file. InputError for a weight that is not finite, or not in this precision."""
    import numpy as np

    sink.write(plan.header(precision))
    checkpoint = plan.model.checkpoint
    with Progress(f"writing {precision}", plan.nbytes(precision)) as bar:
        for tensor in plan.tensors:
            if not tensor.source:
                head = 2 * tensor.shape[0]
                factors = np.array(plan.model.rope.factors(head), np.float32).tobytes()
                sink.write(factors + b"\0" * (_padded(len(factors)) - len(factors)))
                continue
            info, count, written = checkpoint.info(tensor.source), tensor.shape[0], 0
            # whole heads at a time where rows are permuted within a head
            head = count // tensor.heads if tensor.heads else 1
            step = max(1, CHUNK // (info.length // info.shape[0] * head)) * head
            for first in range(0, count, step):
                rows = checkpoint.read(tensor.source, first, min(step, count - first))
                if tensor.heads:
                    rows = unpermute(rows, rows.shape[0] // head)
                content = _encoded(rows, tensor, precision, plan.model.artifact.root)
                sink.write(content)
                written += len(content)
                bar.advance(len(content))
            sink.write(b"\0" * (_padded(written) - written))


def add_tokenizer(writer: Any, encoder: Encoder, chat_template: Template | None, where: str) -> None:
    """Pieces, types, scores or merges, and special ids, as they are."""
    kinds = {bool: "bool", int: "uint32", str: "string", list: "array"}
    for name, value in tokenizer_fields(encoder, where).items():
        getattr(writer, f"add_{kinds[type(value)]}")(name, value)
    if chat_template:
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
