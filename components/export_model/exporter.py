"""The stage: which format, and what is published."""

from components.export_model.options import ExportModel
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.stage.inputs import Inputs


def export_model(config: ExportModel, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Publishes the files. InputError for a model that the format cannot hold or the shards do not divide."""
    model = inputs["model"].require_kind("hf-model", option="--model")
    if config.format == "meta":
        from components.export_model.meta_writer import write_meta

        write_meta(model, config.shards, out)
    else:
        from components.export_model.gguf_export import export_gguf, split_kinds

        export_gguf(model, split_kinds(config.quantization), config.name, out)
    return out.publish("gguf" if config.format == "gguf" else "exported")
