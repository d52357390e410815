"""Which stages a pipeline has, and where they begin."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from zhllama.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Which stages a pipeline has, and where they begin."""

    start: Literal["weights", "model", "extended", "adapters"]
    base: Literal["weights", "model", "extended"]
    """Where the model comes from that the result is compared with."""
    tokenizer: Literal["train", "continue", "given", "keep"]
    instructions: Literal["given", "import", "generate", "none"]
    stage1: bool
    stage2: bool
    sft: bool
    check_merge: bool
    replay: Literal["none", "own", "replay_text", "english_text"] = "none"
    """What is mixed into every training: nothing, text that the base writes, or the text at one of the addresses."""

    @property
    def extends(self) -> bool:
        """Whether the vocabulary is extended here."""
        return self.start in ("weights", "model") and self.tokenizer != "keep"

    @property
    def labels(self) -> list[str]:
        """The models of the report: those that the result is compared with, then the result."""
        made = self.extends or self.start == "adapters" or self.base != self.start or self.stage2 or self.sft
        before = {"base": made, "stage 1": self.stage1, "stage 2": self.stage2 and self.sft}
        return [*(label for label, there in before.items() if there), "adapted"]

    def reads(self) -> dict[str, bool]:
        """The addresses that this course reads → whether it cannot do without."""
        adapts, given = self.start == "adapters", self.instructions == "given"
        trains_tokenizer = self.extends and self.tokenizer != "given"
        made = self.instructions in ("import", "generate")
        # whether it is read, whether it cannot be done without
        addresses = {
            "weights": (self.base == "weights", True),
            "expect": (self.base == "weights", False),
            "model": (self.base == "model", True),
            "extended_model": ("extended" in (self.start, self.base), True),
            "adapters": (adapts, True),
            "chinese_tokenizer": (self.extends and self.tokenizer == "given", True),
            "text": (True, self.stage2 or trains_tokenizer),
            **dict.fromkeys(("text_validation", "exams", "prompts"), (True, False)),
            "english_text": (True, self.replay == "english_text"),
            "replay_text": (self.replay == "replay_text", True),
            "instructions": (adapts or given, given),
            "import_instructions": (self.instructions == "import", True),
            "generate_seeds": (self.instructions == "generate", False),
            "generate_against": (made, False),
            "generate_catalogue": (self.instructions == "generate", False),
            "instructions_validation": (adapts or self.instructions != "none", False),
            "evaluation": (self.stage2 or self.instructions != "none", False),
            "lora_adapter": (self.stage2 and not self.stage1, False),
            "sft_adapter": (self.sft, False),
        }
        return {name: needed for name, (read, needed) in addresses.items() if read}


def shape_of(values: Mapping[str, Any], words: Any) -> Shape:
    start = values["start"]
    trains = start != "adapters"
    stage2 = trains and values["run_pretraining"] is True
    sft = trains and values["run_sft"] is True
    base = values["base"] if start in ("adapters", "extended") else start
    if start == "extended" and base == "weights":
        raise InputError("base=weights: with start=extended it is model or extended")
    if base is None:
        there = [one for one, address in (("model", "model"), ("extended", "extended_model")) if values[address]]
        base = (*there, "weights" if start == "adapters" else start)[0]
    instructions: Any = words or ("given" if sft else "none")
    if not trains or (not sft and instructions != "given"):
        # what nothing learns from is not made
        instructions = "none"
    replay: Any = {"auto": "none", "text": "replay_text"}.get(values["replay"], values["replay"])
    if values["replay"] in ("auto", "text"):
        replay = next((name for name in ("replay_text", "english_text") if values[name]), replay)
    return Shape(
        start=start,
        base=base,
        tokenizer=values["tokenizer"],
        instructions=instructions,
        stage1=stage2 and values["run_stage1"] is True,
        stage2=stage2,
        sft=sft,
        check_merge=stage2 and sft and values["check_merge"] is True,
        replay=replay if stage2 or sft else "none",
    )
