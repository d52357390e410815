"""What rows new pieces begin with: the model before any training, and after the recipe's stage 1, by `--init`.

Bases: the demo's tiny LLaMA, trained on English alone (untied, 32,000 pieces), and the same after it was extended once
before, by 5,000 Chinese pieces with the recipe's random rows. Text: reviews and docstrings that no training has seen.
"""

import json
from pathlib import Path
from typing import Any

from tests.bench.measure import Table, measured

INITS = ("piece-mean", "piece-mean-norm", "mean", "normal")
STEPS = 40
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def run(scratch: Path) -> list[Table]:
    made = measured(make, str(scratch), environment=ENVIRONMENT).result
    tables = []
    for title, model in (("the tiny LLaMA", made["model"]), ("extended before with random rows", made["extended"])):
        table = Table(
            f"New rows before and after stage 1: {title}",
            (
                "--init", "English at step 0", "given to new pieces", "Chinese at step 0",
                "loss at step 1", f"after {STEPS} steps", "English then", "Chinese then",
            ),
            note="English, Chinese: bits per byte of held-out text (the base: "
            f"{made[f'{title} en']:.3f}, {made[f'{title} zh']:.3f}); loss: of training, in nats a token. Stage 1 "
            "trains the embeddings alone, with the demo's settings.",
        )  # fmt: skip
        for init in INITS:
            found = measured(course, str(scratch), model, made["chinese"], init, environment=ENVIRONMENT).result
            table.rows.append((f"`{init}`", *(f"{value:.3f}" for value in found[:1]), f"{found[1]:.1%}", *(
                f"{value:.3f}" for value in found[2:])))  # fmt: skip
        tables.append(table)
    return tables


# --- programs ---------------------------------------------------------------------------------------------------------


def make(scratch: str) -> dict[str, Any]:
    """Bases, a Chinese tokenizer, and what both bases know: references and figures."""
    from components.convert_weights.converter import convert_weights
    from components.convert_weights.options import ConvertWeights
    from components.extend_tokenizer.extender import extend_tokenizer
    from components.extend_tokenizer.options import ExtendTokenizer
    from components.fetch_weights.fetcher import fetch_weights
    from components.fetch_weights.options import FetchWeights
    from components.train_tokenizer.options import TrainTokenizer
    from components.train_tokenizer.sentencepiece_trainer import train_tokenizer
    from pipelines.demo.base_model import make_base
    from pipelines.demo.material import prepare_material
    from zhllama.stage.run import run_stage

    material = prepare_material(Path(scratch) / "material")
    base = Path(scratch) / "base"
    make_base(material.english, material.tokenizer, base)
    fetched = run_stage(FetchWeights(store=scratch, source=str(base)), fetch_weights).reference
    model = run_stage(ConvertWeights(store=scratch, weights=fetched), convert_weights).reference
    text = str(material.text)

    def chinese(pieces: int) -> str:
        return run_stage(TrainTokenizer(store=scratch, text=text, vocab_size=pieces), train_tokenizer).reference

    few, many = chinese(5000), chinese(8000)
    options = ExtendTokenizer(store=scratch, model=model, chinese_tokenizer=few, init="normal")
    extended = run_stage(options, extend_tokenizer).reference
    found: dict[str, Any] = {"model": model, "extended": extended, "chinese": many}
    for title, one in (("the tiny LLaMA", model), ("extended before with random rows", extended)):
        found |= {f"{title} {language}": score(scratch, one, language)[0] for language in ("en", "zh")}
    return found


def course(scratch: str, model: str, chinese: str, init: str) -> list[float]:
    """One row of the table."""
    from components.extend_tokenizer.extender import extend_tokenizer
    from components.extend_tokenizer.options import ExtendTokenizer
    from components.prepare_dataset.options import PrepareDataset
    from components.prepare_dataset.preparer import prepare_dataset
    from components.pretrain.options import Pretrain
    from zhllama.artifacts.open import open_artifact
    from zhllama.stage.run import run_stage
    from zhllama.tokenizer.vocabulary import load_encoder
    from zhllama.training.stage import run_training

    before = load_encoder(open_artifact(model), "--model").size
    options: Any = {"store": scratch, "model": model, "chinese_tokenizer": chinese, "init": init}
    extended = run_stage(ExtendTokenizer(**options), extend_tokenizer).reference
    text = str(Path(scratch) / "material" / "text")
    packing = PrepareDataset(store=scratch, tokenizer=extended, text=text, block_size=256, validation_fraction=0.02)
    dataset = run_stage(packing, prepare_dataset).reference
    training: Any = {"max_steps": STEPS, "learning_rate": 4e-3, "per_device_train_batch_size": 16, "logging_steps": 1}
    training |= {"save_steps": 0, "eval_steps": 0, "deepspeed": "none", "stage": "embeddings"}
    trained = run_stage(Pretrain(store=scratch, model=extended, dataset=dataset, **training), run_training).reference
    lines = [json.loads(line) for line in open_artifact(trained).read("metrics.jsonl").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    english, given = score(scratch, extended, "en", before)
    # stage 1 publishes a model
    after = [score(scratch, trained, language)[0] for language in ("en", "zh")]
    return [english, given, score(scratch, extended, "zh")[0], losses[0], losses[-1], *after]


def score(scratch: str, model: str, language: str, before: int | None = None) -> tuple[float, float]:
    """Bits per byte of held-out text, and what is given to pieces from `before` on."""
    from pipelines.demo.material import Material
    from zhllama.artifacts.open import open_artifact
    from zhllama.data.corpus import choose_texts, read_documents
    from zhllama.data.instructions import read_instructions
    from zhllama.inference.load import load_model
    from zhllama.inference.scoring import score_text

    material = Material(*(Path(scratch) / "material" / name.replace("_", "-") for name in Material._fields))
    if language == "en":
        texts = read_documents(open_artifact(str(material.english_held_out)))
    else:
        # what is judged in them is held out of every text
        items = read_instructions(open_artifact(str(material.instructions_held_out)))
        texts = (item["input"] for item in items)
    loaded = load_model(open_artifact(model))
    found = score_text(loaded, choose_texts(texts, 40_000), language, before)
    return found["bits_per_byte"], found.get("appended_probability", 0.0)
