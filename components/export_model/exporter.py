"""The stage: which format, and what is published."""

from dataclasses import dataclass
from typing import Literal

from components.shared.artifact import ArtifactWriter, Manifest, open_artifact
from components.shared.cli import Ref, StageOptions
from components.shared.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ExportModel(StageOptions):
    """Export a Hugging Face model to another format."""

    model: Ref
    """Reference to the Hugging Face model."""
    format: Literal["meta"] = "meta"
    """meta: Meta's checkpoint (consolidated.NN.pth, params.json)."""
    shards: int = 0
    """Files that the model is cut into. 0: as many as Meta's own of this size (7B 1, 13B 2, 30B 4, 65B 8; else 1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.shards <= 64:
            raise InputError(f"--shards {self.shards}: give 1 to 64, or 0 for as many as Meta's own files")


def export_model(config: ExportModel, out: ArtifactWriter) -> Manifest:
    """Publishes the files. InputError for a model that the format cannot hold or the shards do not divide."""
    from components.export_model.meta_writer import write_meta

    write_meta(open_artifact(config.model, "--model").expect("hf-model", option="--model"), config.shards, out)
    return out.publish("exported")
