"""A model that answers: loaded from its artifact, adapters merged in, with the encoder it was trained with.

evaluate, generate and serve ask in the ids of training: SentencePiece encodes, BOS and EOS are put in by id, a prompt
begins with BOS. Before a weight is loaded the tokenizer is held against the embedding's rows, every shard's header is
read, and each adapter's vocabulary must equal the one before it or extend it with rows of its own. Adapters are merged
by peft, in order, in memory; for models that do not fit there is merge_adapters. float32 on a CPU, bfloat16 (float16
on older cards) on a GPU, there int8 and 4 bits on request.

Longer than the model's positions it reads with a stretched rotary base (`stretched_base`), the same for a prompt and
all of its answer: a base that grew with the answer, as in the recipe's patch, would leave the cached keys at another.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zhllama.artifacts.cache import materialize
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.stage.options import split_references
from zhllama.tokenizer.vocabulary import Encoder, Relation, Vocabulary, load_encoder, rows_fit
from zhllama.weights.safetensors_io import Checkpoint

if TYPE_CHECKING:
    import torch

BATCH = 8
"""Prompts answered side by side."""

Precision = Literal["auto", "float32", "bfloat16", "float16", "int8", "4bit"]
ADAPTER = "adapter_model.safetensors"
STRETCH = 1.1
"""The recipe's coefficient of `auto`."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. The defaults are the recipe's."""

    do_sample: bool = True
    temperature: float = 0.2
    top_k: int = 40
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    max_new_tokens: int = 400
    seed: int = 42


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
    def device(self) -> "torch.device":
        device: torch.device = self.model.device
        return device

    @property
    def padding(self) -> int:
        """The id that fills a batch up: `[PAD]`, or EOS in a vocabulary without one. It is masked everywhere."""
        return self.encoder.eos if self.encoder.pad is None else self.encoder.pad

    def prompt_ids(self, text: str) -> list[int]:
        """BOS and the ids of a prompt, as training gives them."""
        return [self.encoder.bos, *self.encoder.encode(text)]


# --- loading ----------------------------------------------------------------------------------------------------------


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
    encoder, vocabulary = check_model(artifact, option)
    if isinstance(adapters, str):
        adapters = [open_artifact(one, "--adapters") for one in split_references(adapters)]
    plan = _adapter_plan(artifact, encoder, vocabulary, adapters)
    # read when torch is first imported: threads that wait by spinning take the cores from whatever else runs (measured
    # beside other work: 45 s of waiting for 9 s of arithmetic)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    gpu = torch.cuda.is_available()
    chosen = choose_precision(
        precision, gpu, gpu and torch.cuda.is_bf16_supported(), _installed("bitsandbytes"), bool(plan)
    )
    loading: Any = AutoModelForCausalLM.from_pretrained  # its declared type leaves out the pair that it returns here
    model, seen = loading(materialize(artifact), **_loading_options(chosen, gpu), output_loading_info=True)
    missing = sorted(seen["missing_keys"])
    if missing:
        raise InputError(f"{option} {artifact.root}: the model has no tensor {missing[0]}; publish or fetch it again")
    for adapter in plan:
        model = _merge(model, adapter)
        encoder = adapter.encoder
    if chosen not in ("int8", "4bit"):
        model = model.to("cuda" if gpu else "cpu")
    model = model.eval().requires_grad_(False)
    return LoadedModel(model, encoder, context_length or int(model.config.max_position_embeddings), rope_alpha)


def choose_precision(wanted: Precision, gpu: bool, bfloat16: bool, bitsandbytes: bool, adapters: bool) -> Precision:
    """What `auto` is on this machine. InputError for a precision that it has not.

    bfloat16: whether the GPU has it. bitsandbytes: whether it is installed. adapters: whether some are to be merged.
    """
    if wanted == "auto":
        return ("bfloat16" if bfloat16 else "float16") if gpu else "float32"
    where = f"--precision {wanted}"
    if wanted == "float32":
        return wanted
    if not gpu:
        raise InputError(
            f"{where}: there is no GPU here, and a processor runs float32 alone; leave it out, or export the model as "
            "GGUF, which llama.cpp runs quantised"
        )
    if wanted == "bfloat16" and not bfloat16:
        raise InputError(f"{where}: this GPU has no bfloat16; give float16")
    if wanted in ("int8", "4bit"):
        if not bitsandbytes:
            raise InputError(f"{where}: the package bitsandbytes is not installed; pip install bitsandbytes")
        if adapters:
            raise InputError(f"{where}: adapters cannot be merged into quantised weights; use merge_adapters first")
    return wanted


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _loading_options(precision: Precision, gpu: bool) -> dict[str, Any]:
    """from_pretrained's options; a quantised model goes onto the GPU as it is read."""
    import torch
    from transformers import BitsAndBytesConfig

    half = torch.bfloat16 if gpu and torch.cuda.is_bf16_supported() else torch.float16
    if precision == "int8":
        return {"dtype": half, "device_map": {"": 0}, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if precision == "4bit":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=half)
        return {"dtype": half, "device_map": {"": 0}, "quantization_config": config}
    return {"dtype": getattr(torch, precision)}


