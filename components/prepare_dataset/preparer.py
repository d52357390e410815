"""Text or instruction items → packed blocks, streaming: a window of documents in memory, whatever the corpus's size.

The recipe's way (tokenise into Arrow, group by 1,000 lines, save) takes 36 bytes a token and over five times as long;
this one two: `make bench ONLY=prepare_dataset` prints both.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from components.prepare_dataset.options import PrepareDataset
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data import packed
from zhllama.data.corpus import Skipped, read_batches, text_files
from zhllama.data.instructions import instruction_files, read_instructions
from zhllama.data.segments import Blocks
from zhllama.data.text_stream import bytes_to_read
from zhllama.errors import InputError
from zhllama.progress import Progress
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import weighted_references
from zhllama.tokenizer.prompt import BY_TEMPLATE
from zhllama.tokenizer.vocabulary import Encoder, load_encoder
from zhllama.weights.chat_template import JINJA, OWN, PROMPT_FACT, default_of, template_in

if TYPE_CHECKING:
    from components.prepare_dataset.examples import Examples


def prepare_dataset(config: PrepareDataset, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Publishes the packed dataset. InputError for data that is not there, malformed, or leaves a split empty."""
    from components.prepare_dataset.decontamination import Decontamination, evaluation_texts
    from components.prepare_dataset.mixture import Source, held_out, mixed

    tokenizer = inputs["tokenizer"].require_kind("tokenizer", "hf-model", "adapter", option="--tokenizer")
    encoder = load_encoder(tokenizer, "--tokenizer")
    if config.packing == "faithful" and encoder.bos is None:
        said = "its tokenizer puts no BOS before a text, by which the recipe tells lines and answers apart"
        raise InputError(f"--packing faithful: {tokenizer.root}: {said}; give --packing best-fit")
    template = _template(config, tokenizer)
    given = inputs.all(config.option[2:])
    skipped = Skipped()
    decontamination = Decontamination(config.drop_near_duplicates)
    sources = [
        Source(decontamination.kept(_examples(config, artifact, encoder, template, skipped)), weight)
        for artifact, (_, weight) in zip(given, weighted_references(config.data), strict=True)
    ]
    for artifact in inputs.all("evaluation"):
        decontamination.add_eval_set(evaluation_texts(artifact))

    fraction = 0.0 if config.validation else config.validation_fraction
    with ExitStack() as stack:
        train, validation = (_Split(name, config, out, encoder, stack) for name in (packed.TRAIN, packed.VALIDATION))
        if config.validation:
            for examples in _examples(config, inputs["validation"], encoder, template, skipped):
                decontamination.hold_out(examples)
                validation.add(examples.where(examples.has_loss))
        size = bytes_to_read(given, text_files if config.text else instruction_files)
        bar = stack.enter_context(Progress("packing", size))
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
    counted = ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in left_out.items() if count)
    why = counted and f"left out: {counted}"
    if not train.examples:
        raise InputError(
            f"{config.option} {config.data}: nothing is left to train on ({why or 'all is held out'}); give more data, "
            "a longer --block-size or a smaller --validation-fraction"
        )
    if config.holds_out and not validation.examples:
        raise InputError(
            f"{config.option} {config.data}: none of {train.examples} documents was held out; raise "
            "--validation-fraction, give --validation, or set --validation-fraction 0"
        )
    contract = tokenizer.manifest.vocabulary
    if template:
        out.add_bytes(JINJA, template.encode())
    out.vocabulary = encoder.vocabulary(also_at=[int(size) for size in contract.prefixes] if contract else ())
    tokens = train.packed.tokens + validation.packed.tokens
    fill = train.packed.packing_efficiency
    out.facts = packed.packed_facts(config.block_size, encoder.size, train.pad, [train.packed, validation.packed])
    out.facts |= {
        PROMPT_FACT: (OWN if template else config.prompt.name) if config.instructions else "",
        "documents": train.examples,
        "held_out": validation.examples,
        "left_out": left_out,
        "first_bad": skipped.first,
        "sources": [{name: getattr(one, name) for name in ("weight", "taken", "tokens", "used_up")} for one in sources],
        "summary": f"{train.packed.blocks:,} + {validation.packed.blocks:,} blocks of {config.block_size}, "
        f"{100 * fill:.1f}% filled, {tokens:,} tokens" + (why and f"; {why}"),
    }
    characters = train.characters + validation.characters
    out.metrics = {"fill": fill, "tokens": float(tokens), "tokens_per_character": tokens / characters}
    return out.publish(packed.KIND)


def _template(config: PrepareDataset, tokenizer: Artifact) -> str:
    """The base's own chat template where items are written with it; "" for Alpaca's, and for text."""
    if not config.instructions or config.template == "alpaca" or config.packing == "faithful":
        return ""
    own = default_of(template_in(tokenizer, "--tokenizer"))
    # what was tuned here, and what has the recipe's by default, goes on with ours
    return "" if own in BY_TEMPLATE else own


def _examples(
    config: PrepareDataset, artifact: Artifact, encoder: Encoder, template: str, skipped: Skipped
) -> Iterator["Examples"]:
    from components.prepare_dataset.examples import instruction_examples, line_groups, text_examples

    bad = skipped if config.skip_bad else None
    if config.instructions:
        items = read_instructions(artifact, skipped=bad)
        return instruction_examples(items, encoder, config.block_size, config.prompt, template, bad)
    if config.packing == "faithful":
        lines = text_examples(read_batches(artifact, keep_blank=True, skipped=bad), encoder, end=False)
        return line_groups(lines, config.block_size)
    return text_examples(read_batches(artifact, skipped=bad), encoder)


class _Split:
    """One split in the making: packs its examples, and keeps the records of those that are held out."""

    def __init__(
        self, name: str, config: PrepareDataset, out: ArtifactWriter, encoder: Encoder, stack: ExitStack
    ) -> None:
        from components.prepare_dataset.best_fit import BestFit

        self._encoder, self._as_list = encoder, bool(config.instructions)
        self.pad = encoder.eos if encoder.pad is None else encoder.pad
        self.packed = stack.enter_context(
            packed.PackedWriter(out, name, config.block_size, encoder.size, self.pad, prompts=self._as_list)
        )
        self.examples = self.characters = 0
        self._packer = BestFit(config.block_size) if config.packing == "best-fit" else None
        self._records = None
        if name == packed.VALIDATION and config.holds_out:
            file = packed.HELD_OUT_INSTRUCTIONS if self._as_list else packed.HELD_OUT_TEXT
            self._records = stack.enter_context(out.writer(file))
        self._before = "[\n"

    def add(self, examples: "Examples") -> None:
        import numpy as np

        self.examples += len(examples)
        self.characters += sum(examples.characters)
        if self._records is not None:
            for record in examples.records(self._encoder):
                self._records.write((f"{self._before}{record}" if self._as_list else f"{record}\n").encode())
                self._before = ",\n"
        segments = examples.segments.documents()
        unpacked = Blocks(segments, np.ones(len(segments), np.int64))
        for blocks in [unpacked] if self._packer is None else self._packer.add(segments):
            self.packed.write_blocks(blocks)

    def finish(self) -> None:
        for blocks in () if self._packer is None else self._packer.finish():
            self.packed.write_blocks(blocks)
        if self._records is not None and self._as_list:
            self._records.write(b"\n]\n" if self.examples else b"[]\n")
