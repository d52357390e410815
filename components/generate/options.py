"""The options of generate."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

from zhllama.errors import InputError
from zhllama.inference.sampling import Sampling
from zhllama.stage.options import Later, NotKeyed, Ref, Refs, StageOptions


@dataclass(frozen=True, kw_only=True)
class Generate(StageOptions):
    """Ask a model: one prompt, a file of instructions, or a conversation."""

    cache_version: ClassVar[int] = 3
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
    replay_documents: Later[int] = 0
    """Have the model write so many documents of its own, drawn as they come (temperature 1, from all tokens), each from
    nothing or from a line of --input. What is too short, repeats itself or is Chinese is left out; the rest is text for
    prepare_dataset: what a training must not lose."""
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
        if self.replay_documents:
            self._check_replay()
        elif sum(asked) != 1 and (any(asked) or not self.default_prompt):
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
            ("temperature", self.temperature > 0, "above 0 (--do-sample false takes the likeliest)"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("context_length", self.context_length >= 0, "0 (the model's positions) or more"),
            ("rope_alpha", self.rope_alpha is None or self.rope_alpha >= 1, "1 (as it is) or more"),
        ):
            if not right:
                value = getattr(self, option)
                raise InputError(f"generate: --{option.replace('_', '-')} is {value}; it must be {rule}")

    def _check_replay(self) -> None:
        for name in ("prompt", "interactive", "answers"):
            if getattr(self, name):
                raise InputError(f"generate: --{name} is for what --replay-documents is not; leave out one")
        if self.replay_documents < 0:
            raise InputError(f"generate: --replay-documents is {self.replay_documents}; it must be 1 or more")
        if not self.store:
            raise InputError("generate: --replay-documents needs a --store, where the text is put")
        drawn = ("with_prompt", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
        for name in drawn:
            if getattr(self, name) != getattr(type(self), name):
                option = name.replace("_", "-")
                raise InputError(f"generate: --{option}: what is replayed is drawn as it comes; leave it out")

    def sampling(self) -> Sampling:
        if self.replay_documents:
            return Sampling(
                temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=self.max_new_tokens,
                seed=self.seed,
            )  # fmt: skip
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})
