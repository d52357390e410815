"""The options of evaluate."""

from dataclasses import dataclass
from typing import ClassVar

from zhllama.artifacts.json_file import value_of
from zhllama.artifacts.manifest import Manifest
from zhllama.errors import InputError
from zhllama.stage.options import Later, Ref, Refs, StageOptions, split_references
from zhllama.stage.requirements import check_requirements, missed, parse_requirements


@dataclass(frozen=True, kw_only=True)
class Evaluate(StageOptions):
    """Measure a model against its baselines on held-out text and instructions."""

    cache_version: ClassVar[int] = 3
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "sentencepiece")

    model: Ref
    """Reference to the model that was made."""
    baseline: Refs = ""
    """References to the models it is compared with, comma-separated, in the order they are shown."""
    labels: str = ""
    """Names for the baselines and the model, comma-separated: "base,stage 1,adapted"."""
    text: Ref = ""
    """Held-out Chinese text: .txt or .jsonl files, or a packed dataset, whose held-out part is read."""
    english: Ref = ""
    """Held-out English text, likewise: what was forgotten."""
    instructions: Ref = ""
    """Held-out instructions: Alpaca items, or a packed dataset, whose held-out part is read."""
    text_validation: Ref = ""
    """Read in place of --text where it is given: text that was held out as a whole."""
    instructions_validation: Ref = ""
    """Read in place of --instructions where it is given."""
    trainings: Refs = ""
    """What the trainings published (with metrics.jsonl), comma-separated: their loss curves are shown."""
    exams: Refs = ""
    """Exams, comma-separated: folders of CSV files in C-Eval's or CMMLU's layout (dev/, val/ or test/)."""
    shots: str = "0,5"
    """Worked examples before an exam's question, comma-separated: each number is a figure of its own."""
    max_questions: int = 0
    """Questions of each subject of an exam that are asked; 0 for all of them."""
    prompts: Ref = ""
    """Fixed prompts that every model answers: .txt (one a line) or Alpaca items. "": the project's own twelve."""
    max_prompts: int = 12
    """How many of the fixed prompts are asked; 0 for none."""
    lm_eval: str = ""
    """Tasks of lm-evaluation-harness, comma-separated; needs `pip install 'zhllama[lm-eval]'`."""
    lm_eval_tasks: Ref = ""
    """A folder with YAML files of more such tasks. They may run code that they name: only your own."""
    samples: int = 6
    """Answers to held-out instructions and continuations of held-out text shown side by side."""
    max_bytes: int = 200_000
    """Bytes of each text that are scored."""
    max_items: int = 500
    """Multiple-choice items that are scored (a fifth of it of the other items)."""
    questions: Later[int] = 0
    """Questions with known answers that are asked in each language, of the project's own 200; 0 for none."""
    front: Later[int] = 0
    """Points between the model and the first baseline that are measured on both texts as well: 3 are 25, 50 and 75% of
    the baseline. merge_models makes one of them a model."""
    require: Later[str] = ""
    """What has to hold, else the stage fails once the report is published: "english_bits_per_byte<=1.03*base,
    accuracy>=0.85"; base is the first baseline. With ? behind a figure's name it counts where it is measured."""

    def __post_init__(self) -> None:
        texts = (self.text, self.text_validation, self.english, self.instructions, self.instructions_validation)
        if not any((*texts, self.exams, self.lm_eval, self.questions)):
            raise InputError(
                "evaluate: nothing to measure on; give --text, --english, --instructions, --exams or --lm-eval, or ask "
                "--questions"
            )
        for name in ("samples", "max_bytes", "max_items", "max_questions", "max_prompts", "questions", "front"):
            least = 1 if name in ("max_bytes", "max_items") else 0
            if (value := getattr(self, name)) < least:
                raise InputError(f"evaluate: --{name.replace('_', '-')} is {value}; it must be {least} or more")
        shots_of(self.shots)
        count, names = len(split_references(self.baseline)) + 1, labels_of(self)
        if not len(names) == len(set(names)) == count:
            raise InputError(
                f"evaluate: --labels has {len(names)} names ({self.labels}) for {count} models, the baselines and the "
                "model; give each one its own, comma-separated"
            )
        lacks = {
            "--baseline": self.baseline,
            "--text": self.text or self.text_validation,
            "--english": self.english,
        }
        if self.front and not all(lacks.values()):
            missing = next(option for option, given in lacks.items() if not given)
            raise InputError(
                f"evaluate: --front draws Chinese against English from a baseline to the model; give {missing}"
            )
        sources = {
            "text": self.text or self.text_validation,
            "english": self.english,
            "instructions": (items := self.instructions or self.instructions_validation),
            "choices": items,
            "questions": self.questions,
        }
        measured = [name for name, given in sources.items() if given]
        # what exams are called is known when they are read
        exams = [""] if self.exams else []
        check_requirements(parse_requirements(self.require), names, measured, exams, split(self.lm_eval))

    def accept(self, manifest: Manifest) -> None:
        """InputError for a requirement that does not hold, by how much."""
        from zhllama.artifacts.open import open_artifact

        if self.require:
            report = open_artifact(manifest.reference).read("report.json")
            if said := missed(value_of(report)["requirements"]):
                raise InputError(f"--require {said}; the report is {manifest.root}/report.html")


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else []


def shots_of(text: str) -> list[int]:
    """`0,5` as numbers, each once. InputError for what is none."""
    parts = split(text)
    if not parts or not all(part.isdecimal() and part.isascii() for part in parts):
        raise InputError(f"evaluate: --shots is {text!r}; write numbers, comma-separated: 0,5")
    return list(dict.fromkeys(map(int, parts)))


def labels_of(config: Evaluate) -> list[str]:
    """The given names, or `baseline` (numbered when there are several) and `model`."""
    count = len(split_references(config.baseline))
    baselines = ["baseline"] if count == 1 else [f"baseline {index + 1}" for index in range(count)]
    return [label for label in split(config.labels) if label] or [*baselines, "model"]
