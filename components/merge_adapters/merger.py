"""The stage: do these adapters fit this model, what will the merge need, and what is published.

What does not fit (vocabulary, lineage, names, shapes, room) is found from headers and manifests before a weight is
read. The merge itself is a stream (stream.py).
"""

import logging
from dataclasses import replace

from components.merge_adapters.options import MergeAdapters
from zhllama import storage
from zhllama.artifacts.manifest import Manifest, digest_of
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.progress import human
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import split_references
from zhllama.storage.folders import require_space
from zhllama.tokenizer.special_ids import special_ids
from zhllama.tokenizer.vocabulary import has_tokenizer, load_encoder, padding_multiple
from zhllama.weights.beside import require_known_tokens
from zhllama.weights.chat_template import JINJA, chosen
from zhllama.weights.fit import Step, base_weights, contracts_of, require_fit, require_rows, trained_on
from zhllama.weights.meta_format import EMBEDDING, HEAD
from zhllama.weights.model_card import write_card
from zhllama.weights.model_config import GENERATION
from zhllama.weights.settings import read_settings, write_settings

log = logging.getLogger("merge")


def merge_adapters(config: MergeAdapters, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Publishes the merged model. InputError when the adapters do not fit, or change nothing."""
    from components.merge_adapters.proof import prove, require_memory
    from components.merge_adapters.stream import bytes_after, merge_weights
    from zhllama.tokenizer.fast_tokenizer import tokenizer_files
    from zhllama.weights.adapter import Adapter
    from zhllama.weights.model_config import model_config
    from zhllama.weights.safetensors_io import Checkpoint
    from zhllama.weights.ties import settle

    model = inputs["model"].require_kind("hf-model", option="--model")
    checkpoint = Checkpoint(model)
    checkpoint.refuse_quantised()
    settings = model_config(checkpoint)
    given = [artifact.require_kind("adapter", option="--adapters") for artifact in inputs.all("adapters")]
    adapters = [Adapter(artifact, "--adapters") for artifact in given]
    encoders = [load_encoder(each, "the tokenizer of") if has_tokenizer(each) else None for each in (model, *given)]
    vocabularies = contracts_of([model, *given], encoders)
    encoder = next((each for each in reversed(encoders) if each is not None), None)
    settings["tie_word_embeddings"] = tied = settle(checkpoint, adapters)
    require_known_tokens([model, *given], encoders, checkpoint.info(EMBEDDING).shape[0])
    embeddings = {EMBEDDING} if tied else {EMBEDDING, HEAD}
    steps = []
    for adapter, reference, contract in zip(adapters, split_references(config.adapters), vocabularies[1:]):
        brings_rows = embeddings <= set(adapter.replaced)
        one = adapter.artifact
        steps.append(Step(reference, one.digest, contract, brings_rows, trained_on(one), base_weights(one)))
    out.facts["lineage"] = require_fit(model, vocabularies[0], steps)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    for adapter, vocabulary in zip(adapters, vocabularies[1:]):
        shapes = adapter.fitted(shapes, model.root, vocabulary.size if vocabulary else None)

    if config.prove:
        require_memory(checkpoint)
        if encoder is None:
            raise InputError(f"--prove: no tokenizer in {model.root} or in an adapter; prompts cannot be encoded")
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
    copied: list[str] = []
    template, why = chosen(model, given)
    log.info("chat template: %s", why)
    settings["vocab_size"] = shapes[EMBEDDING][0]
    if encoder is not None:
        given_settings = read_settings(checkpoint)
        ids = special_ids(encoder, given_settings, checkpoint.where)
        write_settings(out, settings, given_settings.get(GENERATION, {}), ids)
        positions = int(settings.get("max_position_embeddings", 2048))
        for name, content in tokenizer_files(encoder.model, positions, template).items():
            out.add_bytes(name, content)
        out.facts["chat_template"] = why
    else:
        out.add_json("config.json", settings)
        copied += [GENERATION, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", JINJA]
        why = "as the model has it"
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
    made = f"A LLaMA model with {len(given)} adapter{'s' if len(given) > 1 else ''} merged into it."
    pieces = {} if vocabulary is None else {"Vocabulary": f"{vocabulary.size:,} pieces"}
    write_card(out, model, made, pieces | ({} if encoder is None else {"Chat template": why}))
    proof = prove(model, adapters, out, encoder) if config.prove and encoder is not None else None

    count = len(checkpoint.tensors)
    said = {"unchanged": count - len(changes), "changed": report, "proof": proof, "chat_template": why}
    out.add_json("report.json", said, beside=True)
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
