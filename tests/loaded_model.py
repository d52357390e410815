"""Models loaded by reference; the stages hand `load_model` what they have opened."""

from typing import Any

from zhllama.artifacts.open import open_artifact
from zhllama.inference import load


def load_model(reference: str, adapters: str = "", **more: Any) -> load.LoadedModel:
    opened = [open_artifact(one, "--adapters") for one in adapters.split(",") if one]
    return load.load_model(open_artifact(reference, "--model"), opened, **more)
