"""The ids of a conversation as a model's own chat template has it, and of text as serving engines read it.

A conversation is rendered as transformers does it and cut at the special pieces that stand in the text; what lies
between two is encoded on its own. Engines read a special token in what a user says as that token;
training, generate and evaluate (`trained`) read it as text. A template of somebody else's is rendered in a process of
its own (zhllama/tokenizer/rendering.py).
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property
from itertools import islice

from zhllama.errors import InputError
from zhllama.tokenizer import rendering
from zhllama.tokenizer.encoder import Encoder
from zhllama.tokenizer.prompt import AS_IS, BY_TEMPLATE, RECIPE

Message = Mapping[str, str]
"""{"role", "content"}."""
_PRIVATE = range(0xE000, 0xF900)
"""Characters that mean nothing by themselves."""


def asked(text: str) -> list[dict[str, str]]:
    """The conversation that is one question."""
    return [{"role": "user", "content": text}]


def _conversation(question: str | Sequence[Message]) -> Sequence[Message]:
    return asked(question) if isinstance(question, str) else question


class Chat:
    """Conversations → ids, by a template; and text → ids → text, as engines have them."""

    def __init__(self, encoder: Encoder, template: str = RECIPE.template) -> None:
        self.encoder = encoder
        self._template = template
        self._prompt = BY_TEMPLATE.get(template)
        self._apart = self._prompt is RECIPE or template == AS_IS
        """Whether training encodes answers on their own."""

    def ids(self, question: str | Sequence[Message], trained: bool = False) -> list[int]:
        """Of a question, or of a conversation, ending where an answer has to begin. InputError for what the template
        refuses. `trained`: as training has them."""
        return self._encoded(self._parts(_conversation(question), trained), self.encoder.encode)

    def answered(self, question: str | Sequence[Message], answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """The ids of a question, or of a conversation that waits for an answer, and of each answer to it with what ends
        it, as training has them."""
        return self._answered(_conversation(question), answers, self.encoder.encode)

    def turns(self, messages: Sequence[Message]) -> Iterator[tuple[list[int], list[int]]]:
        """Of each answer in a conversation, in order: the ids of all that stands before it, as the model is asked for
        it, and its own with what ends it."""
        # what was said before is encoded once, not with each turn
        encode = cache(self.encoder.encode)
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                before, (said,) = self._answered(messages[:at], [message["content"]], encode)
                yield before, said

    def _answered(
        self, messages: Sequence[Message], answers: Sequence[str], encode: Callable[[str], list[int]]
    ) -> tuple[list[int], list[list[int]]]:
        parts = self._parts(messages, trained=True)
        before = "" if self._apart or isinstance(parts[-1], int) else parts[-1]
        head = encode(before)
        gap, end = self._around
        found = []
        for answer in answers:
            whole = encode(before + gap + answer)
            # otherwise a piece spans the two, and what is asked would not be what was learned
            whole = whole[len(head) :] if whole[: len(head)] == head else encode(gap + answer)
            found.append([*whole, end])
        return self._encoded(parts, encode), found

    def _encoded(self, parts: Sequence[int | str], encode: Callable[[str], list[int]]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else encode(part)
        return ids

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation as the template writes it, BOS and EOS among it. InputError as of `ids`."""
        try:
            ours = self._prompt is not None or self._template == AS_IS
            if text := (rendering.render if ours else _renderer)(self._template, messages, self._names(ours)):
                return text
            raise ValueError("it writes nothing")
        except ValueError as error:
            raise InputError(f"the model's chat template refuses this conversation: {error}") from error

    def read(self, question: str | Sequence[Message]) -> str:
        """What a model reads that is asked this, but for BOS."""
        return self.text(_conversation(question)).removeprefix(
            "".join(self.encoder.pieces[index] for index in self.encoder.begin)
        )

    def fitting(self, messages: Sequence[Message], positions: int, room: int) -> list[Message]:
        """The newest messages that leave `room` for an answer, but never more than half of the positions; a question
        and its answer go together. All of them where not even the last fits: nothing is forgotten for it."""
        kept, room = list(messages), min(room, positions // 2)
        if len(self.ids(kept[-1:], trained=True)) >= positions:
            return kept
        while len(kept) > 2 and len(self.ids(kept, trained=True)) + room > positions:
            kept = kept[2:]
        return kept

    @property
    def end(self) -> int:
        """What ends an answer."""
        return self._around[1]

    def encode(self, text: str) -> list[int]:
        """The ids of a text as engines read it: a special token in it is that token."""
        ids: list[int] = []
        for part in self._cut.split(text):
            special = self.encoder.special.get(part)
            ids += self.encoder.encode(part) if special is None else [special]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids as engines write it, special tokens among it. InputError for one that is no piece."""
        if wrong := [index for index in ids if not 0 <= index < self.encoder.size]:
            raise InputError(f"{wrong[0]} is no id: there are {self.encoder.size} pieces")
        return self.encoder.written(ids)

    def _parts(self, messages: Sequence[Message], trained: bool) -> list[int | str]:
        """The rendered text, cut: ids of special pieces, and texts to be encoded."""
        if not trained:
            text = self.text(messages)
            return [self.encoder.special.get(part, part) for part in self._cut.split(text) if part]
        said = "".join(message["content"] for message in messages)
        literal, apart = islice((char for char in map(chr, _PRIVATE) if char not in said), 2)

        def hidden(message: Message) -> Message:
            content = self._cut.sub(
                lambda found: f"{literal}{self.encoder.special[found[0]]}{literal}", message["content"]
            )
            begin = apart if self._apart and message["role"] == "assistant" else ""
            return {**message, "content": begin + content}

        def shown(text: str) -> str:
            return re.sub(f"{literal}(\\d+){literal}", lambda found: self.encoder.pieces[int(found[1])], text)

        cut = re.compile(f"{self._cut.pattern}|{apart}")
        text = self.text([*map(hidden, messages)])
        parts = (part for part in cut.split(text) if part)
        return [self.encoder.special[part] if part in self.encoder.special else shown(part) for part in parts]

    @cached_property
    def _around(self) -> tuple[str, int]:
        """The white space that the template writes before an answer (Mistral's has a space), and the special piece
        behind it (ChatML's, say, beside an EOS of the base's); EOS where it writes none."""
        question, parts = asked("?"), []
        with suppress(InputError):
            before = self._parts(question, trained=True)
            begun = before.pop() if isinstance(before[-1], str) else ""
            parts = self._parts([*question, {"role": "assistant", "content": "!"}], trained=True)[len(before) :]
        at = next((at for at, part in enumerate(parts[:-1]) if "!" in str(part)), None)
        if at is None or not isinstance(end := parts[at + 1], int) or end == self.encoder.bos:
            return "", self.encoder.eos
        gap = "" if at or self._apart else str(parts[0]).removeprefix(str(begun)).partition("!")[0]
        return gap if gap.isspace() else "", end

    @cached_property
    def _cut(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, sorted(self.encoder.special, key=len, reverse=True))) + ")")

    def _names(self, ours: bool) -> dict[str, str]:
        """What a template calls them. Ours begin with BOS where training does."""
        encoder = self.encoder
        told = {name: at for name, at in encoder.named.items() if name != "bos" or not ours or encoder.bos is not None}
        return {f"{name}_token": encoder.pieces[index] for name, index in told.items()}


class _Renderer:
    """rendering.render in a process of its own, started at the first conversation and again when it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __call__(self, template: str, messages: Sequence[Message], names: Mapping[str, str]) -> str:
        """As rendering.render. ValueError too for what takes too long."""
        asked = json.dumps([template, [dict(message) for message in messages], names]).encode()
        with self._lock:
            process, self._process = self._process, None
            if process is None or process.poll() is not None:
                process = subprocess.Popen(
                    [sys.executable, "-P", rendering.__file__],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0,  # a Ctrl-C is for whoever asks
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # a stack for each core would count as its memory
                )  # fmt: skip
            assert process.stdin
            assert process.stdout
            with suppress(BrokenPipeError):
                process.stdin.write(asked + b"\n")
                process.stdin.flush()
            if line := process.stdout.readline():
                answer = json.loads(line)
                # not before: where this is interrupted, it would answer the next conversation with this one's text
                self._process = process
            else:
                code = process.wait()
                if code > 0:
                    raise RuntimeError(f"the process that renders chat templates ended with {code}")
                late = code == -signal.SIGPROF
                why = f"does not end within {rendering.SECONDS:.0f} s" if late else f"ended its process ({code})"
                answer = {"error": f"it {why}"}
        if "error" in answer:
            raise ValueError(answer["error"])
        return str(answer["text"])


_renderer = _Renderer()