def check_model(artifact: Artifact, option: str) -> tuple[Encoder, Vocabulary]:
    """The tokenizer of a model and its contract, after every shard's header was read.

    InputError when a shard is missing or damaged, or the embedding's rows are not the tokenizer's pieces.
    """
    encoder, vocabulary = open_encoder(artifact, option)
    if "config.json" not in artifact:
        raise InputError(f"{option} {artifact.root}: no config.json in it; a Hugging Face model folder is needed")
    rows = Checkpoint(artifact, option).info("model.embed_tokens.weight").shape[0]
    if not rows_fit(encoder.size, rows, artifact.manifest.vocabulary):
        raise InputError(
            f"{option} {artifact.root}: the embedding has {rows} rows and tokenizer.model {encoder.size} pieces; "
            "give the tokenizer that belongs to these weights"
        )
    return encoder, vocabulary


def open_encoder(artifact: Artifact, option: str) -> tuple[Encoder, Vocabulary]:
    """The tokenizer of a model or adapter, and its contract; InputError when it is not the manifest's."""
    encoder = load_encoder(artifact, option)
    stated = artifact.manifest.vocabulary
    if stated is None:
        return encoder, encoder.vocabulary()
    found = encoder.vocabulary(also_at=(int(size) for size in stated.prefixes))
    if found.relation_to(stated) is not Relation.EQUAL:
        raise InputError(
            f"{option} {artifact.root}: its tokenizer.model has {found}, its manifest says {stated}; publish it again"
        )
    return encoder, stated


@dataclass(frozen=True)
class _Adapter:
    folder: Path
    encoder: Encoder
    rows: int | None
    """Rows of the embedding that this adapter brings, where they are more than the model has."""


def _adapter_plan(
    artifact: Artifact, encoder: Encoder, vocabulary: Vocabulary, adapters: Sequence[Artifact]
) -> list[_Adapter]:
    plan: list[_Adapter] = []
    checkpoint = Checkpoint(artifact, "--model") if adapters else None
    for adapter in adapters:
        adapter.require_kind("adapter", option="--adapters")
        where = f"--adapters {adapter.root}"
        if "adapter_config.json" not in adapter:
            raise InputError(f"{where}: no adapter_config.json in it; give a peft adapter folder")
        base = adapter.manifest.facts.get("base_digest")
        if not plan and base is not None and artifact.verified and base != artifact.digest:
            raise InputError(
                f"{where}: it was trained on the model {base[:8]}, but --model is {artifact.digest[:8]}; give that "
                "model, and several adapters in the order they were trained in"
            )
        rows = None
        if "tokenizer.model" in adapter:
            own_encoder, own = open_encoder(adapter, "--adapters")
            relation = own.relation_to(vocabulary)
            if relation is Relation.FOREIGN:
                # a plain folder's contract records no digest at the size before it: take it there
                relation = own_encoder.vocabulary(also_at=(vocabulary.size,)).relation_to(vocabulary)
            saved = json.loads(adapter.read("adapter_config.json")).get("modules_to_save") or []
            if relation is Relation.EXTENDS and "embed_tokens" in saved:
                rows = own.rows
            elif relation is not Relation.EQUAL:
                raise InputError(
                    f"{where}: its vocabulary, {own}, and the one before it, {vocabulary}: {relation.value}; it must "
                    "be equal, or extend it and bring the embedding rows (are the adapters in the right order?)"
                )
            encoder, vocabulary = own_encoder, own
        _check_fit(adapter, checkpoint, where)
        plan.append(_Adapter(materialize(adapter), encoder, rows))
    return plan


