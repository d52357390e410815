"""The two phases of the recipe's continued pre-training.

`embeddings` trains embed_tokens alone, so that new pieces find their place before anything else moves: 3% of the
parameters of a 7B model. `lora` trains LoRA on the seven projections, and embed_tokens and lm_head in full: 6%.
"""

from components.pretrain.options import Pretrain
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.stage.inputs import Inputs
from zhllama.training.elastic import run_training


def pretrain(config: Pretrain, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    return run_training(config, inputs, out)
