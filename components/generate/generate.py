"""Answers in batch, and the choice between batch and conversation.

The sampling defaults are the recipe's. Prompts are encoded as in training (BOS + SentencePiece's ids) and answered in
batches of like length; an answer ends at EOS, after `--max-new-tokens`, or where the context ends.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from components.shared.artifact import Artifact, ArtifactWriter, Manifest, open_artifact
from components.shared.cli import Ref, Refs, StageOptions, parse, run_stage
from components.shared.corpus import read_documents
from components.shared.errors import InputError
from components.shared.instructions import read_instructions
from components.shared.prompt import wrap, wrap_item

if TYPE_CHECKING:
    from components.shared.inference import Sampling

SAMPLES = "samples.json"
PACKAGES = ("torch", "transformers", "peft", "sentencepiece")


@dataclass(frozen=True, kw_only=True)
class Generate(StageOptions):
    """Ask a model: one prompt, a file of instructions, or a conversation."""

    store: str = ""
    """Where the answers are put: a folder or an s3:// prefix. Without it they are only printed."""
    model: Ref
    """Reference to the model."""
    adapters: Refs = ""
    """References to LoRA adapters to merge into it, comma-separated, in order."""
    prompt: str = ""
    """One instruction."""
    input: Ref = ""
    """A file with an instruction a line (.txt), or Alpaca items (.json, .jsonl; they need no output)."""
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

    def __post_init__(self) -> None:
        asked = [bool(self.prompt), bool(self.input), self.interactive]
        if sum(asked) != 1:
            raise InputError("generate: give one of --prompt TEXT, --input FILE and --interactive")
        wanted = [name for name in ("output", "reference") if getattr(self, name)]
        if wanted and not self.store:
            raise InputError(f"generate: --{wanted[0]} needs a --store, where the answers are put")
        if self.store and self.interactive:
            raise InputError("generate: a conversation leaves nothing in the store; leave out --store or --interactive")
        for option, right, rule in (
            ("--temperature", self.temperature > 0, "above 0 (--do-sample false takes the likeliest)"),
            ("--top-k", self.top_k >= 0, "0 (off) or more"),
            ("--top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--repetition-penalty", self.repetition_penalty > 0, "above 0"),
            ("--max-new-tokens", self.max_new_tokens >= 1, "1 or more"),
        ):
            if not right:
                value = getattr(self, option[2:].replace("-", "_"))
                raise InputError(f"generate: {option} is {value}; it must be {rule}")

    def sampling(self) -> "Sampling":
        from components.shared.inference import Sampling

        return Sampling(
            do_sample=self.do_sample,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )


def run() -> None:
    """The command: a conversation, answers for the store, or answers for the screen."""
    config = parse(Generate, sys.argv[1:])
    if config.interactive:
        from components.generate.chat import chat

        chat(config)
    elif config.store:
        run_stage(config, generate, PACKAGES)
    else:
        for sample in samples(config, questions(config)):
            print(f"{sample['Output']}\n", flush=True)


def generate(config: Generate, out: ArtifactWriter) -> Manifest:
    """Answers `--prompt` or `--input` and publishes samples.json."""
    said = samples(config, questions(config))
    out.add_json(SAMPLES, said)
    out.facts["summary"] = f"{len(said):,} answers"
    out.metrics["characters_per_answer"] = sum(len(sample["Output"]) for sample in said) / len(said)
    return out.publish("samples")


def questions(config: Generate) -> list[str]:
    """What is asked, as the model reads it. InputError for a file without questions."""
    if config.prompt:
        return [wrap(config.prompt) if config.with_prompt else config.prompt]
    return read_questions(open_artifact(config.input, "--input"), config.with_prompt)


def read_questions(artifact: Artifact, with_prompt: bool) -> list[str]:
    """Of every Alpaca item where there is a .json or .jsonl file, else of every line of the .txt files."""
    if any(
        name.endswith((".json", ".jsonl")) for name in artifact.names if name not in ("manifest.json", "blocks.json")
    ):
        items = list(read_instructions(artifact, answered=False))
        if with_prompt:
            return [wrap_item(item) for item in items]
        return ["\n".join(filter(None, (item["instruction"], item["input"]))) for item in items]
    lines = [document.text for document in read_documents(artifact)]
    return [wrap(line) for line in lines] if with_prompt else lines


def samples(config: Generate, asked: Sequence[str]) -> list[dict[str, str]]:
    """[{"Input": what the model read, "Output": its answer}], in order. InputError names a prompt that is too long."""
    from components.shared.inference import answer, load_model
    from components.shared.progress import Progress

    loaded = load_model(config.model, config.adapters)
    prompts = [loaded.prompt_ids(text) for text in asked]
    for number, ids in enumerate(prompts, start=1):
        if len(ids) >= loaded.positions:
            where = f"--input {config.input}: item {number}" if config.input else "--prompt"
            raise InputError(
                f"{where}: {len(ids)} tokens, and the model has {loaded.positions} positions; shorten the text"
            )
    with Progress("answering", len(prompts), "answers") as bar:
        said = answer(loaded, prompts, config.sampling(), bar.advance)
    return [{"Input": text, "Output": loaded.encoder.decode(ids)} for text, ids in zip(asked, said)]
