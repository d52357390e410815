"""A conversation in the terminal: prompt + answer + EOS, repeated, as the chat template has it.

Answers are shown as they come, in whole characters. When the conversation outgrows the model's positions the oldest
turns are left out. An empty line is ignored; Ctrl-C stops the answer, Ctrl-D ends.
"""

import itertools
import sys
from typing import TYPE_CHECKING

from zhllama.errors import InputError
from zhllama.stage.inputs import Inputs
from zhllama.tokenizer.prompt import wrap

if TYPE_CHECKING:
    from components.generate.options import Generate
    from zhllama.inference.load import LoadedModel

PROMPT = "» "


class Conversation:
    """The turns so far, as ids: each a prompt, its answer and EOS."""

    def __init__(self, loaded: "LoadedModel", with_prompt: bool, max_new_tokens: int) -> None:
        self._loaded = loaded
        self._with_prompt = with_prompt
        self._turns: list[list[int]] = []
        # an answer gets what it may need, but never more than half of what there is
        self._room = min(max_new_tokens, loaded.positions // 2)

    def __len__(self) -> int:
        return len(self._turns)

    def prompt(self, text: str) -> list[int]:
        """BOS, the turns that still fit, and what is asked now; turns that do not fit are forgotten.

        When `text` alone is longer than the model's positions allow, it is the result, which whoever answers refuses,
        and nothing is forgotten for it.
        """
        asked, bos = self._asked(text), self._loaded.encoder.bos
        if 1 + len(asked) >= self._loaded.positions:
            return [bos, *asked]
        while self._turns and 1 + sum(map(len, self._turns)) + len(asked) + self._room > self._loaded.positions:
            self._turns.pop(0)
        return [bos, *itertools.chain(*self._turns), *asked]

    def add(self, text: str, answer: list[int]) -> None:
        self._turns.append([*self._asked(text), *answer, self._loaded.encoder.eos])

    def _asked(self, text: str) -> list[int]:
        return self._loaded.encoder.encode(wrap(text) if self._with_prompt else text)


def chat(config: "Generate", inputs: Inputs) -> None:
    """Talks until the input ends. InputError where the model cannot be loaded."""
    loaded = config.load(inputs)

    import torch

    from zhllama.inference.generate import stream

    torch.manual_seed(config.seed)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401 - gives input() its line editing

        print("Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    # a terminal may hand over anything; what is no UTF-8 becomes a replacement character
    for file in (sys.stdin, sys.stdout):
        file.reconfigure(errors="replace")  # type: ignore[union-attr]
    conversation = Conversation(loaded, config.with_prompt, config.max_new_tokens)
    while True:
        try:
            text = input(PROMPT if at_terminal else "").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)")
            continue
        if not text:
            continue
        before = len(conversation)
        prompt = conversation.prompt(text)
        if len(conversation) < before:
            print("(the beginning of the conversation does not fit any more and is left out)", file=sys.stderr)
        try:
            answer = stream(loaded, prompt, config.sampling(), lambda piece: print(piece, end="", flush=True))
        except InputError as error:
            print(f"({error})", file=sys.stderr)
            continue
        print(flush=True)
        conversation.add(text, answer)
