"""The stage: do these adapters fit this model, what will the merge need, and what is published.

What does not fit (vocabulary, lineage, names, shapes, room) is found from headers and manifests before a weight is
read. The merge itself is a stream (stream.py).
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from components.merge_adapters.options import MergeAdapters
from zhllama import storage
from zhllama.artifacts.manifest import Manifest, digest_of
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.progress import human
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import split_references
from zhllama.storage.folders import require_space
from zhllama.tokenizer.vocabulary import Vocabulary, load_encoder, padding_multiple
from zhllama.weights.fit import Step, contracts_of, require_fit, require_rows, trained_on
from zhllama.weights.meta_format import EMBEDDING, HEAD, TOKENIZER

if TYPE_CHECKING:
    from components.merge_adapters.lora import Adapter
    from zhllama.weights.safetensors_io import Checkpoint

log = logging.getLogger("merge")


def merge_adapters(config: MergeAdapters, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Publishes the merged model. InputError when the adapters do not fit, or change nothing."""
    from components.merge_adapters.lora import Adapter
    from components.merge_adapters.proof import prove, require_memory
    from components.merge_adapters.stream import bytes_after, merge_weights
    from zhllama.tokenizer.fast_tokenizer import tokenizer_files
    from zhllama.weights.safetensors_io import Checkpoint

    model = inputs["model"].require_kind("hf-model", option="--model")
    checkpoint = Checkpoint(model)
    settings = checkpoint.settings()
    checkpoint.refuse_quantised()
    given = [artifact.require_kind("adapter", option="--adapters") for artifact in inputs.all("adapters")]
    adapters = [Adapter(artifact, "--adapters") for artifact in given]
    tied = bool(settings.get("tie_word_embeddings")) or HEAD not in checkpoint.tensors
    encoders = [load_encoder(each, "the tokenizer of") if TOKENIZER in each else None for each in (model, *given)]
    vocabularies = contracts_of([model, *given], encoders)
    encoder = next((each for each in reversed(encoders) if each is not None), None)
    embeddings = {EMBEDDING} if tied else {EMBEDDING, HEAD}
    steps = []
    for adapter, reference, contract in zip(adapters, split_references(config.adapters), vocabularies[1:]):
        brings_rows = embeddings <= set(adapter.replaced)
        steps.append(Step(reference, adapter.artifact.digest, contract, brings_rows, trained_on(adapter.artifact)))
    out.facts["lineage"] = require_fit(model, vocabularies[0], steps)
    shapes = _check_shapes(checkpoint, adapters, vocabularies, tied)

    if config.prove:
        require_memory(checkpoint)
        if encoder is None:
            raise InputError(f"--prove: no {TOKENIZER} in {model.root} or in an adapter; prompts cannot be encoded")
    read = sum(info.length for info in checkpoint.tensors.values())
    written = bytes_after(checkpoint, shapes)
    log.info(
        "%d adapter%s into %s: %d of %d tensors to change, %s to read, %s to write, under 1.5 GB of memory",
        len(adapters), "s" if len(adapters) > 1 else "", model.root,
        len(set().union(*(adapter.touched for adapter in adapters))), len(checkpoint.tensors),
        human(read, "B"), human(written, "B"),
    )  # fmt: skip
    # what a killed run has left is there already
    require_space(out.root, max(0, written - sum(item.size for item in storage.listing(out.root))), "--store")
    report = merge_weights(checkpoint, adapters, shapes, out)
    changes = {
        name: float(entry["relative_change"])
        for name, entry in report.items()
        if entry["relative_change"] or entry.get("new_rows")
    }
    if not changes:
        raise InputError(
            f"--adapters {config.adapters}: merging changes no weight of {model.root}; the adapters are all zero "
            "(untrained, or saved empty)"
        )
    copied = ["generation_config.json"]
    if encoder is not None:
        for name, content in tokenizer_files(encoder.model, int(settings.get("max_position_embeddings", 2048))).items():
            out.add_bytes(name, content)
    else:
        copied += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    for name in copied:
        if name in model:
            out.copy(model, name)
    vocabulary = next((found for found in reversed(vocabularies) if found is not None), None)
    rows = shapes[EMBEDDING][0]
    if vocabulary is not None:
        require_rows(vocabulary.size, rows, f"--model {model.root}", "the merged model")
        multiple = padding_multiple(vocabulary.size, rows)
        dtype = checkpoint.info(EMBEDDING).dtype
        out.vocabulary = replace(vocabulary, tied=tied, dtype=dtype, padding_multiple=multiple)
        settings["pad_token_id"] = vocabulary.pad
    settings["vocab_size"] = rows
    out.add_json("config.json", settings)
    proof = prove(model, adapters, out, encoder) if config.prove and encoder is not None else None

    count = len(checkpoint.tensors)
    out.add_json("report.json", {"unchanged": count - len(changes), "changed": report, "proof": proof}, beside=True)
    weights = set(checkpoint.files)
    out.facts["weights_digest"] = digest_of([[file.path, file.sha256] for file in out.files if file.path in weights])
    out.facts["changed_tensors"] = len(changes)
    most = max(changes, key=changes.__getitem__)
    out.facts["summary"] = f"{len(changes)} of {count} tensors changed, most {most} by {changes[most]:.2%}"
    if proof is not None:
        out.facts["proof"] = proof
        out.metrics["proof_relative_difference"] = proof["relative_difference"]
    out.metrics["changed_tensors"] = float(len(changes))
    out.metrics["mean_relative_change"] = sum(changes.values()) / len(changes)
    out.metrics["greatest_relative_change"] = changes[most]
    return out.publish("hf-model")


