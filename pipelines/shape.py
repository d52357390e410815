"""Which stages a pipeline has, and where they begin."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from pipelines.setting import Value
from zhllama.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Which stages a pipeline has, and where they begin."""

    start: Literal["weights", "model", "extended", "adapters"]
    base: Literal["weights", "model", "extended"]
    """Where the model comes from that the result is compared with."""
    tokenizer: Literal["train", "given"]
    instructions: Literal["given", "import", "generate", "none"]
    stage1: bool
    stage2: bool
    sft: bool
    check_merge: bool
    deploy: Literal["none", "kubernetes", "kserve"]

    @property
    def extends(self) -> bool:
        """Whether the vocabulary is extended here."""
        return self.start in ("weights", "model")

    def reads(self) -> dict[str, bool]:
        """The addresses that this course reads → whether it cannot do without."""
        found = {"weights": True, "expect": False} if self.base == "weights" else {}
        if self.base == "model":
            found["model"] = True
        if self.start == "extended" or self.base == "extended":
            found["extended_model"] = True
        if self.start == "adapters":
            found["adapters"] = True
        if self.extends and self.tokenizer == "given":
            found["chinese_tokenizer"] = True
        trains_tokenizer = self.extends and self.tokenizer == "train"
        found |= {"text": self.stage2 or trains_tokenizer, "text_validation": False, "english_text": False}
        found |= {"exams": False, "prompts": False}
        if self.start == "adapters":
            found["instructions"] = False
        if self.instructions == "given":
            found["instructions"] = True
        if self.instructions == "import":
            found |= {"import_instructions": True, "generate_against": False}
        if self.instructions == "generate":
            found |= {"generate_seeds": False, "generate_against": False, "generate_catalogue": False}
        if self.instructions != "none" or self.start == "adapters":
            found["instructions_validation"] = False
        if self.stage2 or self.instructions != "none":
            found["evaluation"] = False
        if self.stage2 and not self.stage1:
            found["lora_adapter"] = False
        if self.sft:
            found["sft_adapter"] = False
        return found


def shape_of(values: Mapping[str, Value], words: str | None) -> Shape:
    start = cast(Literal["weights", "model", "extended", "adapters"], values["start"])
    trains = start != "adapters"
    stage2 = trains and values["run_pretraining"] is True
    sft = trains and values["run_sft"] is True
    base = values["base"] if start in ("adapters", "extended") else start
    if start == "extended" and base == "weights":
        raise InputError("base=weights: with start=extended it is model or extended")
    if base is None:
        there = [one for one, address in (("model", "model"), ("extended", "extended_model")) if values[address]]
        base = there[0] if there else {"adapters": "weights"}.get(start, start)
    instructions = words or ("given" if sft else "none")
    if not trains or (not sft and instructions != "given"):
        # what nothing learns from is not made
        instructions = "none"
    return Shape(
        start=start,
        base=cast(Any, base),
        tokenizer=cast(Any, values["tokenizer"]),
        instructions=cast(Any, instructions),
        stage1=stage2 and values["run_stage1"] is True,
        stage2=stage2,
        sft=sft,
        check_merge=stage2 and sft and values["check_merge"] is True,
        deploy=cast(Any, values["deploy"]),
    )
