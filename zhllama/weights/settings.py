"""config.json and generation_config.json of a model that is published: one writer for every stage that does.

The special ids are those of the one rule (zhllama/tokenizer/special_ids.py), and who wrote a configuration stays named.
"""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from zhllama.artifacts.writer import ArtifactWriter
from zhllama.tokenizer.special_ids import SpecialIds, special_ids
from zhllama.tokenizer.vocabulary import Encoder
from zhllama.weights.model_config import CONFIG, GENERATION, model_config
from zhllama.weights.safetensors_io import Checkpoint


def read_settings(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """config.json and generation_config.json, as far as they are there. InputError for one that is none."""
    config = {CONFIG: model_config(checkpoint)} if CONFIG in checkpoint.artifact else {}
    return config | ({GENERATION: checkpoint.settings(GENERATION)} if GENERATION in checkpoint.artifact else {})


def ids_of(checkpoint: Checkpoint, encoder: Encoder) -> SpecialIds:
    """A model's special ids: its tokenizer's, with one line in the log where its files disagree."""
    return special_ids(encoder, read_settings(checkpoint), checkpoint.where)


def write_settings(
    out: ArtifactWriter, config: Mapping[str, Any], generation: Mapping[str, Any], ids: SpecialIds
) -> None:
    """Both files, with these ids."""
    out.add_json(CONFIG, {"transformers_version": importlib.metadata.version("transformers"), **config, **ids.config})
    out.add_json(GENERATION, ids.generation(generation))
