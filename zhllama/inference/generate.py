"""Answers to prompts of ids: in batches of like length, or one as a stream of text.

A longer context than the model's positions is a stretched rotary base, the same for a prompt and all of its answer: a
base that grew with the answer, as in the recipe's patch, would leave the cached keys at another.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from zhllama.errors import InputError
from zhllama.inference.load import LoadedModel
from zhllama.inference.sampling import Sampling
from zhllama.tokenizer.vocabulary import Encoder

if TYPE_CHECKING:
    import torch

BATCH = 8
"""Prompts answered side by side."""
STRETCH = 1.1
"""The recipe's coefficient of `auto`."""


def _room(loaded: LoadedModel, ids: Sequence[int], sampling: Sampling) -> int:
    """How many tokens the answer to a prompt may have."""
    if len(ids) >= loaded.positions:
        said = f"the prompt has {len(ids)} tokens and the model {loaded.positions} positions"
        raise InputError(f"{said}; shorten the prompt")
    return min(loaded.positions - len(ids), sampling.max_new_tokens)


def answer(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    done: Callable[[int], None] = lambda count: None,
    at_once: int = BATCH,
) -> list[list[int]]:
    """The ids of an answer to each prompt (ids that begin with BOS), without EOS; in order. Prompts of like length are
    answered together, padded on the left; one that goes beyond the model's own positions alone, since its length
    decides its rotary base. `done(n)` is called after n more answers. at_once: how many side by side.
    InputError for a prompt that fills the context."""
    import torch

    torch.manual_seed(sampling.seed)
    own = int(loaded.model.config.max_position_embeddings)
    rooms = [_room(loaded, ids, sampling) for ids in prompts]
    lengths = [len(ids) + room for ids, room in zip(prompts, rooms, strict=True)]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    together = [index for index in order if lengths[index] <= own or loaded.rope_alpha]
    batches = [together[start : start + at_once] for start in range(0, len(together), at_once)]
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
            answers[index] = _until_end(made[row, width : width + rooms[index]].tolist(), loaded.stops)
        done(len(batch))
    return answers


def _until_end(ids: list[int], stops: Sequence[int]) -> list[int]:
    return list(takewhile(lambda index: index not in stops, ids))


def stream(loaded: LoadedModel, prompt: Sequence[int], sampling: Sampling, write: Callable[[str], None]) -> list[int]:
    """Answers one prompt, passing the text on as it comes, and returns the answer's ids (without EOS).
    KeyboardInterrupt (Ctrl-C) stops the answer: the ids so far are returned. InputError for a prompt that fills the
    context."""
    import torch

    ids = torch.tensor([list(prompt)])
    text = TextStream(loaded.encoder, write)
    room = _room(loaded, prompt, sampling)
    stretch(loaded, len(prompt) + room)
    try:
        _generate(loaded, ids, torch.ones_like(ids), sampling, room, text)
    except KeyboardInterrupt:
        text.end()
    return _until_end(text.ids, loaded.stops)


def _generate(
    loaded: LoadedModel, ids: "torch.Tensor", mask: "torch.Tensor", sampling: Sampling, room: int, streamer: Any = None
) -> "torch.Tensor":
    import torch
    from transformers import GenerationConfig

    drawn = ("temperature", "top_k", "top_p") if sampling.do_sample else ()
    # rows that only pad the embedding are no pieces
    beyond = list(range(loaded.encoder.size, loaded.model.get_output_embeddings().weight.shape[0]))
    settings = GenerationConfig(
        do_sample=sampling.do_sample,
        **{name: getattr(sampling, name) for name in drawn},
        num_beams=1,
        suppress_tokens=beyond or None,
        repetition_penalty=sampling.repetition_penalty,
        max_new_tokens=room,
        bos_token_id=loaded.encoder.bos,
        eos_token_id=list(loaded.stops),
        pad_token_id=loaded.padding,
    )
    # the model's own generation settings would fill what is unset here
    loaded.model.generation_config = settings
    device = loaded.device
    with torch.inference_mode():
        return loaded.model.generate(
            ids.to(device), attention_mask=mask.to(device), generation_config=settings, streamer=streamer
        )


class TextStream:
    """Text out of ids, never half a character, for transformers' generate, which calls `put` with the prompt first. A
    character may be spread over several byte pieces: the decoded text then ends in replacement characters, which are
    held back until the rest has come, or the end."""

    def __init__(self, encoder: Encoder, write: Callable[[str], None]) -> None:
        self.ids: list[int] = []
        self._encoder, self._write = encoder, write
        self._written, self._prompt = "", True

    def put(self, value: "torch.Tensor") -> None:
        if not self._prompt:
            self.ids += value.reshape(-1).tolist()
            self._pass_on(self._encoder.decode(self.ids).rstrip("\ufffd"))
        self._prompt = False

    def end(self) -> None:
        self._pass_on(self._encoder.decode(self.ids))

    def _pass_on(self, text: str) -> None:
        if len(text) > len(self._written):
            self._write(text[len(self._written) :])
            self._written = text


def stretch(loaded: LoadedModel, length: int) -> None:
    """Makes the model read and say `length` tokens, by its rotary base: base·α^(d/(d−2)), so that the slowest frequency
    falls by α and the fastest stays (NTK-aware stretching). α is the model's `rope_alpha`, or the recipe's `auto`:
    (length/1024 − 1)·1.1 beyond 2048 tokens, else 1; 1024 being half of LLaMA's positions. What config.json says of the
    positions holds besides; a model that stretches itself (`dynamic`) is left to that."""
    config, rotary = loaded.model.config, loaded.model.model.rotary_emb
    own = int(config.max_position_embeddings)
    alpha = loaded.rope_alpha or (1.0 if length <= own else (length / (own / 2) - 1) * STRETCH)
    inverse = rotary.original_inv_freq
    if rotary.rope_type == "dynamic":
        # transformers stretches it as it grows, and begins anew here
        rotary.max_seq_len_cached = rotary.original_max_seq_len
    elif alpha != 1:
        stretched = copy.deepcopy(config)
        dim = 2 * len(inverse)
        stretched.rope_parameters["rope_theta"] *= alpha ** (dim / (dim - 2))
        inverse = type(rotary)(stretched).inv_freq
    rotary.inv_freq = inverse.to(loaded.device, copy=True)
