"""Text or Alpaca items → packed blocks, streaming: a window of documents in memory, whatever the corpus's size.

The recipe's way (tokenise into Arrow, group by 1,000 lines, save) takes 36 bytes a token and over five times as long;
this one two: `make bench ONLY=prepare_dataset` prints both.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from components.prepare_dataset.options import PrepareDataset
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.corpus import Skipped, bytes_of_text, read_batches, total_of
from zhllama.data.instructions import bytes_of_instructions, read_instructions
from zhllama.data.packed import HELD_OUT_INSTRUCTIONS, HELD_OUT_TEXT, KIND, TRAIN, VALIDATION, Blocks
from zhllama.data.packed_writer import PackedWriter, packed_facts
from zhllama.errors import InputError
from zhllama.progress import Progress
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import weighted_references
from zhllama.tokenizer.vocabulary import Encoder, load_encoder

if TYPE_CHECKING:
    from components.prepare_dataset.examples import Examples


def prepare_dataset(config: PrepareDataset, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Publishes the packed dataset. InputError for data that is not there, malformed, or leaves a split empty."""
    from components.prepare_dataset.decontamination import Decontamination, evaluation_texts
    from components.prepare_dataset.mixture import Source, held_out, mixed

    tokenizer = inputs["tokenizer"].require_kind("tokenizer", "hf-model", "adapter", option="--tokenizer")
    encoder = load_encoder(tokenizer, "--tokenizer")
    weights = [weight for _, weight in weighted_references(config.data)]
    given = list(zip(inputs.all(config.option[2:]), weights, strict=True))
    skipped = Skipped()
    decontamination = Decontamination(config.drop_near_duplicates)
    sources = [
        Source(decontamination.kept(_examples(config, artifact, encoder, skipped)), weight)
        for artifact, weight in given
    ]
    for artifact in inputs.all("evaluation"):
        decontamination.add_eval_set(evaluation_texts(artifact))

    fraction = 0.0 if config.validation else config.validation_fraction
    with ExitStack() as stack:
        train, validation = (_Split(name, config, out, encoder, stack) for name in (TRAIN, VALIDATION))
        if config.validation:
            for examples in _examples(config, inputs["validation"], encoder, skipped):
                decontamination.hold_out(examples)
                validation.add(examples.where(examples.has_loss))
        bar = stack.enter_context(Progress("packing", _bytes_to_read(config, [artifact for artifact, _ in given])))
        for examples in mixed(sources):
            bar.advance(sum(map(len, examples.identities)) + len(examples))
            if fraction:
                held = held_out(examples.identities, fraction, config.seed)
                validation.add(examples.where(held))
                examples = examples.where(~held)
            train.add(examples)
        train.finish()
        validation.finish()
    left_out = decontamination.left_out | ({"bad": skipped.count} if config.skip_bad else {})
    _check(config, train, validation, left_out)

    contract = tokenizer.manifest.vocabulary
    out.vocabulary = encoder.vocabulary(also_at=[int(size) for size in contract.prefixes] if contract else ())
    tokens = train.packed.tokens + validation.packed.tokens
    characters = train.characters + validation.characters
    out.facts = packed_facts(config.block_size, encoder.size, _pad(encoder), [train.packed, validation.packed])
    out.facts |= {
        "documents": train.examples,
        "held_out": validation.examples,
        "left_out": left_out,
        "first_bad": skipped.first,
        "sources": [
            {"weight": source.weight, "taken": source.taken, "tokens": source.tokens, "used_up": source.used_up}
            for source in sources
        ],
        "summary": f"{train.packed.blocks:,} + {validation.packed.blocks:,} blocks of {config.block_size}, "
        f"{100 * train.packed.packing_efficiency:.1f}% filled, {tokens:,} tokens{_said(left_out)}",
    }
    out.metrics = {
        "fill": train.packed.packing_efficiency,
        "tokens": float(tokens),
        "tokens_per_character": tokens / characters,
    }
    return out.publish(KIND)


