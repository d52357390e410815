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
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.models.architecture import EMBEDDING
from zhllama.models.rope import Rope
from zhllama.storage.private import temporary_folder
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.prompt import RECIPE
from zhllama.tokenizer.vocabulary import Encoder, Relation, Vocabulary, contract_of, has_tokenizer, load_encoder
from zhllama.weights.chat_template import chosen, default_of
from zhllama.weights.fit import require_rows, rows_fit
from zhllama.weights.merge_plan import nothing_changed, plan_merge
from zhllama.weights.model_config import model_config
from zhllama.weights.model_folder import lay_out
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.settings import ids_of
from zhllama.weights.ties import is_tied

Precision = Literal["auto", "float32", "bfloat16", "float16", "int8", "4bit"]


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
    template: str = RECIPE.template
    """The chat template that it is asked with."""

    @cached_property
    def chat(self) -> Chat:
        return Chat(self.encoder, self.template)

    @property
    def device(self) -> Any:
        return self.model.device

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return tuple(dict.fromkeys((self.encoder.eos, *self.further, self.chat.end)))

    @property
    def padding(self) -> int:
        """The id that fills a batch up: `[PAD]`, or EOS in a vocabulary without one. It is masked everywhere."""
        return self.encoder.eos if self.encoder.pad is None else self.encoder.pad

    def prompt_ids(self, text: str) -> list[int]:
        """BOS and the ids of a prompt, as training gives them; of an empty one what any text may follow."""
        return [*self.encoder.begin, *self.encoder.encode(text)] or self.encoder.context


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
    checkpoint = Checkpoint(artifact, option)
    checkpoint.refuse_quantised()
    if rope_alpha and Rope.of(model_config(checkpoint), option).kind == "dynamic":
        said = "stretches the rotary positions by itself (dynamic)"
        raise InputError(f"--rope-alpha: {option} {artifact.root} {said}; leave --rope-alpha out")
    # read when torch is first imported: threads that wait by spinning take the cores from whatever else runs (measured
    # beside other work: 45 s of waiting for 9 s of arithmetic)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    names = [one.root for one in adapters]
    # the plan changes which tensors its checkpoint has
    plan = plan_merge(artifact, Checkpoint(artifact, option), adapters, names) if adapters else None
    template = template_of(artifact, adapters)

    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    gpu = torch.cuda.is_available()
    bfloat16 = gpu and torch.cuda.is_bf16_supported()
    bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    chosen = choose_precision(precision, gpu, bfloat16, bitsandbytes, bool(adapters))
    options: dict[str, Any] = {"dtype": getattr(torch, chosen, None)}
    if chosen in ("int8", "4bit"):
        # a quantised model goes onto the GPU as it is read
        half = torch.bfloat16 if bfloat16 else torch.float16
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": half}
        quantised = BitsAndBytesConfig(**(four if chosen == "4bit" else {"load_in_8bit": True}))
        options = {"dtype": half, "device_map": {"": 0}, "quantization_config": quantised}
    loading: Any = AutoModelForCausalLM.from_pretrained  # its declared type leaves out the pair that it returns here
    with temporary_folder() as folder:
        model, seen = loading(lay_out(checkpoint, Path(folder)), **options, output_loading_info=True)
    if is_tied(checkpoint):
        model.tie_weights()
    missing = sorted(seen["missing_keys"])
    if missing:
        raise InputError(f"{option} {artifact.root}: the model has no tensor {missing[0]}; publish or fetch it again")
    if plan is not None:
        from zhllama.inference.adapters import merge_into

        changed = [merge_into(model, step.adapter, step.rows, plan.tied) for step in plan.steps]
        if not any(changed):
            raise nothing_changed(names, artifact)
        encoder = plan.encoder or encoder
    if chosen not in ("int8", "4bit"):
        model = model.to("cuda" if gpu else "cpu")
    model = model.eval().requires_grad_(False)
    further = ids_of(checkpoint, encoder).further
    positions = context_length or int(model.config.max_position_embeddings)
    return LoadedModel(model, encoder, positions, rope_alpha, further, template)


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


def template_of(model: Artifact, adapters: Sequence[Artifact] = ()) -> str:
    """The chat template that a model is asked with; the recipe's for one that has none."""
    return default_of(chosen(model, adapters)[0]) or RECIPE.template


def chat_of(model: Artifact, adapters: Sequence[Artifact] = ()) -> Chat:
    """How a model is asked, before it is loaded."""
    carrier = next((one for one in reversed(adapters) if has_tokenizer(one)), model)
    option = "--model" if carrier is model else "--adapters"
    return Chat(load_encoder(carrier, option), template_of(model, adapters))


# --- do they belong together: known from headers, before a weight is read ---------------------------------------------


def check_model(artifact: Artifact, option: str) -> tuple[Encoder, Vocabulary]:
    """The tokenizer of a model and its contract, after every shard's header was read. InputError when a shard is
    missing or damaged, the embedding's rows are not the tokenizer's pieces, or config.json not of these tensors."""
    encoder, vocabulary = open_encoder(artifact, option)
    checkpoint = Checkpoint(artifact, option)
    rows = checkpoint.info(EMBEDDING).shape[0]
    fit = rows_fit(encoder.size, rows, artifact.manifest.vocabulary)
    require_rows(encoder.size, rows, f"{option} {artifact.root}", "the embedding", fit)
    model_config(checkpoint)
    return encoder, vocabulary


def open_encoder(artifact: Artifact, option: str) -> tuple[Encoder, Vocabulary]:
    """The tokenizer of a model or adapter, and its contract; InputError when it is not the manifest's."""
    encoder = load_encoder(artifact, option)
    stated = contract_of(artifact, encoder)
    found = encoder.vocabulary(also_at=(int(size) for size in stated.prefixes))
    if found.relation_to(stated) is not Relation.EQUAL:
        said = f"its tokenizer has {found}, its manifest says {stated}"
        raise InputError(f"{option} {artifact.root}: {said}; publish it again")
    return encoder, stated
