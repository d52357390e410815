"""What the scripts of programs that stand on transformers share."""

from typing import Any

import numpy as np
import torch
from common import CHATS, LINES, probe, texts
from transformers import AutoModelForCausalLM


def load(folder: str) -> Any:
    """In float32; the word for the dtype is transformers 4's, which 5 still knows."""
    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()


def logits(model: Any, of: str) -> list[np.ndarray]:
    model = model.eval().float()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].float().numpy() for ids in texts(of)]


def chat_ids(tokenizer: Any) -> list[list[int]]:
    """As servers and trainers call it; transformers 5 returns a mapping where 4 gave the ids."""
    found = [tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True) for chat in CHATS]
    return [list(ids if isinstance(ids, list) else ids["input_ids"]) for ids in found]


def ids(tokenizer: Any, of: str = "") -> dict[str, Any]:
    """Of the probe too, of a model that has one."""
    told = {"ids": LINES, "probe": probe(of)}
    return {name: [tokenizer(line)["input_ids"] for line in lines] for name, lines in told.items()} | {
        "chats": chat_ids(tokenizer)
    }
