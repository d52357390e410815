"""What is left out of the training data, and how many: always what teaches nothing or is in the validation set; on
request what is nearly a duplicate, or was seen in an evaluation.

Near-duplicates are found by MinHash (rensa, in Rust): the sets of five-character runs of two texts, estimated from 128
hashes, share over 70%. The first one stays. 24,000 reviews a second; 3 KB a document that stays, which is the one thing
in this stage whose memory grows with the corpus: ten million documents take 30 GB, so a larger corpus is taken in
parts.

An overlap is a run of 13 words, or of 13 Han characters, since a Chinese word has no border to see (GPT-3 took 13 words
too), that stands in a text of the evaluation; of a shorter text, all of it. Case, punctuation and white space do not
count. Memory: 60 bytes a word of the evaluation.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from components.prepare_dataset.examples import Examples, Kind, subject_of
from zhllama.artifacts.reader import Artifact
from zhllama.data.corpus import read_documents
from zhllama.data.instructions import NO_ITEMS, read_instructions
from zhllama.data.packed import HELD_OUT_INSTRUCTIONS
from zhllama.data.text_stream import lines_of, plain_name
from zhllama.errors import InputError

SHINGLE = 5
"""Characters of a run of a near-duplicate."""
ALIKE = 0.7
HASHES = 128
RUN = 13

_WORD = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]|[^\\W\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)
"""A Han character, or a run of other letters and digits."""


class Decontamination:
    """Of the examples of any number of sources, those trained on: `for batch in decontamination.kept(source)`."""

    def __init__(self, near_duplicates: bool = False) -> None:
        self._validation: set[bytes] = set()
        self._near = NearDuplicates() if near_duplicates else None
        self._overlap: Overlap | None = None
        self.left_out = {"fully_masked": 0, "in_validation_too": 0}
        """Why → how many, of what was read: of a mixture, some behind its end too."""
        if near_duplicates:
            self.left_out["near_duplicates"] = 0

    def hold_out(self, examples: Examples) -> None:
        """Examples of the validation set: they, and on request what is nearly one, stay out of the training data."""
        self._validation.update(map(_fingerprint, examples.identities))
        if self._near is not None:
            for content in examples.contents:
                self._near.is_one(examples.kind.text(content))

    def add_eval_set(self, texts: Iterable[str]) -> None:
        """Texts that the model will be scored on."""
        if self._overlap is None:
            self._overlap = Overlap()
            self.left_out["in_evaluation"] = 0
        for text in texts:
            self._overlap.add(text)

    def kept(self, batches: Iterable[Examples]) -> Iterator[Examples]:
        """The examples that are neither masked altogether nor known from elsewhere, batch by batch."""
        careful = bool(self._validation) or self._overlap is not None or self._near is not None
        for batch in batches:
            examples = batch.where(batch.has_loss)
            self.left_out["fully_masked"] += len(batch) - len(examples)
            if careful:
                examples = examples.where(np.fromiter(self._are_new(examples), bool, len(examples)))
            if len(examples):
                yield examples

    def _are_new(self, examples: Examples) -> Iterator[bool]:
        """Of each example, whether nothing speaks against training on it; else what does is counted."""
        for identity, content in zip(examples.identities, examples.contents, strict=True):
            why = self._known(identity, content, examples.kind)
            if why is not None:
                self.left_out[why] += 1
            yield why is None

    def _known(self, identity: bytes, content: Any, kind: Kind) -> str | None:
        if self._validation and _fingerprint(identity) in self._validation:
            return "in_validation_too"
        if self._overlap is not None and self._overlap.is_in(kind.subject(content)):
            return "in_evaluation"
        if self._near is not None and self._near.is_one(kind.text(content)):
            return "near_duplicates"
        return None


class NearDuplicates:
    """Texts so far, by their MinHash."""

    def __init__(self) -> None:
        from rensa import RMinHashDeduplicator

        self._index = RMinHashDeduplicator(threshold=ALIKE, num_perm=HASHES, use_lsh=True)
        self._count = 0

    def is_one(self, text: str) -> bool:
        """Whether a text like it was here before; if not, it is from now on."""
        plain = " ".join(text.split())
        runs = {plain[at : at + SHINGLE] for at in range(max(1, len(plain) - SHINGLE + 1))}
        self._count += 1
        return not self._index.add_pairs([(str(self._count), list(runs))])[0]


class Overlap:
    """Runs of words of texts that the model will be scored on."""

    def __init__(self) -> None:
        self._runs: set[bytes] = set()
        self._whole: set[bytes] = set()

    def add(self, text: str) -> None:
        words = _words(text)
        self._runs.update(_runs(words))
        if 0 < len(words) < RUN:
            self._whole.add(_fingerprint("\n".join(words).encode()))

    def is_in(self, text: str) -> bool:
        """Whether it has a run of words in common with one of them, or is one of the shorter ones."""
        words = _words(text)
        if len(words) < RUN:
            return _fingerprint("\n".join(words).encode()) in self._whole
        return any(run in self._runs for run in _runs(words))


def evaluation_texts(artifact: Artifact) -> Iterator[str]:
    """The texts of an evaluation: of Alpaca items (a .json file, or lines with an instruction), or text as it is."""
    if _holds_items(artifact):
        return (subject_of(item) for item in read_instructions(artifact, answered=False))
    return (document.text for document in read_documents(artifact))


def _holds_items(artifact: Artifact) -> bool:
    names = [name for name in artifact.names if name not in NO_ITEMS]
    if HELD_OUT_INSTRUCTIONS in artifact or any(plain_name(name).endswith(".json") for name in names):
        return True
    lines = [name for name in names if plain_name(name).endswith(".jsonl")]
    if not lines or len(lines) < len(names):
        return False
    try:
        value = json.loads(next(lines_of(artifact, lines[0]), b"null"))
    except ValueError as error:
        raise InputError(f"{artifact.root}/{lines[0]}: line 1 is not JSON ({error}); mend or remove it") from error
    return isinstance(value, dict) and "instruction" in value


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: list[str]) -> Iterator[bytes]:
    for at in range(len(words) - RUN + 1):
        yield _fingerprint("\n".join(words[at : at + RUN]).encode())


def _fingerprint(content: bytes) -> bytes:
    """16 bytes that stand for a content."""
    return hashlib.blake2b(content, digest_size=16).digest()
