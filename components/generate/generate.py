"""Answers in batch, and the choice between batch and conversation.

The sampling defaults are the recipe's. Prompts are encoded as in training (BOS + SentencePiece's ids) and answered in
batches; an answer ends at EOS, after `--max-new-tokens`, or where the context ends.

Answers are kept as they come (journal.py), so that a run that is killed goes on after its last answer. For that a batch
is the next prompts in order, not those of like length, and each draws from a seed of its own: what a run says does not
depend on where an earlier one stopped.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from components.generate.journal import FileJournal, Journal, StoreJournal
from zhllama.artifacts.manifest import Manifest, digest_of
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.corpus import read_documents
from zhllama.data.instructions import NO_ITEMS, read_instructions
from zhllama.data.text_stream import plain_name
from zhllama.errors import InputError
from zhllama.stage.command_line import parse
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import NotKeyed, Ref, Refs, StageOptions
from zhllama.stage.run import run_stage
from zhllama.tokenizer.prompt import wrap, wrap_item

if TYPE_CHECKING:
    from zhllama.inference.load import LoadedModel, Sampling

log = logging.getLogger("generate")

SAMPLES = "samples.json"


@dataclass(frozen=True, kw_only=True)
class Generate(StageOptions):
    """Ask a model: one prompt, a file of instructions, or a conversation."""

    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft", "sentencepiece")

    store: str = ""
    """Where the answers are put: a folder or an s3:// prefix. Without it they are only printed."""
    model: Ref
    """Reference to the model."""
    adapters: Refs = ""
    """References to LoRA adapters to merge into it, comma-separated, in order."""
    prompt: str = ""
    """One instruction."""
    default_prompt: str = ""
    """An instruction for the case that neither --prompt nor --input says one."""
    input: Ref = ""
    """A file with an instruction a line (.txt), or Alpaca items (.json, .jsonl; they need no output)."""
    answers: NotKeyed[str] = ""
    """A file for the answers, .jsonl (an answer a line, as they come) or .json (a list). A run that was stopped goes on
    after its last answer."""
    interactive: bool = False
    """A conversation in the terminal. Ctrl-C stops an answer, Ctrl-D ends it."""
    with_prompt: bool = True
    """Wrap what is asked in the training prompt; false passes it to the model as it is."""
    do_sample: bool = True
    """Draw the tokens; false takes the likeliest one each time."""
    temperature: float = 0.2
    """Below 1 sharpens the distribution that tokens are drawn from."""
    top_k: int = 40
    """Tokens are drawn from this many of the likeliest."""
    top_p: float = 0.9
    """And from the likeliest that make up this share of the probability."""
    repetition_penalty: float = 1.1
    """Above 1 makes tokens less likely that have been there."""
    max_new_tokens: int = 400
    """Tokens of an answer at most."""
    seed: int = 42
    """Of the drawing."""
    precision: Literal["auto", "float32", "bfloat16", "float16", "int8", "4bit"] = "auto"
    """Of the weights: what the GPU has, float32 without one. int8 and 4bit need a GPU and bitsandbytes."""
    context_length: int = 0
    """Tokens of prompt and answer together; beyond the model's positions its rotary base is stretched. 0: the model's
    positions."""
    rope_alpha: float | None = None
    """How far the rotary base is stretched, always; else by the length, from the model's positions on."""

    def __post_init__(self) -> None:
        asked = [bool(self.prompt), bool(self.input), self.interactive]
        if sum(asked) != 1 and (any(asked) or not self.default_prompt):
            raise InputError("generate: give one of --prompt TEXT, --input FILE and --interactive")
        wanted = [name for name in ("output", "reference") if getattr(self, name)]
        if wanted and not self.store:
            raise InputError(f"generate: --{wanted[0]} needs a --store, where the answers are put")
        if self.answers and (self.interactive or self.store):
            other = "--interactive" if self.interactive else "--store"
            raise InputError(f"generate: --answers is for what {other} is not; leave out one")
        if self.answers and Path(self.answers).suffix not in (".json", ".jsonl"):
            raise InputError(f"generate: --answers {self.answers}: give a name that ends in .json or .jsonl")
        if self.store and self.interactive:
            raise InputError("generate: a conversation leaves nothing in the store; leave out --store or --interactive")
        for option, right, rule in (
            ("--temperature", self.temperature > 0, "above 0 (--do-sample false takes the likeliest)"),
            ("--top-k", self.top_k >= 0, "0 (off) or more"),
            ("--top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--repetition-penalty", self.repetition_penalty > 0, "above 0"),
            ("--max-new-tokens", self.max_new_tokens >= 1, "1 or more"),
            ("--context-length", self.context_length >= 0, "0 (the model's positions) or more"),
            ("--rope-alpha", self.rope_alpha is None or self.rope_alpha >= 1, "1 (as it is) or more"),
        ):
            if not right:
                value = getattr(self, option[2:].replace("-", "_"))
                raise InputError(f"generate: {option} is {value}; it must be {rule}")

    def sampling(self) -> "Sampling":
        from zhllama.inference.load import Sampling

        return Sampling(
            do_sample=self.do_sample,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )

    def load(self, inputs: Inputs) -> "LoadedModel":
        from zhllama.inference.load import load_model

        return load_model(
            inputs["model"],
            inputs.all("adapters"),
            precision=self.precision,
            context_length=self.context_length,
            rope_alpha=self.rope_alpha,
        )


