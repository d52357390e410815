"""What an extended model knows before it is trained, beside its base: bits per byte of texts, and what it gives to new
pieces where old ones come. A model whose rows are not ready says so here, and not after a training."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zhllama.artifacts.reader import Artifact
from zhllama.data.corpus import choose_texts, read_documents
from zhllama.tokenizer.vocabulary import Encoder

if TYPE_CHECKING:
    import torch

log = logging.getLogger("extend")

MOST_BYTES = 50_000
"""Of each text."""
MOST_GIVEN = 0.01
"""To new pieces, in text of which FEW tokens are such: more is taken from what the model knew."""
FEW = 0.01


def texts_of(references: Sequence[str], artifacts: Sequence[Artifact]) -> dict[str, list[str]]:
    """Reference → the documents that are measured: of each the same on every machine."""
    pairs = zip(references, artifacts, strict=True)
    return {name: choose_texts(read_documents(artifact), MOST_BYTES) for name, artifact in pairs}


def measure(
    model: Artifact, texts: Mapping[str, Sequence[str]], encoder: Encoder, tables: Mapping[str, "torch.Tensor"]
) -> list[dict[str, Any]]:
    """Of each text the figures before and after: of the base, and of the base with the extended vocabulary and its
    `tables` (name → rows, as published)."""
    import torch

    from zhllama.inference.load import load_model
    from zhllama.inference.scoring import score_text
    from zhllama.models.architecture import EMBEDDING, HEAD

    loaded = load_model(model)
    size = loaded.encoder.size
    before = {name: score_text(loaded, text, f"{name}, before") for name, text in texts.items()}
    network = loaded.model
    for layer, name in ((network.get_input_embeddings(), EMBEDDING), (network.get_output_embeddings(), HEAD)):
        rows = tables[name if name in tables else EMBEDDING]
        layer.weight = torch.nn.Parameter(rows.to(layer.weight), requires_grad=False)
    extended = replace(loaded, encoder=encoder)
    found = []
    for name, text in texts.items():
        after = score_text(extended, text, f"{name}, after", size)
        found.append({"text": name, "before": before[name], "after": after})
        one, two, given = before[name]["bits_per_byte"], after["bits_per_byte"], after["appended_probability"]
        said = f"{name}: {one:.3f} → {two:.3f} bits per byte before any training, {given:.2%} for new pieces where an "
        said += f"old one comes; tokens per character {before[name]['tokens_per_character']:.3f} → "
        said += f"{after['tokens_per_character']:.3f}"
        if after["appended_tokens"] < FEW and given > MOST_GIVEN:
            log.warning("%s: this text has lost that to rows that are not ready; try another --init", said)
        else:
            log.info("%s", said)
    return found