def _check_fit(adapter: Artifact, base: Checkpoint | None, where: str) -> None:
    """InputError for an adapter of another architecture: a matrix whose weight the model has not, or in another shape.

    A pickle's shapes are peft's to hold against the model, when it loads it.
    """
    if base is None or ADAPTER not in adapter:
        return
    tensors = Checkpoint(adapter, "--adapters", single=ADAPTER).tensors
    for name, info in tensors.items():
        for matrix, side in ((".lora_A.weight", 1), (".lora_B.weight", 0)):
            if not name.endswith(matrix) or len(info.shape) != 2:
                continue
            weight = f"{name.removesuffix(matrix).removeprefix('base_model.model.')}.weight"
            if weight not in base.tensors:
                raise InputError(
                    f"{where}: it changes {weight}, which the model has not; give an adapter for this model"
                )
            shape = base.tensors[weight].shape
            # the embedding's rows may be more in the adapter; transposed layers are not LLaMA's
            if info.shape[side] != shape[side] and "embed_tokens" not in weight and "lm_head" not in weight:
                raise InputError(
                    f"{where}: it changes {weight} with {info.shape[side]} along axis {side}, the model's is "
                    f"{' × '.join(map(str, shape))}; give an adapter for a model of this size"
                )


def _merge(model: Any, adapter: _Adapter) -> Any:
    from peft import PeftModel

    if adapter.rows is not None:
        # modules_to_save overwrite every row: how the new ones begin does not matter, the default would take minutes
        model.resize_token_embeddings(adapter.rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, str(adapter.folder)).merge_and_unload()


# --- a longer context -------------------------------------------------------------------------------------------------


def rope_alpha_of(length: int, positions: int) -> float:
    """The recipe's `auto`: (length/1024 − 1)·1.1 beyond 2048 tokens, else 1; 1024 being half of LLaMA's positions."""
    return 1.0 if length <= positions else (length / (positions / 2) - 1) * STRETCH


def stretched_base(base: float, alpha: float, head_dim: int) -> float:
    """The rotary base base·α^(d/(d−2)): the slowest frequency falls by α, the fastest stays (NTK-aware stretching)."""
    return float(base * alpha ** (head_dim / (head_dim - 2)))


def stretch(loaded: LoadedModel, length: int) -> None:
    """Makes the model read and say `length` tokens: its rotary base for that length, or for the given alpha."""
    import torch

    config = loaded.model.config
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    alpha = loaded.rope_alpha or rope_alpha_of(length, int(config.max_position_embeddings))
    base = stretched_base(float(config.rope_parameters["rope_theta"]), alpha, dim)
    rotary = loaded.model.model.rotary_emb
    inverse = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    rotary.inv_freq.copy_(inverse.to(rotary.inv_freq.device))


# --- answering --------------------------------------------------------------------------------------------------------


def room_for(loaded: LoadedModel, ids: Sequence[int], sampling: Sampling) -> int:
    """How many tokens the answer to a prompt may have; InputError when the prompt fills the context."""
    room = loaded.positions - len(ids)
    if room < 1:
        raise InputError(
            f"the prompt has {len(ids)} tokens and the model {loaded.positions} positions; shorten the prompt"
        )
    return min(room, sampling.max_new_tokens)


