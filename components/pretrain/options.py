"""The two phases of the recipe's continued pre-training.

`embeddings` trains embed_tokens alone, so that new pieces find their place before anything else moves: 3% of the
parameters of a 7B model. `lora` trains LoRA on the seven projections, and embed_tokens and lm_head in full: 6%.
"""

from dataclasses import dataclass

from zhllama.training.options import PretrainOptions


@dataclass(frozen=True, kw_only=True)
class Pretrain(PretrainOptions):
    """Continue the pre-training of a model on text: its embeddings alone, or LoRA and embeddings."""
