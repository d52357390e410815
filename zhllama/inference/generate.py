"""Answers to prompts of ids: in batches of like length, or one as a stream of text."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from zhllama.errors import InputError
from zhllama.inference.load import LoadedModel
from zhllama.inference.rope import stretch
from zhllama.inference.sampling import Sampling
from zhllama.tokenizer.vocabulary import Encoder

if TYPE_CHECKING:
    import torch

BATCH = 8
"""Prompts answered side by side."""


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
