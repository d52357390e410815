"""A model that answers: loaded from its artifact, adapters merged in, with the encoder it was trained with.

evaluate, generate and serve ask in the ids of training: SentencePiece encodes, BOS and EOS are put in by id, a prompt
begins with BOS. What does not belong together is refused before a weight is loaded (check.py); for models
that do not fit into memory with their adapters there is merge_adapters. float32 on a CPU, bfloat16 (float16 on older
cards) on a GPU, there int8 and 4 bits on request.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from zhllama.artifacts.cache import materialize
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.inference.check import check_model, plan_adapters
from zhllama.stage.options import split_references
from zhllama.tokenizer.vocabulary import Encoder

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

    @property
    def device(self) -> Any:
        return self.model.device

    @property
    def padding(self) -> int:
        """The id that fills a batch up: `[PAD]`, or EOS in a vocabulary without one. It is masked everywhere."""
        return self.encoder.eos if self.encoder.pad is None else self.encoder.pad

    def prompt_ids(self, text: str) -> list[int]:
        """BOS and the ids of a prompt, as training gives them."""
        return [self.encoder.bos, *self.encoder.encode(text)]


def load_model(
    reference: str | Artifact,
    adapters: str | Sequence[Artifact] = "",
    option: str = "--model",
    precision: Precision = "auto",
    context_length: int = 0,
    rope_alpha: float | None = None,
) -> LoadedModel:
    """A model, with adapters merged in, in that order; either may be given by reference.

    context_length: tokens of prompt and answer together; 0: the model's own positions. InputError, before a weight is
    loaded, for what is no model, a damaged or missing shard, a tokenizer of another size, an adapter of another model,
    architecture or vocabulary, a precision that this machine has not.
    """
    artifact = open_artifact(reference, option) if isinstance(reference, str) else reference
    artifact.require_kind("hf-model", option=option)
    encoder, _ = check_model(artifact, option)
    if isinstance(adapters, str):
        adapters = [open_artifact(one, "--adapters") for one in split_references(adapters)]
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
    return LoadedModel(model, encoder, context_length or int(model.config.max_position_embeddings), rope_alpha)


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
