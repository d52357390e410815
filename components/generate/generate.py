"""Answers in batch, and a conversation in the terminal.

Prompts are encoded as in training (BOS + SentencePiece's ids); an answer ends at EOS, after `--max-new-tokens`, or
where the context ends. Answers are kept as they come (journal.py), so that a run that is killed goes on after its last
one: a batch is the next prompts in order, not those of like length, and each draws from a seed of its own.

A conversation is prompt + answer + EOS, repeated, as the chat template has it, shown in whole characters. When it
outgrows the model's positions the oldest turns are left out.
"""

import itertools
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from components.generate.journal import FileJournal, StoreJournal
from components.generate.options import Generate
from zhllama.artifacts.manifest import Manifest, digest_of
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.corpus import read_documents
from zhllama.data.instructions import read_instructions
from zhllama.data.text_stream import NO_ITEMS, plain_name
from zhllama.errors import InputError
from zhllama.inference.generate import BATCH, answer, stream
from zhllama.inference.load import LoadedModel, load_model
from zhllama.progress import Progress
from zhllama.stage.command_line import parse
from zhllama.stage.inputs import Inputs
from zhllama.stage.run import run_stage
from zhllama.tokenizer.prompt import wrap, wrap_item

log = logging.getLogger("generate")

SAMPLES = "samples.json"
PROMPT = "» "


def run() -> None:
    """The command: a conversation, answers for the store, for a file, or for the screen."""
    config = parse(Generate, sys.argv[1:])
    if config.store:
        run_stage(config, generate)
        return
    inputs = Inputs(config)
    if config.interactive:
        chat(config, inputs)
    elif config.answers:
        answer_into_file(config, inputs)
    else:
        for sample in samples(config, inputs, questions(config, inputs)):
            print(f"{sample['Output']}\n", flush=True)


def generate(config: Generate, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Answers `--prompt` or `--input` and publishes samples.json."""
    # the artifact's place is named by all that decides the answers: what is there is this run's
    journal = StoreJournal(out.root)
    said = samples(config, inputs, questions(config, inputs), journal)
    out.add_json(SAMPLES, said)
    out.facts["summary"] = f"{len(said):,} answers"
    out.metrics["characters_per_answer"] = sum(len(sample["Output"]) for sample in said) / len(said)
    manifest = out.publish("samples")
    journal.delete()
    return manifest


def answer_into_file(config: Generate, inputs: Inputs) -> None:
    """Answers `--prompt` or `--input` into `--answers`."""
    asked = questions(config, inputs)
    # all that decides an answer but the questions, which are compared one by one: a list may have grown
    decides = {name: given.digest for name, given in inputs.records.items() if name != "input"}
    key = digest_of([decides, asdict(config.sampling()), config.precision, config.context_length, config.rope_alpha])
    with FileJournal(Path(config.answers), key) as journal:
        said = samples(config, inputs, asked, journal)
    log.info("%s: %d answers", config.answers, len(said))


def questions(config: Generate, inputs: Inputs) -> list[str]:
    """What is asked, as the model reads it. InputError for a file without questions."""
    if config.input:
        return read_questions(inputs["input"], config.with_prompt)
    prompt = config.prompt or config.default_prompt
    return [wrap(prompt) if config.with_prompt else prompt]


def read_questions(artifact: Artifact, with_prompt: bool) -> list[str]:
    """Of every Alpaca item where there is a .json or .jsonl file, else of every line of the .txt files."""
    if any(plain_name(name).endswith((".json", ".jsonl")) for name in artifact.names if name not in NO_ITEMS):
        items = read_instructions(artifact, answered=False)
        if with_prompt:
            return [wrap_item(item) for item in items]
        return ["\n".join(filter(None, (item["instruction"], item["input"]))) for item in items]
    lines = list(read_documents(artifact))
    return [wrap(line) for line in lines] if with_prompt else lines


def load(config: Generate, inputs: Inputs) -> LoadedModel:
    more = {name: getattr(config, name) for name in ("precision", "context_length", "rope_alpha")}
    return load_model(inputs["model"], inputs.all("adapters"), **more)


def samples(
    config: Generate, inputs: Inputs, asked: Sequence[str], journal: StoreJournal | FileJournal | None = None
) -> list[dict[str, str]]:
    """[{"Input": what the model read, "Output": its answer}], in order. InputError names a prompt that is too long.
    What `journal` already holds is not asked again, and each batch is written to it as it is answered."""
    said = journal.read(asked) if journal else []
    if len(said) == len(asked):
        return said
    if said:
        log.info("going on after %d of %d answers", len(said), len(asked))
    loaded = load(config, inputs)
    prompts = [loaded.prompt_ids(text) for text in asked]
    for number, ids in enumerate(prompts, start=1):
        if len(ids) >= loaded.positions:
            where = f"--input {config.input}: item {number}" if config.input else "--prompt"
            raise InputError(
                f"{where}: {len(ids)} tokens, and the model has {loaded.positions} positions; shorten the text, or "
                "give a --context-length"
            )
    with Progress("answering", len(prompts), "answers") as bar:
        bar.advance(len(said))
        # in batches of whole eights from the first prompt on, wherever an earlier run stopped
        for start in range(len(said), len(prompts), BATCH):
            sampling = replace(config.sampling(), seed=config.seed + start)
            made = answer(loaded, prompts[start : start + BATCH], sampling, bar.advance)
            batch = [{"Input": text, "Output": loaded.encoder.decode(ids)} for text, ids in zip(asked[start:], made)]
            if journal:
                journal.write(batch)
            said += batch
    return said


# --- a conversation ---------------------------------------------------------------------------------------------------
class Conversation:
    """The turns so far, as ids: each a prompt, its answer and EOS."""

    def __init__(self, loaded: LoadedModel, with_prompt: bool, max_new_tokens: int) -> None:
        self._loaded = loaded
        self._with_prompt = with_prompt
        self._turns: list[list[int]] = []
        # an answer gets what it may need, but never more than half of what there is
        self._room = min(max_new_tokens, loaded.positions // 2)

    def __len__(self) -> int:
        return len(self._turns)

    def prompt(self, text: str) -> list[int]:
        """BOS, the turns that still fit, and what is asked now; turns that do not fit are forgotten. When `text` alone
        is longer than the model's positions allow, it is the result, which whoever answers refuses, and nothing is
        forgotten for it."""
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


def chat(config: Generate, inputs: Inputs) -> None:
    """Talks until the input ends. InputError where the model cannot be loaded."""
    loaded = load(config, inputs)

    import torch

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
