"""The ids of a conversation as a model's own chat template has it: what every engine makes of the rendered text.

The training's template (zhllama/tokenizer/prompt.py) has a way of its own; another is rendered as transformers does it,
cut at the special pieces that stand in the text, and what lies between two is encoded by SentencePiece on its own.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from zhllama.errors import InputError
from zhllama.tokenizer.prompt import CHAT_TEMPLATE, chat_ids
from zhllama.tokenizer.sentencepiece_model import CONTROL, UNKNOWN, parse_model
from zhllama.tokenizer.vocabulary import Encoder


class Chat:
    """Conversations → ids, by a template."""

    def __init__(self, encoder: Encoder, template: str = CHAT_TEMPLATE) -> None:
        self._encoder, self._template = encoder, template

    def ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ending where an answer has to begin. InputError for a conversation that the template refuses."""
        if self._template == CHAT_TEMPLATE:
            return chat_ids(self._encoder, messages)
        ids: list[int] = []
        for part in self._cut.split(self.text(messages)):
            special = self._special.get(part)
            ids += self._encoder.encode(part) if special is None else [special]
        return ids

    def text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as the template writes it, BOS and EOS among it. InputError as of `ids`."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        names: Any = self._names
        try:
            (text,), _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self._template,
                add_generation_prompt=True,
                **names,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            said = " ".join(str(error).split())[:200]
            raise InputError(f"the model's chat template refuses this conversation: {said}") from error
        return str(text)

    @cached_property
    def _special(self) -> dict[str, int]:
        encoder, proto = self._encoder, parse_model(self._encoder.model)
        named = {encoder.bos, encoder.eos, encoder.pad}
        return {
            piece.piece: index
            for index, piece in enumerate(proto.pieces)
            if piece.type in (CONTROL, UNKNOWN) or index in named
        }

    @cached_property
    def _cut(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) + ")")

    @cached_property
    def _names(self) -> dict[str, str]:
        """What a template calls them."""
        encoder = self._encoder
        ids = {"bos": encoder.bos, "eos": encoder.eos, "pad": encoder.pad}
        ids["unk"] = parse_model(encoder.model).trainer_spec.unk_id
        return {f"{name}_token": encoder.pieces[index] for name, index in ids.items() if index is not None}