def run() -> None:
    """The command: a conversation, answers for the store, for a file, or for the screen."""
    config = parse(Generate, sys.argv[1:])
    if config.store and not config.interactive:
        run_stage(config, generate)
        return
    inputs = Inputs.open(config)
    if config.interactive:
        from components.generate.chat import chat

        chat(config, inputs)
    elif config.answers:
        answer_into_file(config, inputs)
    else:
        for sample in samples(config, inputs, questions(config, inputs)):
            print(f"{sample['Output']}\n", flush=True)


def generate(config: Generate, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Answers `--prompt` or `--input` and publishes samples.json."""
    # the artifact's place is named by all that decides the answers: what is there is this run's
    with StoreJournal(out.root) as journal:
        said = samples(config, inputs, questions(config, inputs), journal)
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
    with FileJournal(Path(config.answers), key) as journal:
        said = samples(config, inputs, asked, journal)
    log.info("%s: %d answers", config.answers, len(said))


def questions(config: Generate, inputs: Inputs) -> list[str]:
    """What is asked, as the model reads it. InputError for a file without questions."""
    if not config.input:
        prompt = config.prompt or config.default_prompt
        return [wrap(prompt) if config.with_prompt else prompt]
    return read_questions(inputs["input"], config.with_prompt)


def read_questions(artifact: Artifact, with_prompt: bool) -> list[str]:
    """Of every Alpaca item where there is a .json or .jsonl file, else of every line of the .txt files."""
    if any(plain_name(name).endswith((".json", ".jsonl")) for name in artifact.names if name not in NO_ITEMS):
        items = list(read_instructions(artifact, answered=False))
        if with_prompt:
            return [wrap_item(item) for item in items]
        return ["\n".join(filter(None, (item["instruction"], item["input"]))) for item in items]
    lines = [document.text for document in read_documents(artifact)]
    return [wrap(line) for line in lines] if with_prompt else lines


def samples(
    config: Generate, inputs: Inputs, asked: Sequence[str], journal: Journal | None = None
) -> list[dict[str, str]]:
    """[{"Input": what the model read, "Output": its answer}], in order. InputError names a prompt that is too long.

    What `journal` already holds is not asked again, and each batch is written to it as it is answered.
    """
    from zhllama.inference.load import BATCH, answer
    from zhllama.progress import Progress

    said = journal.read(asked) if journal else []
    if len(said) == len(asked):
        return said
    if said:
        log.info("going on after %d of %d answers", len(said), len(asked))
    loaded = config.load(inputs)
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
            texts = [loaded.encoder.decode(ids) for ids in made]
            batch = [{"Input": text, "Output": told} for text, told in zip(asked[start:], texts)]
            if journal:
                journal.write(batch)
            said += batch
    return said
