"""Answers in batch, and a conversation in the terminal.

Prompts are written by the model's own chat template and encoded as in training (a special token in a text is text); an
answer ends at EOS, after `--max-new-tokens`, or where the context ends. Answers are kept as they come (journal.py), so
that a run that is killed goes on after its last one: a batch is the next prompts in order, not those of like length,
and each draws from a seed of its own.
"""

import itertools
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from components.generate.journal import Sample, file_journal, store_journal
from components.generate.options import Generate
from components.generate.replay import publish_replay
from zhllama.artifacts.manifest import Manifest, digest_of
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.conversations import is_conversation, messages_of
from zhllama.data.corpus import read_documents
from zhllama.data.instructions import read_instructions
from zhllama.data.text_stream import NO_ITEMS, plain_name
from zhllama.errors import InputError
from zhllama.inference.generate import BATCH, answer, stream
from zhllama.inference.load import LoadedModel, chat_of, load_model
from zhllama.progress import Progress
from zhllama.stage.command_line import parse
from zhllama.stage.inputs import Inputs
from zhllama.stage.run import run_stage
from zhllama.tokenizer.chat import Chat, Message, asked
from zhllama.tokenizer.prompt import AS_IS, question_of
from zhllama.tokenizer.vocabulary import load_encoder

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
    """Answers `--prompt` or `--input` and publishes samples.json; or has the model write text of its own."""
    given = beginnings(config, inputs) if config.replay_documents else questions(config, inputs)
    with store_journal(out.root, [one.text for one in given]) as (answered, keep):
        said = samples(config, inputs, given, answered, keep)
        if config.replay_documents:
            return publish_replay([f"{one['Input']}{one['Output']}" for one in said], out, config)
        out.add_json(SAMPLES, said)
        out.facts["summary"] = f"{len(said):,} answers"
        out.metrics["characters_per_answer"] = sum(len(sample["Output"]) for sample in said) / len(said)
        return out.publish("samples")


def answer_into_file(config: Generate, inputs: Inputs) -> None:
    """Answers `--prompt` or `--input` into `--answers`."""
    given = questions(config, inputs)
    # all that decides an answer but the questions, which are compared one by one: a list may have grown
    decides = {name: one.digest for name, one in inputs.records.items() if name != "input"}
    key = digest_of([decides, asdict(config.sampling()), config.precision, config.context_length, config.rope_alpha])
    with file_journal(Path(config.answers), key, [one.text for one in given]) as (answered, keep):
        said = samples(config, inputs, given, answered, keep)
    log.info("%s: %d answers", config.answers, len(said))


class Question(NamedTuple):
    """What the model reads: its text, but for BOS, and its ids."""

    text: str
    ids: list[int]


def questions(config: Generate, inputs: Inputs) -> list[Question]:
    """What is asked. InputError for a file without questions."""
    given = read_questions(inputs["input"]) if config.input else [config.prompt or config.default_prompt]
    chat, found = chat_with(config, inputs), []
    for number, one in enumerate(given, start=1):
        try:
            found.append(Question(chat.read(one), chat.ids(one, trained=True)))
        except InputError as fault:
            raise InputError(
                f"--input {config.input}: item {number}: {fault}" if config.input else str(fault)
            ) from fault
    return found


def beginnings(config: Generate, inputs: Inputs) -> list[Question]:
    """What the model's own documents begin with: nothing, or the lines of --input in turn."""
    encoder = load_encoder(inputs["model"], "--model")
    given = [""] if not config.input else [text for text in read_questions(inputs["input"]) if isinstance(text, str)]
    if not given:
        raise InputError(f"--input {config.input}: conversations; give lines that a document may begin with")
    texts = itertools.islice(itertools.cycle(given), config.replay_documents)
    return [Question(text, [*encoder.begin, *encoder.encode(text)] or encoder.context) for text in texts]


def chat_with(config: Generate, inputs: Inputs) -> Chat:
    """How the model is asked: by its chat template, or with what is asked as it is."""
    chat = chat_of(inputs["model"], inputs.all("adapters"))
    return chat if config.with_prompt else Chat(chat.encoder, AS_IS)


def read_questions(artifact: Artifact) -> list[str | list[Message]]:
    """Of every item where there is a .json or .jsonl file, of a conversation all that stands before its last answer;
    else of every line of the .txt files."""
    if any(plain_name(name).endswith((".json", ".jsonl")) for name in artifact.names if name not in NO_ITEMS):
        items = read_instructions(artifact, answered=False)
        return [[*messages_of(item)] if is_conversation(item) else question_of(item) for item in items]
    return [*read_documents(artifact)]


def load(config: Generate, inputs: Inputs) -> LoadedModel:
    more = {name: getattr(config, name) for name in ("precision", "context_length", "rope_alpha")}
    return load_model(inputs["model"], inputs.all("adapters"), **more)


def samples(
    config: Generate,
    inputs: Inputs,
    given: Sequence[Question],
    answered: Sequence[Sample] = (),
    keep: Callable[[Sequence[Sample]], None] = lambda batch: None,
) -> list[Sample]:
    """[{"Input": what the model read, "Output": its answer}], in order. InputError names a prompt that is too long.
    `answered`: those of the first questions, which are not asked again. `keep` is given each batch as it comes."""
    said = list(answered)
    if len(said) == len(given):
        return said
    if said:
        log.info("going on after %d of %d answers", len(said), len(given))
    loaded = load(config, inputs)
    prompts = [one.ids for one in given]
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
            batch = [{"Input": one.text, "Output": loaded.encoder.decode(ids)} for one, ids in zip(given[start:], made)]
            keep(batch)
            said += batch
    return said


# --- a conversation ---------------------------------------------------------------------------------------------------
def chat(config: Generate, inputs: Inputs) -> None:
    """Talks until the input ends. InputError where the model cannot be loaded."""
    spoken, loaded = chat_with(config, inputs), load(config, inputs)

    import torch

    torch.manual_seed(config.seed)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401 - gives input() its line editing

        print("Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    # a terminal may hand over anything; what is no UTF-8 becomes a replacement character
    for file in (sys.stdin, sys.stdout):
        file.reconfigure(errors="replace")  # type: ignore[union-attr]
    messages: list[Message] = []
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
        try:
            said = spoken.fitting([*messages, *asked(text)], loaded.positions, config.max_new_tokens)
            if len(said) <= len(messages):
                print("(the beginning of the conversation does not fit any more and is left out)", file=sys.stderr)
            prompt = spoken.ids(said, trained=True)
            answer = stream(loaded, prompt, config.sampling(), lambda piece: print(piece, end="", flush=True))
        except InputError as error:
            print(f"({error})", file=sys.stderr)
            continue
        print(flush=True)
        messages = [*said, {"role": "assistant", "content": loaded.encoder.decode(answer)}]