def answer(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    done: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """The ids of an answer to each prompt (ids that begin with BOS), without EOS; in order.

    Prompts of like length are answered together, padded on the left; one that goes beyond the model's own positions
    alone, since its length decides its rotary base. `done(n)` is called after n more answers. InputError for a prompt
    that fills the context.
    """
    import torch

    torch.manual_seed(sampling.seed)
    own = int(loaded.model.config.max_position_embeddings)
    rooms = [room_for(loaded, ids, sampling) for ids in prompts]
    lengths = [len(ids) + room for ids, room in zip(prompts, rooms, strict=True)]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    together = [index for index in order if lengths[index] <= own or loaded.rope_alpha]
    batches = [together[start : start + BATCH] for start in range(0, len(together), BATCH)]
    batches += [[index] for index in order if index not in set(together)]
    answers: list[list[int]] = [[] for _ in prompts]
    for batch in batches:
        stretch(loaded, max(lengths[index] for index in batch))
        width = max(len(prompts[index]) for index in batch)
        ids = torch.full((len(batch), width), loaded.padding)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        # (batch, width + new): as many as the row with most room may have, and each row cut at its own
        made = _generate(loaded, ids, mask, sampling, max(rooms[index] for index in batch))
        for row, index in enumerate(batch):
            answers[index] = until_eos(made[row, width : width + rooms[index]].tolist(), loaded.encoder.eos)
        done(len(batch))
    return answers


def until_eos(ids: Sequence[int], eos: int) -> list[int]:
    """The ids before the first EOS (all of them without one)."""
    return list(ids[: ids.index(eos)]) if eos in ids else list(ids)


def stream(loaded: LoadedModel, prompt: Sequence[int], sampling: Sampling, write: Callable[[str], None]) -> list[int]:
    """Answers one prompt, passing the text on as it comes, and returns the answer's ids (without EOS).

    KeyboardInterrupt (Ctrl-C) stops the answer: the ids so far are returned. InputError for a prompt that fills the
    context.
    """
    import torch

    ids = torch.tensor([list(prompt)])
    text = TextStream(loaded.encoder, write)
    room = room_for(loaded, prompt, sampling)
    stretch(loaded, len(prompt) + room)
    try:
        _generate(loaded, ids, torch.ones_like(ids), sampling, room, _Streamer(text))
    except KeyboardInterrupt:
        text.end()
    return until_eos(text.ids, loaded.encoder.eos)


def _generate(
    loaded: LoadedModel, ids: "torch.Tensor", mask: "torch.Tensor", sampling: Sampling, room: int, streamer: Any = None
) -> "torch.Tensor":
    import torch
    from transformers import GenerationConfig

    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.do_sample:
        drawn = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    # rows that only pad the embedding are no pieces
    beyond = list(range(loaded.encoder.size, loaded.model.get_output_embeddings().weight.shape[0]))
    settings = GenerationConfig(
        **drawn,
        num_beams=1,
        suppress_tokens=beyond or None,
        repetition_penalty=sampling.repetition_penalty,
        max_new_tokens=room,
        bos_token_id=loaded.encoder.bos,
        eos_token_id=loaded.encoder.eos,
        pad_token_id=loaded.padding,
    )
    # the model's own generation settings would fill what is unset here
    loaded.model.generation_config = settings
    with torch.inference_mode():
        made: torch.Tensor = loaded.model.generate(
            ids.to(loaded.device),
            attention_mask=mask.to(loaded.device),
            generation_config=settings,
            streamer=streamer,
        )
    return made


class TextStream:
    """Text out of ids, one id at a time, never half a character.

    A character may be spread over several byte pieces: the decoded text then ends in replacement characters, which are
    held back until the rest has come, or the end.
    """

    def __init__(self, encoder: Encoder, write: Callable[[str], None]) -> None:
        self.ids: list[int] = []
        self._encoder = encoder
        self._write = write
        self._written = ""

    def add(self, index: int) -> None:
        self.ids.append(index)
        self._pass_on(self._encoder.decode(self.ids).rstrip("\ufffd"))

    def end(self) -> None:
        self._pass_on(self._encoder.decode(self.ids))

    def _pass_on(self, text: str) -> None:
        if len(text) > len(self._written):
            self._write(text[len(self._written) :])
            self._written = text


class _Streamer:
    """What transformers' generate calls: `put` with the prompt first, then with each new id; `end` after the last."""

    def __init__(self, text: TextStream) -> None:
        self._text = text
        self._prompt = True

    def put(self, value: "torch.Tensor") -> None:
        if self._prompt:
            self._prompt = False
            return
        for index in value.reshape(-1).tolist():
            self._text.add(index)

    def end(self) -> None:
        self._text.end()
