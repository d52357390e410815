"""A byte-level vocabulary, extended by what train_tokenizer learned of its own merges: that is a whole tokenizer, whose
first pieces, merges and rules have to be the model's. Rows of new pieces are made of the base's own segmentation.
"""

from collections.abc import Sequence

from components.extend_tokenizer.options import ExtendTokenizer
from components.extend_tokenizer.pieces import Extended
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.tokenizer.byte_level import ByteLevelEncoder
from zhllama.tokenizer.vocabulary import PAD_PIECE, Relation, load_encoder


def extended_byte_level(base: ByteLevelEncoder, given: Sequence[Artifact], config: ExtendTokenizer) -> Extended:
    """InputError for a tokenizer that was not made of this base, or gives nothing new."""
    if config.scores != "distinct" or config.pieces != "han":
        name, value = ("scores", config.scores) if config.scores != "distinct" else ("pieces", config.pieces)
        said = "a byte-level vocabulary has none to choose; train_tokenizer --scripts decides which pieces are new"
        raise InputError(f"--{name} {value}: {said}")
    if len(given) > 1:
        raise InputError(
            f"--chinese-tokenizer {config.chinese_tokenizer}: a byte-level base is extended by one; give one"
        )
    encoder = base
    for artifact in given:
        made = load_encoder(artifact, "--chinese-tokenizer")
        relation = Relation.FOREIGN
        if isinstance(made, ByteLevelEncoder):
            relation = made.vocabulary(also_at=[base.size]).relation_to(base.vocabulary())
        if not isinstance(made, ByteLevelEncoder) or relation is not Relation.EXTENDS:
            said = "it does not extend the model's byte-level vocabulary"
            mend = "give what train_tokenizer --base made of this model's tokenizer"
            raise InputError(f"--chinese-tokenizer {artifact.root}: {said}; {mend}")
        encoder = made
    if config.pad and encoder.pad is None:
        encoder = encoder.extended([], [PAD_PIECE])
    if encoder.size == base.size:
        raise InputError("nothing to append: there is padding already; give --chinese-tokenizer, or skip this stage")
    new = encoder.pieces[base.size :]
    ordinary = [piece for piece in new if piece not in encoder.added]
    missed = sum(encoder.segmented(piece) != [base.size + number] for number, piece in enumerate(ordinary))
    texts = [encoder.piece_bytes[base.size + number].decode(errors="replace") for number in range(len(ordinary))]
    return Extended(
        encoder,
        [text for text in texts if "\ufffd" not in text],
        [base.encode(piece) if piece in encoder.added else base.segmented(piece) for piece in new],
        {"pieces_before": base.size, "appended": len(new), "by_rank": base.by_rank, "unreachable": missed},
        f", {missed} of them unreachable" if missed else "",
    )
