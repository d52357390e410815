"""Held-out data in folders, the tiny model loaded, and one that was trained to judge."""

import json
import random
from pathlib import Path

import pytest

QUESTION = "判断下面这句话是好评还是差评。"
ANSWERS = ("好评", "差评")


@pytest.fixture(scope="session")
def reviews(chinese_text: list[str]) -> list[dict[str, str]]:
    """Sixty sentences to judge, half of them good; which is which is random, so only memory can know."""
    chance = random.Random(3)
    labels = [0, 1] * 30
    chance.shuffle(labels)
    return [
        {"instruction": QUESTION, "input": text[:12], "output": ANSWERS[label]}
        for text, label in zip(chinese_text, labels)
    ]


@pytest.fixture(scope="session")
def held_out(
    tmp_path_factory: pytest.TempPathFactory,
    chinese_text: list[str],
    english_text: list[str],
    reviews: list[dict[str, str]],
) -> Path:
    """A folder with zh/, en/ and instructions/: little text, the reviews, and four items with answers of their own."""
    folder = tmp_path_factory.mktemp("held-out")
    for name, lines in (("zh", chinese_text[:40]), ("en", english_text[:40])):
        (folder / name).mkdir()
        (folder / name / "text.txt").write_text("\n".join(lines) + "\n")
    own = [{"instruction": f"接着写：{text[:6]}", "input": "", "output": text[6:20]} for text in chinese_text[100:104]]
    (folder / "instructions").mkdir()
    (folder / "instructions" / "items.json").write_text(json.dumps([*reviews, *own], ensure_ascii=False))
    return folder


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, reviews: list[dict[str, str]]) -> Path:
    """The tiny model after it has learnt the reviews' labels by heart: a plain model folder."""
    import torch

    from tests.loaded_model import load_model
    from zhllama.artifacts.open import open_artifact
    from zhllama.tokenizer.prompt import RECIPE, question_of

    torch.manual_seed(1)
    trained = load_model(tiny_model)
    trained.model.requires_grad_(True)
    rows = []
    for item in reviews:
        prompt = trained.prompt_ids(RECIPE.wrap(question_of(item)))
        rows.append((prompt, [*trained.encoder.encode(item["output"]), trained.encoder.eos]))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), trained.padding)
    labels = torch.full_like(ids, -100)
    for index, (prompt, answer) in enumerate(rows):
        ids[index, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[index, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(trained.model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        trained.model(ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("judge")
    trained.model.save_pretrained(folder)
    source = open_artifact(tiny_model)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(source.read(name))
    return folder
