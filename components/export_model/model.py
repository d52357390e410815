"""The model to export: what its headers and small files say, checked for either format before a weight is read."""

from dataclasses import dataclass
from typing import Any

from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.models import architecture
from zhllama.models.architecture import EMBEDDING, HEAD, Architecture
from zhllama.models.rope import Rope
from zhllama.tokenizer.vocabulary import Encoder, load_encoder
from zhllama.weights.fit import require_rows
from zhllama.weights.model_config import model_config
from zhllama.weights.safetensors_io import Checkpoint, TensorInfo
from zhllama.weights.ties import is_tied


@dataclass(frozen=True)
class Exported:
    """A model that is exported. `config`: config.json as model_config gives it."""

    artifact: Artifact
    checkpoint: Checkpoint
    encoder: Encoder
    architecture: Architecture
    config: dict[str, Any]
    rope: Rope
    tied: bool

    @property
    def where(self) -> str:
        return f"--model {self.artifact.root}"

    def info(self, name: str) -> TensorInfo:
        """Of a tied model's head, which is not in the file, the embedding's."""
        return self.checkpoint.info(EMBEDDING if name == HEAD and self.tied else name)


def open_model(model: Artifact) -> Exported:
    """InputError for what is no model, or damaged, or of another tokenizer."""
    where = f"--model {model.root}"
    checkpoint = Checkpoint(model)
    checkpoint.refuse_quantised()
    config = model_config(checkpoint)
    encoder = load_encoder(model, "--model")
    rows = checkpoint.info(EMBEDDING).shape[0]
    require_rows(encoder.size, rows, where, "the model")
    its = architecture(config, where)
    return Exported(model, checkpoint, encoder, its, config, Rope.of(config, where), is_tied(checkpoint))


def require_rope(model: Exported, form: str, done: tuple[str, ...]) -> None:
    """InputError for rotary positions that a form (as `Meta's format`) cannot say."""
    if model.rope.kind not in done:
        said = f"config.json stretches the rotary positions ({model.rope.kind}), which is not exported to {form}"
        raise InputError(f"{model.where}: {said}")
