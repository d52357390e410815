"""A vocabulary and its model, extended: new pieces, new rows, everything else as it was.

Only the file with embed_tokens and lm_head is written, streaming; the others are copied, server-side within a store.
32,000 → 49,954 pieces × 4096 take seconds and one old table of memory; resize_token_embeddings took minutes.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

from components.extend_tokenizer.byte_level import extended_byte_level
from components.extend_tokenizer.embedding_rows import new_rows
from components.extend_tokenizer.measure import measure, texts_of
from components.extend_tokenizer.options import ExtendTokenizer
from components.extend_tokenizer.pieces import extended_sentencepiece
from zhllama import storage
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.models import architecture
from zhllama.models.architecture import EMBEDDING, HEAD
from zhllama.progress import Progress
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import split_references
from zhllama.tokenizer.byte_level import ByteLevelEncoder
from zhllama.tokenizer.prompt import DEFAULT
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.special_ids import special_ids
from zhllama.tokenizer.vocabulary import PAD_PIECE, Encoder, Vocabulary, load_encoder, mixtures, padding_multiple
from zhllama.weights.chat_template import chosen
from zhllama.weights.fit import require_rows
from zhllama.weights.model_card import write_card
from zhllama.weights.model_config import GENERATION, model_config
from zhllama.weights.safetensors_io import INDEX, Checkpoint, SafetensorsStream, index_json, shard_file
from zhllama.weights.settings import read_settings, write_settings
from zhllama.weights.ties import is_tied

if TYPE_CHECKING:
    import torch


def extend_tokenizer(config: ExtendTokenizer, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Publishes the extended model. InputError for models or tokenizers that do not fit or give nothing new."""
    import torch

    model = inputs["model"].require_kind("hf-model", option="--model")
    base = load_encoder(model, "--model")
    checkpoint = Checkpoint(model)
    settings = model_config(checkpoint)
    tables = [EMBEDDING] if is_tied(checkpoint) else [EMBEDDING, HEAD]
    checkpoint.refuse_quantised(tables)
    for table in tables:
        require_rows(base.size, checkpoint.info(table).shape[0], checkpoint.where, table)
    spare = checkpoint.info(EMBEDDING).shape[0]
    chinese = inputs.all("chinese_tokenizer")
    if isinstance(base, ByteLevelEncoder):
        extension = extended_byte_level(base, chinese, config)
    else:
        extension = extended_sentencepiece(cast(SentencePieceEncoder, base), chinese, config)
    encoder = extension.encoder
    # spare rows are filled first
    rows = max(-(-encoder.size // config.pad_to_multiple_of) * config.pad_to_multiple_of, spare)
    out.vocabulary = vocabulary = encoder.vocabulary(
        also_at=(base.size, encoder.size - 1),
        tied=len(tables) == 1,
        dtype=checkpoint.info(EMBEDDING).dtype,
        padding_multiple=padding_multiple(encoder.size, rows) if rows == spare else config.pad_to_multiple_of,
    )

    texts = texts_of(split_references(config.measure), inputs.all("measure"))
    weights = [info for name, info in checkpoint.tensors.items() if name not in (EMBEDDING, HEAD)]
    row_bytes = sum(checkpoint.info(table).length // checkpoint.info(table).shape[0] for table in tables)
    storage.require_room(out.root, sum(info.length for info in weights) + vocabulary.rows * row_bytes)

    # what will be taught: an engine that lays an adapter over a base asks with the base's template
    template, why = chosen(model, otherwise=DEFAULT)
    files = encoder.files(settings.get("max_position_embeddings", 2048), template)
    for name, content in files.items():
        out.add_bytes(name, content)
    given = read_settings(checkpoint)
    ids = special_ids(encoder, given, checkpoint.where)
    sizes = {"vocab_size": vocabulary.rows, "tie_word_embeddings": vocabulary.tied}
    write_settings(out, settings | sizes, given.get(GENERATION, {}), ids)
    _write_weights(out, checkpoint, vocabulary, extension.splits, config)

    kind = architecture(settings, checkpoint.where).title
    pieces = encoder.size - base.size
    made = f"A {kind} model whose vocabulary was extended by {pieces:,} pieces, not yet trained."
    write_card(out, model, made, {"Vocabulary": f"{encoder.size:,} pieces", "Chat template": why})

    lines = probe(extension.texts, config.seed)
    differ = differing(files, encoder, lines)
    out.facts = extension.facts | {"chat_template": why, "parity": {"lines": len(lines), "differ": differ}}
    if texts:
        tables_now = _tables(checkpoint, vocabulary, extension.splits, config)
        tables_of = {name: torch.cat(list(chunks)) for name, chunks in tables_now}
        out.facts["measured"] = measure(model, texts, encoder, tables_of)
    said = [
        (vocabulary.rows > encoder.size, f" in {vocabulary.rows:,} rows"),
        (differ, f", fast tokenizer differs on {differ} of {len(lines)} probe lines"),
    ]
    more = extension.said + "".join(text for holds, text in said if holds)
    out.facts["summary"] = f"{base.size:,} → {encoder.size:,} pieces{more}"
    return out.publish("hf-model")


def probe(texts: Sequence[str], seed: int) -> list[str]:
    """Of the parity: probe.txt (Chinese, English, code, white space, emoji, rare scripts), and lines made of the
    appended pieces, where ties would show."""
    lines = Path(__file__).with_name("probe.txt").read_text("utf-8").split("\n")
    pieces = [text for text in texts if text != PAD_PIECE]
    return lines + (mixtures(pieces, 400, seed) if pieces else [])


def differing(files: dict[str, bytes], encoder: Encoder, lines: Sequence[str]) -> int:
    """How many lines the fast tokenizer of `files` encodes otherwise than BOS and the encoder's ids: none of them
    with distinct scores, many with zero scores."""
    from zhllama.tokenizer.fast_tokenizer import load_fast

    return encoder.differing(lines, (found.ids for found in load_fast(files).encode_batch(list(lines))))


def _write_weights(
    out: ArtifactWriter, checkpoint: Checkpoint, vocabulary: Vocabulary, new: list[list[int]], config: ExtendTokenizer
) -> None:
    """The embeddings with their new rows into a file of their own; every other tensor as it is; the index."""
    tables = {name: checkpoint.info(name) for name in ([EMBEDDING] if vocabulary.tied else [EMBEDDING, HEAD])}
    declared = {name: (info.dtype, (vocabulary.rows, *info.shape[1:])) for name, info in tables.items()}
    # a tied model may still carry an lm_head, which nobody reads: it is left behind
    rest = {name: info for name, info in checkpoint.tensors.items() if name not in (EMBEDDING, HEAD)}
    files = sorted({info.file for info in rest.values()})
    count = 1 + len(files)
    embeddings_file = shard_file(1, count)
    place_of = dict.fromkeys(tables, embeddings_file)
    written = 0
    with Progress("extending", sum(info.length for info in checkpoint.tensors.values())) as bar:
        with out.writer(embeddings_file) as stream:
            tensors = SafetensorsStream(stream, declared)
            for name, chunks in _tables(checkpoint, vocabulary, new, config):
                for rows in chunks:
                    tensors.write(name, rows)
                written += vocabulary.rows * rows[0].nbytes
                bar.advance(tables[name].length)
            tensors.close()
        for number, file in enumerate(files, 2):
            kept, target = {name: info for name, info in rest.items() if info.file == file}, shard_file(number, count)
            if len(kept) == sum(info.file == file for info in checkpoint.tensors.values()):
                out.copy(checkpoint.artifact, file, target)
            else:
                with out.writer(target) as stream:
                    tensors = SafetensorsStream(stream, {name: (info.dtype, info.shape) for name, info in kept.items()})
                    for name in kept:
                        tensors.write(name, checkpoint.read(name))
                    tensors.close()
            place_of |= dict.fromkeys(kept, target)
            size_kept = sum(info.length for info in kept.values())
            written += size_kept
            bar.advance(size_kept)
    out.add_bytes(INDEX, index_json(place_of, written))


def _tables(
    checkpoint: Checkpoint, vocabulary: Vocabulary, new: list[list[int]], config: ExtendTokenizer
) -> Iterator[tuple[str, Iterator["torch.Tensor"]]]:
    """Each table's name and its rows in chunks: old ones, new ones, spare ones as they were, those that fill it up."""
    import torch

    generator = torch.Generator().manual_seed(config.seed)
    here = checkpoint.info(EMBEDDING).shape[0]
    filling: list[list[int]] = [[]] * (vocabulary.rows - max(vocabulary.size, here))
    for name in [EMBEDDING] if vocabulary.tied else [EMBEDDING, HEAD]:
        old = checkpoint.read(name, 0, vocabulary.size - len(new))
        spare = [checkpoint.read(name, vocabulary.size)] if here > vocabulary.size else []
        # the mean of all rows has an average logit; that of a row of zeros, 0, is often the highest
        unused = new_rows(old, filling, "mean", generator)
        yield name, chain([old], new_rows(old, new, config.init, generator), spare, unused)
