"""Blocks of a packed dataset as people read them: decoded, each document on its own, what is masked told apart.

Without colours too: a masked part stands in ⟦ ⟧, special tokens by their names, and ⋯ stands where a document was cut.
Blocks are read by range, so that a look costs the same whatever the dataset's size.
"""

import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from zhllama.artifacts.lineage import find_input
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.data.packed import TRAIN, PackedDataset
from zhllama.errors import InputError
from zhllama.tokenizer.vocabulary import Encoder, load_encoder

if TYPE_CHECKING:
    from rich.console import RenderableType

SEED = 20


@dataclass(frozen=True)
class Shown:
    """A document in a block, or the part of one: its place, what of it is masked, and what is learned."""

    start: int
    learned_from: int
    end: int
    masked: str
    learned: str
    begins: bool
    """Whether it begins here; else it is the later part of a document that was cut."""
    ends: bool
    """Whether it, or an answer in it, ends here, with EOS or the template's end of an answer."""
    goes_on: bool = False
    """Whether it is the next turn of the conversation before it."""


def sampled_blocks(dataset: PackedDataset, count: int) -> list[int]:
    """The numbers of some blocks, in order; the same ones every time."""
    return sorted(random.Random(SEED).sample(range(len(dataset)), min(count, len(dataset))))


def shown_block(dataset: PackedDataset, index: int, encoder: Encoder) -> list[Shown]:
    """The documents of a block, in order."""
    ids, found = dataset.tokens(index).tolist(), []
    segments, further = dataset.turns(index)
    special = {encoder.eos, *encoder.special.values()}
    for (start, learned_from, end), goes_on in zip(segments.tolist(), further.tolist(), strict=True):
        # without BOS nothing tells whether a document begins here
        begins = not goes_on and (encoder.bos is None or ids[start] == encoder.bos)
        ends = ids[end - 1] in special
        first = start + len(encoder.begin) * begins
        body, prompt = ids[first : end - ends], learned_from - first
        if encoder.bos is None and begins and prompt == 1:  # the first id, which nothing foretells, is no prompt
            prompt = 0
        masked, whole = encoder.decode(body[:prompt]), encoder.decode(body)
        # a part decoded alone loses the space it begins with, so the rest is taken from the whole
        learned = whole[len(masked) :] if whole.startswith(masked) else encoder.decode(body[prompt:])
        found.append(Shown(start, learned_from, end, masked, learned, begins, ends, goes_on))
    return found


def view(artifact: Artifact, count: int, split: str = TRAIN) -> "RenderableType":
    """Some blocks of a packed dataset, for a terminal. InputError when it is none or its tokenizer is gone."""
    from rich.box import MINIMAL
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    dataset, encoder = _opened(artifact, split)
    special, beginning = "bold cyan", "".join(encoder.pieces[at] for at in encoder.begin)
    tables: list[RenderableType] = []
    for index in sampled_blocks(dataset, count):
        found = shown_block(dataset, index, encoder)
        filled, ids = found[-1].end, dataset.tokens(index).tolist()
        documents = sum(not one.goes_on for one in found)
        title = f"{split} block {index:,} of {len(dataset):,}: {documents} documents, {filled} tokens"
        if filled < dataset.block_size:
            title += f", {dataset.block_size - filled} places of padding"
        table = Table(box=MINIMAL, show_lines=True, header_style="dim", padding=(0, 1))
        for name in ("tokens", "learned"):
            table.add_column(name, justify="right", no_wrap=True, style="dim")
        table.add_column("document", overflow="fold")
        for one in found:
            text = Text.assemble(
                (beginning if one.begins else "" if one.goes_on else "⋯", special),
                (f"⟦{one.masked}⟧" if one.masked else "", "dim"),
                (one.learned, "green" if one.masked and (one.begins or one.goes_on) else ""),
                # after a thin space, where a line may be broken, so that the name stays whole
                (f"\u2009{encoder.pieces[ids[one.end - 1]]}" if one.ends else "⋯", special),
            )
            table.add_row(f"{one.start}–{one.end - 1}", str(one.end - one.learned_from), text)
        tables += [Text(f"\n{title}", "bold"), table]
    return Group(*tables)


def as_json(artifact: Artifact, count: int, split: str = TRAIN) -> list[dict[str, Any]]:
    """The same, for programs."""
    dataset, encoder = _opened(artifact, split)
    return [
        {"block": index, "documents": [asdict(found) for found in shown_block(dataset, index, encoder)]}
        for index in sampled_blocks(dataset, count)
    ]


def _opened(artifact: Artifact, split: str) -> tuple[PackedDataset, Encoder]:
    dataset = PackedDataset(artifact, split, "show", by_range=True)
    made_with = find_input(artifact.manifest, "tokenizer")
    encoder = load_encoder(open_artifact(made_with, "the tokenizer of this dataset"), "the tokenizer of this dataset")
    contract = artifact.manifest.vocabulary
    if contract is None or encoder.vocabulary().digest != contract.digest:
        raise InputError(f"{made_with}: the tokenizer there is not the one that this dataset was made with any more")
    return dataset, encoder
