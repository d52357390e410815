"""A model that answers: loaded from its artifact, adapters merged in, with the encoder it was trained with.

evaluate, generate and serve ask in the ids of training: SentencePiece encodes, BOS and EOS are put in by id, a prompt
begins with BOS. What does not belong together is refused from headers, before a weight is read; for models that do not
fit into memory with their adapters there is merge_adapters. float32 on a CPU, bfloat16 (float16 on older cards) on a
GPU, there int8 and 4 bits on request.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from zhllama.artifacts.cache import materialize
from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.tokenizer.vocabulary import Encoder, Relation, Vocabulary, load_encoder
from zhllama.weights.fit import Step, contracts_of, require_fit, require_rows, rows_fit, trained_on
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.settings import ids_of

Precision = Literal["auto", "float32", "bfloat16", "float16", "int8", "4bit"]
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in evaluation mode, its encoder, and the number of positions it was made for."""

    model: Any
    encoder: Encoder
    positions: int
    """Of prompt and answer together: what the model was made for, or what it is stretched to."""
    rope_alpha: float | None = None
    """Of the rotary base; None: by the length of what is read and said, 1 up to the model's own positions."""
    further: tuple[int, ...] = ()
    """Ids that end an answer as EOS does."""

    @property
    def device(self) -> Any:
        return self.model.device

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return (self.encoder.eos, *self.further)

    @property
    def padding(self) -> int:
        """The id that fills a batch up: `[PAD]`, or EOS in a vocabulary without one. It is masked everywhere."""
        return self.encoder.eos if self.encoder.pad is None else self.encoder.pad

    def prompt_ids(self, text: str) -> list[int]:
        """BOS and the ids of a prompt, as training gives them."""
        return [self.encoder.bos, *self.encoder.encode(text)]


def load_model(
    artifact: Artifact,
    adapters: Sequence[Artifact] = (),
    option: str = "--model",
    precision: Precision = "auto",
    context_length: int = 0,
    rope_alpha: float | None = None,
) -> LoadedModel:
    """A model, with adapters merged in, in that order. context_length: tokens of prompt and answer together; 0: the
    model's own positions. InputError, before a weight is loaded, for what is no model, a damaged or missing shard, a
    tokenizer of another size, an adapter of another model, architecture or vocabulary, a precision that this machine
    has not."""
    artifact.require_kind("hf-model", option=option)
    encoder, _ = check_model(artifact, option)
    plan = plan_adapters(artifact, encoder, adapters)
    # read when torch is first imported: threads that wait by spinning take the cores from whatever else runs (measured
    # beside other work: 45 s of waiting for 9 s of arithmetic)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    gpu = torch.cuda.is_available()
    bfloat16 = gpu and torch.cuda.is_bf16_supported()
    bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    chosen = choose_precision(precision, gpu, bfloat16, bitsandbytes, bool(plan))
    options: dict[str, Any] = {"dtype": getattr(torch, chosen, None)}
    if chosen in ("int8", "4bit"):
        # a quantised model goes onto the GPU as it is read
        half = torch.bfloat16 if bfloat16 else torch.float16
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": half}
        quantised = BitsAndBytesConfig(**(four if chosen == "4bit" else {"load_in_8bit": True}))
        options = {"dtype": half, "device_map": {"": 0}, "quantization_config": quantised}
    loading: Any = AutoModelForCausalLM.from_pretrained  # its declared type leaves out the pair that it returns here
    model, seen = loading(materialize(artifact), **options, output_loading_info=True)
    missing = sorted(seen["missing_keys"])
    if missing:
        raise InputError(f"{option} {artifact.root}: the model has no tensor {missing[0]}; publish or fetch it again")
    for adapter in plan:
        from peft import PeftModel

        if adapter.rows is not None:
            # modules_to_save overwrite every row, so the new ones may begin anyhow; the default would take minutes
            model.resize_token_embeddings(adapter.rows, mean_resizing=False)
        model = PeftModel.from_pretrained(model, str(adapter.folder)).merge_and_unload()
        encoder = adapter.encoder
    if chosen not in ("int8", "4bit"):
        model = model.to("cuda" if gpu else "cpu")
    model = model.eval().requires_grad_(False)
    further = ids_of(Checkpoint(artifact, option), encoder).further
    positions = context_length or int(model.config.max_position_embeddings)
    return LoadedModel(model, encoder, positions, rope_alpha, further)


def choose_precision(wanted: Precision, gpu: bool, bfloat16: bool, bitsandbytes: bool, adapters: bool) -> Precision:
    """What `auto` is on this machine. InputError for a precision that it has not. bfloat16: whether the GPU has it.
    bitsandbytes: whether it is installed. adapters: whether some are to be merged."""
    if wanted == "auto":
        return ("bfloat16" if bfloat16 else "float16") if gpu else "float32"
    quantised = wanted in ("int8", "4bit")
    said = ""
    if not gpu and wanted != "float32":
        said = "there is no GPU here, and a processor runs float32 alone; leave it out, or export the model as GGUF, "
        said += "which llama.cpp runs quantised"
    elif wanted == "bfloat16" and not bfloat16:
        said = "this GPU has no bfloat16; give float16"
    elif quantised and not bitsandbytes:
        said = "the package bitsandbytes is not installed; pip install bitsandbytes"
    elif quantised and adapters:
        said = "adapters cannot be merged into quantised weights; use merge_adapters first"
    if said:
        raise InputError(f"--precision {wanted}: {said}")
    return wanted


