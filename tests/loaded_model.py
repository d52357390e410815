"""Models loaded by reference; the stages hand `load_model` what they have opened."""

from typing import Any

from zhllama.artifacts.open import open_artifact
from zhllama.inference import load


def load_model(reference: str, adapters: str = "", **more: Any) -> load.LoadedModel:
    opened = [open_artifact(one, "--adapters") for one in adapters.split(",") if one]
    return load.load_model(open_artifact(reference, "--model"), opened, **more)


def plain_log_probs(loaded: load.LoadedModel, prompt: list[int], answer: list[int]) -> Any:
    """(answer,): natural log-probabilities, from transformers' own forward with all logits."""
    import torch

    with torch.inference_mode():
        logits = loaded.model(torch.tensor([prompt + answer])).logits[0].double()
    found = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return found.gather(1, torch.tensor(answer)[:, None])[:, 0]
