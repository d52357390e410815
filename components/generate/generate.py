"""Answers in batch, and a conversation in the terminal.

Prompts are encoded as in training (BOS + SentencePiece's ids); an answer ends at EOS, after `--max-new-tokens`, or
where the context ends. Answers are kept as they come (journal.py), so that a run that is killed goes on after its last
one: a batch is the next prompts in order, not those of like length, and each draws from a seed of its own.

A conversation is prompt + answer + EOS, repeated, as the chat template has it.
"""

import itertools
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from components.generate.journal import Sample, file_journal, store_journal
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
from zhllama.tokenizer.prompt import wrap

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
    asked = questions(config, inputs)
    with store_journal(out.root, asked) as (answered, keep):
        said = samples(config, inputs, asked, answered, keep)
        out.add_json(SAMPLES, said)
        out.facts["summary"] = f"{len(said):,} answers"
        out.metrics["characters_per_answer"] = sum(len(sample["Output"]) for sample in said) / len(said)
        return out.publish("samples")


def answer_into_file(config: Generate, inputs: Inputs) -> None:
    """Answers `--prompt` or `--input` into `--answers`."""
    asked = questions(config, inputs)
    # all that decides an answer but the questions, which are compared one by one: a list may have grown
    decides = {name: given.digest for name, given in inputs.records.items() if name != "input"}
    key = digest_of([decides, asdict(config.sampling()), config.precision, config.context_length, config.rope_alpha])
    with file_journal(Path(config.answers), key, asked) as (answered, keep):
        said = samples(config, inputs, asked, answered, keep)
    log.info("%s: %d answers", config.answers, len(said))


def questions(config: Generate, inputs: Inputs) -> list[str]:
    """What is asked, as the model reads it. InputError for a file without questions."""
    texts = read_questions(inputs["input"]) if config.input else [config.prompt or config.default_prompt]
    return [wrap(text) for text in texts] if config.with_prompt else texts


def read_questions(artifact: Artifact) -> list[str]:
    """Of every Alpaca item where there is a .json or .jsonl file, else of every line of the .txt files."""
    if any(plain_name(name).endswith((".json", ".jsonl")) for name in artifact.names if name not in NO_ITEMS):
        items = read_instructions(artifact, answered=False)
        return ["\n".join(filter(None, (item["instruction"], item["input"]))) for item in items]
    return list(read_documents(artifact))


def load(config: Generate, inputs: Inputs) -> LoadedModel:
    more = {name: getattr(config, name) for name in ("precision", "context_length", "rope_alpha")}
    return load_model(inputs["model"], inputs.all("adapters"), **more)


def samples(
    config: Generate,
    inputs: Inputs,
    asked: Sequence[str],
    answered: Sequence[Sample] = (),
    keep: Callable[[Sequence[Sample]], None] = lambda batch: None,
) -> list[Sample]:
    """[{"Input": what the model read, "Output": its answer}], in order. InputError names a prompt that is too long.
    `answered`: those of the first questions, which are not asked again. `keep` is given each batch as it comes."""
    said = list(answered)
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
            keep(batch)
            said += batch
    return said


# --- a conversation ---------------------------------------------------------------------------------------------------
def chat_prompt(loaded: LoadedModel, turns: list[list[int]], asked: Sequence[int], max_new_tokens: int) -> list[int]:
    """BOS, the turns (each a prompt, its answer and EOS) that still fit, and what is asked now; turns that do not fit
    are taken out of `turns`. When what is asked alone is longer than the model's positions allow, it is the result,
    which whoever answers refuses, and nothing is forgotten for it."""
    bos, positions = loaded.encoder.bos, loaded.positions
    if 1 + len(asked) >= positions:
        return [bos, *asked]
    # an answer gets what it may need, but never more than half of what there is
    room = min(max_new_tokens, positions // 2)
    while turns and 1 + sum(map(len, turns)) + len(asked) + room > positions:
        turns.pop(0)
    return [bos, *itertools.chain(*turns), *asked]


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
    turns: list[list[int]] = []
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
        asked, before = loaded.encoder.encode(wrap(text) if config.with_prompt else text), len(turns)
        prompt = chat_prompt(loaded, turns, asked, config.max_new_tokens)
        if len(turns) < before:
            print("(the beginning of the conversation does not fit any more and is left out)", file=sys.stderr)
        try:
            answer = stream(loaded, prompt, config.sampling(), lambda piece: print(piece, end="", flush=True))
        except InputError as error:
            print(f"({error})", file=sys.stderr)
            continue
        print(flush=True)
        turns.append([*asked, *answer, loaded.encoder.eos])
