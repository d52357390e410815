"""Do a model's weights, its tokenizer and its manifest belong together: known from headers, before a weight is read."""

from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.tokenizer.vocabulary import Encoder, Relation, Vocabulary, load_encoder, rows_fit
from zhllama.weights.safetensors_io import Checkpoint


def check_model(artifact: Artifact, option: str) -> tuple[Encoder, Vocabulary]:
    """The tokenizer of a model and its contract, after every shard's header was read.

    InputError when a shard is missing or damaged, or the embedding's rows are not the tokenizer's pieces.
    """
    encoder, vocabulary = open_encoder(artifact, option)
    if "config.json" not in artifact:
        raise InputError(f"{option} {artifact.root}: no config.json in it; a Hugging Face model folder is needed")
    rows = Checkpoint(artifact, option).info("model.embed_tokens.weight").shape[0]
    if not rows_fit(encoder.size, rows, artifact.manifest.vocabulary):
        raise InputError(
            f"{option} {artifact.root}: the embedding has {rows} rows and tokenizer.model {encoder.size} pieces; "
            "give the tokenizer that belongs to these weights"
        )
    return encoder, vocabulary


def open_encoder(artifact: Artifact, option: str) -> tuple[Encoder, Vocabulary]:
    """The tokenizer of a model or adapter, and its contract; InputError when it is not the manifest's."""
    encoder = load_encoder(artifact, option)
    stated = artifact.manifest.vocabulary
    if stated is None:
        return encoder, encoder.vocabulary()
    found = encoder.vocabulary(also_at=(int(size) for size in stated.prefixes))
    if found.relation_to(stated) is not Relation.EQUAL:
        raise InputError(
            f"{option} {artifact.root}: its tokenizer.model has {found}, its manifest says {stated}; publish it again"
        )
    return encoder, stated