# --- do they belong together: known from headers, before a weight is read ---------------------------------------------


def check_model(artifact: Artifact, option: str) -> tuple[Encoder, Vocabulary]:
    """The tokenizer of a model and its contract, after every shard's header was read. InputError when a shard is
    missing or damaged, or the embedding's rows are not the tokenizer's pieces."""
    encoder, vocabulary = open_encoder(artifact, option)
    if "config.json" not in artifact:
        raise InputError(f"{option} {artifact.root}: no config.json in it; a Hugging Face model folder is needed")
    rows = Checkpoint(artifact, option).info("model.embed_tokens.weight").shape[0]
    fit = rows_fit(encoder.size, rows, artifact.manifest.vocabulary)
    require_rows(encoder.size, rows, f"{option} {artifact.root}", "the embedding", fit)
    return encoder, vocabulary


def open_encoder(artifact: Artifact, option: str) -> tuple[Encoder, Vocabulary]:
    """The tokenizer of a model or adapter, and its contract; InputError when it is not the manifest's."""
    encoder = load_encoder(artifact, option)
    stated = artifact.manifest.vocabulary
    if stated is None:
        return encoder, encoder.vocabulary()
    found = encoder.vocabulary(also_at=(int(size) for size in stated.prefixes))
    if found.relation_to(stated) is not Relation.EQUAL:
        said = f"its tokenizer.model has {found}, its manifest says {stated}"
        raise InputError(f"{option} {artifact.root}: {said}; publish it again")
    return encoder, stated


class PlannedAdapter(NamedTuple):
    folder: Path
    encoder: Encoder
    rows: int | None
    """Rows of the embedding that this adapter brings, where they are more than the model has."""


def plan_adapters(model: Artifact, encoder: Encoder, adapters: Sequence[Artifact]) -> list[PlannedAdapter]:
    """The adapters in the order of merging. InputError for those that do not fit the model, or one another."""
    encoders: list[Encoder | None] = [encoder]
    found, brings_rows = [], []
    for adapter in adapters:
        adapter.require_kind("adapter", option="--adapters")
        where = f"--adapters {adapter.root}"
        if "adapter_config.json" not in adapter:
            raise InputError(f"{where}: no adapter_config.json in it; give a peft adapter folder")
        try:
            saved = read_object(adapter, "adapter_config.json").get("modules_to_save") or []
        except ValueError as error:
            raise InputError(f"{where}: adapter_config.json is damaged ({error}); fetch it again") from error
        rows, own = None, None
        if "tokenizer.model" in adapter:
            own, vocabulary = open_encoder(adapter, "--adapters")
            rows = vocabulary.rows if vocabulary.size > encoder.size else None
            encoder = own
        encoders.append(own)
        brings_rows.append("embed_tokens" in saved)
        found.append((adapter, encoder, rows))
    first, *others = contracts_of([model, *adapters], encoders)
    # what is without a manifest may be what a later adapter names: its digest is of whatever files lie there
    known, steps = model.verified, []
    for adapter, contract, brings in zip(adapters, others, brings_rows, strict=True):
        named = trained_on(adapter) if known else None
        steps.append(Step(adapter.root, adapter.digest, contract, brings, named))
        known = known and adapter.verified
    require_fit(model, first, steps)
    base = Checkpoint(model, "--model") if adapters else None
    for adapter in adapters:
        if base and ADAPTER in adapter:
            _check_fit(Checkpoint(adapter, "--adapters", single=ADAPTER), base, f"--adapters {adapter.root}")
    return [PlannedAdapter(materialize(adapter), encoder, rows) for adapter, encoder, rows in found]


def _check_fit(adapter: Checkpoint, base: Checkpoint, where: str) -> None:
    """InputError for an adapter of another architecture: a matrix whose weight the model has not, or in another shape.
    A pickle's shapes are peft's to hold against the model, when it loads it."""
    for name, info in adapter.tensors.items():
        stem, _, matrix = name.rpartition(".lora_")
        side = {"A.weight": 1, "B.weight": 0}.get(matrix)
        if side is None or len(info.shape) != 2:
            continue
        weight = f"{stem.removeprefix('base_model.model.')}.weight"
        if weight not in base.tensors:
            raise InputError(f"{where}: it changes {weight}, which the model has not; give an adapter for this model")
        shape = base.tensors[weight].shape
        # the embedding's rows may be more in the adapter; transposed layers are not LLaMA's
        if info.shape[side] != shape[side] and "embed_tokens" not in weight and "lm_head" not in weight:
            said = f"with {info.shape[side]} along axis {side}, the model's is {' × '.join(map(str, shape))}"
            raise InputError(f"{where}: it changes {weight} {said}; give an adapter for a model of this size")
