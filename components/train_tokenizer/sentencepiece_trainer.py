"""SentencePiece BPE on Chinese text, with settings that suit an extension of LLaMA's vocabulary.

Identity normalisation, since LLaMA's own normaliser encodes later: nmt_nfkc would fold ，：；！？（） into ASCII and
leave no pieces for them. 7.4 MB of reviews: 8,000 pieces in a second. The trainer holds its text in memory; of a larger
corpus it gets a seeded sample, and the report says so. Equal text gives equal bytes on every machine.
"""

import io
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from components.train_tokenizer.options import TrainTokenizer
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.corpus import Skipped, read_documents, text_files
from zhllama.data.text_stream import bytes_to_read
from zhllama.errors import InputError
from zhllama.progress import Progress
from zhllama.stage.inputs import Inputs
from zhllama.tokenizer.byte_level import ByteLevelEncoder
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import TOKENIZER_MODEL
from zhllama.tokenizer.vocabulary import Encoder, load_encoder

log = logging.getLogger("train_tokenizer")

LONGEST = 1000
"""Characters of a training line; UTF-8 takes at most four bytes each, and the trainer skips lines over 4,192 bytes."""
RESERVED = "\u2585"
"""▅, the trainer's own sign: it skips a line that holds one. Lines are cut there, and the sign is spelt in bytes."""
THREADS = 16
"""The trainer writes this number into the model, so it must not depend on the machine."""
REPORT_LINES = 5000
EXAMPLES = 10


def train_tokenizer(config: TrainTokenizer, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Publishes `tokenizer.model` and `report.json`. InputError for a corpus that cannot give that many pieces."""
    skipped = Skipped() if config.skip_bad else None
    lines, seen = sampled(training_lines(inputs.all("text"), skipped), config.sample_lines, config.seed)
    log.info("training %d pieces on %d of %d lines", config.vocab_size, len(lines), seen)
    encoder: Encoder
    facts: dict[str, Any] = {}
    if config.base:
        encoder, facts = extension(config, inputs["base"], lines)
    else:
        encoder = SentencePieceEncoder(
            trained(lines, config.vocab_size, config.character_coverage, f"--text {config.text}")
        )
    report = report_on(encoder, lines[:: max(1, len(lines) // REPORT_LINES)])
    sample = {
        "lines": seen,
        "lines_trained_on": len(lines),
        "sampled": len(lines) < seen,
        "seed": config.seed,
        "bad_lines": skipped.count if skipped else 0,
    }
    for name, content in artifact_files(encoder).items():
        out.add_bytes(name, content)
    out.add_json("report.json", report | facts | {"corpus": sample}, beside=True)
    out.vocabulary = encoder.vocabulary(also_at=[facts["pieces_before"]] if facts else [])
    before = f"{facts['pieces_before']:,} → " if facts else ""
    summary = f"{before}{encoder.size:,} pieces, {report['tokens_per_character']:.3f} tokens per character"
    if len(lines) < seen:
        summary += f", from a sample of {len(lines):,} of {seen:,} lines"
    out.facts = {"summary": summary, **sample, **facts}
    out.metrics = {name: report[name] for name in ("tokens_per_character", "coverage")}
    return out.publish("tokenizer")


def artifact_files(encoder: Encoder) -> dict[str, bytes]:
    return {TOKENIZER_MODEL: encoder.model} if isinstance(encoder, SentencePieceEncoder) else encoder.files()


def extension(config: TrainTokenizer, base: Artifact, lines: list[str]) -> tuple[Encoder, dict[str, Any]]:
    """The base's tokenizer with new pieces, and what is said of it. InputError for one without merges of its own."""
    from components.train_tokenizer.continued_merges import Scripts, continued

    before = load_encoder(base, "--base")
    if not isinstance(before, ByteLevelEncoder):
        said = "its tokenizer is SentencePiece's, to which the pieces of another model are appended"
        raise InputError(f"--base {base.root}: {said}; leave --base out")
    learned = continued(before, lines, config.vocab_size, Scripts(config.scripts), f"--text {config.text}")
    after = before.extended(learned.merges)
    tokens = [sum(map(len, one.encode_batch(lines[:: max(1, len(lines) // REPORT_LINES)]))) for one in (before, after)]
    facts = {
        "pieces_before": before.size,
        "scripts": config.scripts,
        "by_rank": before.by_rank,
        "ambiguous": learned.ambiguous,
        "tokens_before": tokens[0],
        "tokens_after": tokens[1],
    }
    return after, facts


def training_lines(corpus: Sequence[Artifact], skipped: Skipped | None) -> Iterator[str]:
    """The texts in lines that the trainer takes, none longer than LONGEST characters."""
    with Progress("reading", bytes_to_read(corpus, text_files)) as bar:
        for text in corpus:
            for document in read_documents(text, skipped=skipped):
                for line in document.replace(RESERVED, "\n").splitlines():
                    yield from (line[at : at + LONGEST] for at in range(0, len(line), LONGEST))
                bar.advance(len(document.encode()) + 1)


def sampled(lines: Iterable[str], limit: int, seed: int) -> tuple[list[str], int]:
    """At most `limit` of the lines, each as likely as any other (Vitter's algorithm R), and how many there were."""
    chance = random.Random(seed)
    kept: list[str] = []
    seen = 0
    for seen, line in enumerate(lines, start=1):
        if len(kept) < limit:
            kept.append(line)
        elif (place := chance.randrange(seen)) < limit:
            kept[place] = line
    return kept, seen


def trained(lines: list[str], vocab_size: int, coverage: float, where: str) -> bytes:
    """The bytes of a `tokenizer.model`; InputError when these lines cannot give `vocab_size` pieces."""
    import sentencepiece

    made = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=made,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        said, asked = str(error), f"{vocab_size} were asked for"
        why = f"SentencePiece cannot train on this text ({said}); give ordinary text, UTF-8"
        if found := re.search(r"too high .*<= (\d+)", said):
            why = f"the text gives {found[1]} pieces at most, {asked}; lower --vocab-size to that, or give more text"
        elif found := re.search(r"required_chars\. \d+ vs (\d+)", said):
            why = f"the text's characters alone take {found[1]} pieces, {asked}; raise --vocab-size above that, or "
            why += "lower --character-coverage"
        raise InputError(f"{where}: {why}") from error
    return made.getvalue()


def report_on(encoder: Encoder, lines: list[str]) -> dict[str, Any]:
    """Tokens per character, the share of characters with a piece of their own, and lines with their pieces."""
    encoded = encoder.encode_batch(lines)
    characters = sum(len(line) for line in lines)
    known = {" ", *(text for text in encoder.texts if len(text) == 1)}
    return {
        "pieces": encoder.size,
        "lines": len(lines),
        "characters": characters,
        "tokens_per_character": round(sum(map(len, encoded)) / characters, 5),
        "coverage": round(sum(letter in known for line in lines for letter in line) / characters, 6),
        "byte_tokens": sum(index in encoder.fragments for ids in encoded for index in ids),
        "examples": [
            {"text": line[:200], "pieces": [encoder.pieces[index] for index in encoder.encode(line[:200])]}
            for line in lines[:EXAMPLES]
        ],
    }
