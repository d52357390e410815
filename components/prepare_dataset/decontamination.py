"""What is left out of the training data, and how many: always what teaches nothing or is in the validation set; on
request what is nearly a duplicate, or was seen in an evaluation.

Near-duplicates are found by MinHash (rensa, in Rust): the sets of five-character runs of two texts, estimated from 128
hashes, share over 70%. The first one stays. 24,000 reviews a second; 3 KB a document that stays, the one thing in this
stage whose memory grows with the corpus (ten million documents take 30 GB: a larger corpus is taken in parts). An
overlap is a run of 13 words, or of 13 Han characters (GPT-3 took 13 words too), that stands in a text of the
evaluation; of a shorter text, all of it. Case, punctuation and white space do not count. 60 bytes a word of it.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from components.prepare_dataset.examples import Examples
from zhllama.artifacts.reader import Artifact
from zhllama.data.conversations import Item, texts_of
from zhllama.data.corpus import read_documents
from zhllama.data.instructions import is_item, read_instructions
from zhllama.data.json_values import values_in
from zhllama.data.packed import HELD_OUT_INSTRUCTIONS
from zhllama.data.text_stream import NO_ITEMS, plain_name
from zhllama.errors import InputError
from zhllama.tokenizer.han import HAN

SHINGLE = 5
"""Characters of a run of a near-duplicate."""
ALIKE = 0.7
HASHES = 128
RUN = 13

_WORD = re.compile(f"[{HAN}]|[^\\W\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")
"""A Han character, or a run of other letters and digits."""


class Decontamination:
    """Of the examples of any number of sources, those trained on: `for batch in decontamination.kept(source)`."""

    def __init__(self, near_duplicates: bool = False) -> None:
        self._validation: set[bytes] = set()
        self._near = NearDuplicates() if near_duplicates else None
        self._evaluated: set[bytes] = set()
        near = {"near_duplicates": 0} if near_duplicates else {}
        self.left_out = {"fully_masked": 0, "in_validation_too": 0, **near}
        """Why → how many, of what was read: of a mixture, some behind its end too."""

    def hold_out(self, examples: Examples) -> None:
        """Examples of the validation set: they, and on request what is nearly one, stay out of the training data."""
        self._validation.update(map(_fingerprint, examples.identities))
        if self._near is not None:
            for content in examples.contents:
                self._near.is_one(_text_of(content))

    def add_eval_set(self, texts: Iterable[str]) -> None:
        """Texts that the model will be scored on."""
        self.left_out["in_evaluation"] = 0
        self._evaluated.update(run for text in texts for run in runs(text))

    def kept(self, batches: Iterable[Examples]) -> Iterator[Examples]:
        """The examples that are neither masked altogether nor known from elsewhere, batch by batch."""
        for batch in batches:
            examples = batch.where(batch.has_loss)
            self.left_out["fully_masked"] += len(batch) - len(examples)
            if self._validation or self._evaluated or self._near is not None:
                known = map(self._known, examples.identities, examples.contents)
                examples = examples.where(~np.fromiter(known, bool, len(examples)))
            if len(examples):
                yield examples

    def _known(self, identity: bytes, content: Any) -> bool:
        """Whether something speaks against training on it, which then is counted."""
        if self._validation and _fingerprint(identity) in self._validation:
            why = "in_validation_too"
        elif self._evaluated and not self._evaluated.isdisjoint(runs(_subject_of(content))):
            why = "in_evaluation"
        elif self._near is not None and self._near.is_one(_text_of(content)):
            why = "near_duplicates"
        else:
            return False
        self.left_out[why] += 1
        return True


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


def runs(text: str) -> Iterator[bytes]:
    """The runs of words of a text, of which two texts that overlap have one in common; of a shorter text, all of it."""
    words = _WORD.findall(text.lower())
    for at in range(max(bool(words), len(words) - RUN + 1)):
        yield _fingerprint("\n".join(words[at : at + RUN]).encode())


def evaluation_texts(artifact: Artifact) -> Iterator[str]:
    """The texts of an evaluation: of Alpaca items (a .json file, or lines with an instruction), or text as it is."""
    names = [name for name in artifact.names if name not in NO_ITEMS]
    items = HELD_OUT_INSTRUCTIONS in artifact
    if not items and (of_json := [name for name in names if plain_name(name).endswith((".json", ".jsonl"))]):
        _, first = next(values_in(artifact, of_json[0], "objects are needed", lambda one: True), ("", None))
        if isinstance(first, InputError):
            raise first
        lists = any(plain_name(name).endswith(".json") for name in names)
        text = isinstance(first, dict) and "text" in first and not is_item(first)
        items = (lists or len(of_json) == len(names)) and not text
    if items:
        return map(_subject_of, read_instructions(artifact, answered=False))
    return read_documents(artifact)


def _text_of(content: str | Item) -> str:
    """What near-duplicates are found by: the text; of an item, all of it."""
    return content if isinstance(content, str) else "\n".join(texts_of(content))


def _subject_of(content: str | Item) -> str:
    """What must not be seen before an evaluation: the text; of an item, its input, without which its instruction (many
    items share one, so that it says nothing), and its answer, and all turns before it."""
    if isinstance(content, str):
        return content
    before = (text for pair in content.get("history", ()) for text in pair)
    return "\n".join([*before, content["input"] or content["instruction"], content["output"]])


def _fingerprint(content: bytes) -> bytes:
    """16 bytes that stand for a content."""
    return hashlib.blake2b(content, digest_size=16).digest()
