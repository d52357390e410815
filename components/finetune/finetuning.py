"""Supervised fine-tuning: LoRA on the seven projections, the loss on answers alone.

The embeddings stay as continued pre-training left them, so that an engine can serve the adapter as it is; where there
was none, `--train-embeddings` trains them in full as the recipe does. An adapter that is continued keeps its shape.
"""

from components.finetune.options import Finetune
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.stage.inputs import Inputs
from zhllama.training.elastic import run_training


def finetune(config: Finetune, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    return run_training(config, inputs, out)