def _check_shapes(
    checkpoint: "Checkpoint", adapters: Sequence["Adapter"], vocabularies: Sequence[Vocabulary | None], tied: bool
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor after the merge. InputError for a target that the model has not, or of another size."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    for adapter, vocabulary in zip(adapters, vocabularies[1:]):
        for name in sorted(adapter.touched):
            ties = tied and name == HEAD
            if ties or name not in shapes:
                why = "ties to its embedding" if ties else "does not have"
                raise InputError(
                    f"{adapter.where}: it changes {name}, which {checkpoint.artifact.root} {why}; give the model that "
                    "it was trained on"
                )
        for name, key in adapter.replaced.items():
            brought = adapter.stored[key].shape
            grown = name in (EMBEDDING, HEAD) and vocabulary is not None and vocabulary.size <= brought[0]
            if brought != shapes[name] and not (grown and brought[1:] == shapes[name][1:]):
                raise _other_size(adapter, name, brought, shapes[name])
            shapes[name] = brought
        for name, update in adapter.updates.items():
            if update.shape != shapes[name]:
                raise _other_size(adapter, name, update.shape, shapes[name])
        for name, (key, tokens) in adapter.tokens.items():
            brought, wanted = adapter.stored[key].shape, (len(tokens), *shapes[name][1:])
            if brought != wanted:
                raise _other_size(adapter, f"the trained rows of {name}", brought, wanted)
            if max(tokens) >= shapes[name][0]:
                raise InputError(
                    f"{adapter.where}: it trained row {max(tokens)} of {name}, which has {shapes[name][0]} rows; "
                    "give the model that it was trained on (with its vocabulary extended)"
                )
        if not tied and shapes[EMBEDDING] != shapes[HEAD]:
            raise _other_size(adapter, HEAD, shapes[HEAD], shapes[EMBEDDING])
    return shapes


def _other_size(adapter: "Adapter", name: str, has: tuple[int, ...], wanted: tuple[int, ...]) -> InputError:
    return InputError(
        f"{adapter.where}: {name} is {has} in the adapter and {wanted} in the model; give the model that it was "
        "trained on (the same size, the same vocabulary)"
    )
