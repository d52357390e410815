"""What lies beside merged weights, and what the manifest says of them: the same for whatever was merged."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zhllama.artifacts.manifest import digest_of
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.models.architecture import EMBEDDING
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.special_ids import special_ids
from zhllama.tokenizer.vocabulary import Encoder, Vocabulary, padding_multiple
from zhllama.weights.chat_template import Template, default_of, is_template
from zhllama.weights.fit import require_rows
from zhllama.weights.model_config import GENERATION
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.settings import read_settings, write_settings


def write_files(
    out: ArtifactWriter, settings: Mapping[str, Any], encoder: Encoder | None, template: Template, asked: Checkpoint
) -> None:
    """config.json with these settings, the others, and tokenizer files: the encoder's, or without one those that the
    model has. asked: the model that says how it is asked: its generation settings, the ends that it names."""
    if encoder is not None:
        given = read_settings(asked)
        ids = special_ids(encoder, given, asked.where).ending(Chat(encoder, default_of(template)).end)
        write_settings(out, settings, given.get(GENERATION, {}), ids)
        positions = int(settings.get("max_position_embeddings", 2048))
        for name, content in encoder.files(positions, template).items():
            out.add_bytes(name, content)
        return
    out.add_json("config.json", settings)
    model = asked.artifact
    others = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
    for name in (GENERATION, "tokenizer.json", "tokenizer_config.json", *others, *filter(is_template, model.names)):
        if name in model:
            out.copy(model, name)


def contract_of_merged(vocabulary: Vocabulary, rows: int, tied: bool, checkpoint: Checkpoint) -> Vocabulary:
    """InputError for fewer rows than pieces."""
    require_rows(vocabulary.size, rows, checkpoint.where, "the merged model")
    multiple, dtype = padding_multiple(vocabulary.size, rows), checkpoint.info(EMBEDDING).dtype
    return replace(vocabulary, tied=tied, dtype=dtype, padding_multiple=multiple)


def changes_in(report: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """By how much each tensor changed that did."""
    changed = {name: entry for name, entry in report.items() if entry["relative_change"] or entry.get("new_rows")}
    return {name: float(entry["relative_change"]) for name, entry in changed.items()}


def state_changes(out: ArtifactWriter, changes: Mapping[str, float], checkpoint: Checkpoint) -> None:
    """Facts and metrics of weights that are all written."""
    weights, count = set(checkpoint.files), len(checkpoint.tensors)
    out.facts["weights_digest"] = digest_of([[file.path, file.sha256] for file in out.files if file.path in weights])
    out.facts["changed_tensors"] = len(changes)
    most = max(changes, key=changes.__getitem__)
    out.facts["summary"] = f"{len(changes)} of {count} tensors changed, most {most} by {changes[most]:.2%}"
    out.metrics["changed_tensors"] = float(len(changes))
    out.metrics["mean_relative_change"] = sum(changes.values()) / len(changes)
    out.metrics["greatest_relative_change"] = changes[most]
