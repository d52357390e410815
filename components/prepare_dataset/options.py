from dataclasses import dataclass
from typing import ClassVar, Literal

from zhllama.errors import InputError
from zhllama.stage.options import Later, Ref, Refs, StageOptions, WeightedRefs, weighted_references
from zhllama.tokenizer.prompt import DEFAULT, RECIPE, Prompt

Packing = Literal["best-fit", "faithful"]
Template = Literal["own", "alpaca"]


@dataclass(frozen=True, kw_only=True)
class PrepareDataset(StageOptions):
    """Pack text or instructions into token blocks for training."""

    cache_version: ClassVar[int] = 4
    libraries: ClassVar[tuple[str, ...]] = ("sentencepiece", "numpy", "rensa")

    tokenizer: Ref
    """Reference to a tokenizer, or to a model or adapter with one: what the trained model will use."""
    text: WeightedRefs = ""
    """References to text: folders, s3:// prefixes or artifacts of .txt, .jsonl (also .gz, .zst) or .parquet files, or
    hf://datasets/OWNER/NAME. Weighted: `zh:0.9,en:0.1`."""
    instructions: WeightedRefs = ""
    """References to Alpaca items or conversations (.json, .jsonl, hf://), in place of --text. Weighted likewise."""
    block_size: int = 512
    """Tokens in a block; no more than the model has positions."""
    packing: Packing = "best-fit"
    """best-fit: whole documents, several to a block, kept apart. faithful: the recipe's line groups, padded items,
    and its prompt, with answers encoded on their own."""
    template: Later[Template] = "own"
    """What instructions are written with. own: the chat template beside the tokenizer; Alpaca's prompt where it has
    none. alpaca: Alpaca's prompt, whatever it has. With --packing faithful always the recipe's."""
    validation_fraction: float = 0.01
    """Share of the documents held out, chosen by their content. Not used when --validation is given."""
    validation: Ref = ""
    """Reference to the documents to hold out; those that are also in the training data are left out of it."""
    seed: int = 20
    """Decides which documents are held out."""
    skip_bad: bool = False
    """Leave out, and count, lines that are not UTF-8 or hold no text, and items that lack a field; else they end it."""
    drop_near_duplicates: bool = False
    """Leave out, and count, documents that are nearly like an earlier one (MinHash). Memory: 3 KB a document."""
    evaluation: Refs = ""
    """References to text or items that the model will be scored on: what overlaps with them (13 words or Han
    characters in a row) is left out and counted."""

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.instructions):
            raise InputError("give --text or --instructions, one of the two")
        if self.block_size < 8:
            raise InputError(f"--block-size {self.block_size}: too short for anything; give 512, say")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"--validation-fraction {self.validation_fraction}: give a share from 0 to below 1")
        weights = [weight for _, weight in weighted_references(self.data)]
        if 0 in weights:
            raise InputError("a source with weight 0 is never read; leave it out, or give it a weight above 0")
        if self.packing == "faithful" and any(weight is not None for weight in weights):
            raise InputError("--packing faithful reads its sources as they are; leave their weights out")
        if self.packing == "faithful" and self.text and (self.drop_near_duplicates or self.evaluation):
            raise InputError(
                "--packing faithful packs every line of a text, as the recipe does; leave out --drop-near-duplicates "
                "and --evaluation"
            )

    @property
    def data(self) -> str:
        """The references to the data, whichever kind it is."""
        return self.text or self.instructions

    @property
    def option(self) -> str:
        """The option that gave it."""
        return "--text" if self.text else "--instructions"

    @property
    def prompt(self) -> Prompt:
        """What items are written with."""
        return RECIPE if self.packing == "faithful" else DEFAULT

    @property
    def holds_out(self) -> bool:
        return bool(self.validation or self.validation_fraction)