def _examples(config: PrepareDataset, artifact: Artifact, encoder: Encoder, skipped: Skipped) -> Iterator["Examples"]:
    from components.prepare_dataset.examples import instruction_examples, text_examples
    from components.prepare_dataset.line_groups import line_groups

    bad = skipped if config.skip_bad else None
    if config.instructions:
        return instruction_examples(read_instructions(artifact, skipped=bad), encoder, config.block_size)
    if config.packing == "faithful":
        lines = text_examples(read_batches(artifact, keep_blank=True, skipped=bad), encoder, end=False)
        return line_groups(lines, config.block_size, encoder)
    return text_examples(read_batches(artifact, skipped=bad), encoder)


def _bytes_to_read(config: PrepareDataset, artifacts: list[Artifact]) -> int | None:
    """None where one of them says only in the end how much it was."""
    size_of = bytes_of_text if config.text else bytes_of_instructions
    return total_of([size_of(artifact) for artifact in artifacts])


def _said(left_out: dict[str, int]) -> str:
    """What was left out and why, for people; nothing when nothing was."""
    counted = ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in left_out.items() if count)
    return f"; left out: {counted}" if counted else ""


def _pad(encoder: Encoder) -> int:
    return encoder.eos if encoder.pad is None else encoder.pad


class _Split:
    """One split in the making: packs its examples, and keeps the records of those that are held out."""

    def __init__(
        self, name: str, config: PrepareDataset, out: ArtifactWriter, encoder: Encoder, stack: ExitStack
    ) -> None:
        from components.prepare_dataset.best_fit import BestFit

        self.packed = stack.enter_context(
            PackedWriter(out, name, config.block_size, encoder.size, _pad(encoder), prompts=bool(config.instructions))
        )
        self.examples = self.characters = 0
        self._block_size = config.block_size
        self._packer = BestFit(config.block_size) if config.packing == "best-fit" else None
        self._records: _Records | None = None
        if name == VALIDATION and config.holds_out:
            self._records = stack.enter_context(_Records(out, as_list=bool(config.instructions)))

    def add(self, examples: "Examples") -> None:
        import numpy as np

        self.examples += len(examples)
        self.characters += int(examples.characters.sum())
        if self._records is not None:
            self._records.write(examples.records())
        if self._packer is None:
            self.packed.write_blocks(Blocks(examples.segments, np.ones(len(examples), np.int64)))
            return
        for blocks in self._packer.add(examples.segments):
            self.packed.write_blocks(blocks)

    def finish(self) -> None:
        if self._packer is not None:
            for blocks in self._packer.finish():
                self.packed.write_blocks(blocks)


class _Records:
    """The held-out file: JSON Lines for text, a JSON list for Alpaca items."""

    def __init__(self, out: ArtifactWriter, as_list: bool) -> None:
        self._file = out.writer(HELD_OUT_INSTRUCTIONS if as_list else HELD_OUT_TEXT)
        self._as_list = as_list
        self._first = True

    def write(self, records: Iterator[str]) -> None:
        for record in records:
            if self._as_list:
                self._file.write(("[\n" if self._first else ",\n").encode() + record.encode())
                self._first = False
            else:
                self._file.write(record.encode() + b"\n")

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._as_list:
            self._file.write(b"[]\n" if self._first else b"\n]\n")
        self._file.__exit__(kind, error, trace)


def _check(config: PrepareDataset, train: _Split, validation: _Split, left_out: dict[str, int]) -> None:
    if not train.examples:
        why = _said(left_out).removeprefix("; ") or "all is held out"
        raise InputError(
            f"{config.option} {config.data}: nothing is left to train on ({why}); give more data, a longer "
            "--block-size or a smaller --validation-fraction"
        )
    if config.holds_out and not validation.examples:
        raise InputError(
            f"{config.option} {config.data}: none of {train.examples} documents was held out; raise "
            "--validation-fraction, give --validation, or set --validation-fraction 0"
        )
