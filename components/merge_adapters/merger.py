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
from zhllama.models import architecture
from zhllama.models.architecture import EMBEDDING
from zhllama.progress import human
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import split_references
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.special_ids import special_ids
from zhllama.tokenizer.vocabulary import padding_multiple
from zhllama.weights.chat_template import chosen, default_of, is_template
from zhllama.weights.fit import require_rows
from zhllama.weights.model_card import write_card
from zhllama.weights.model_config import GENERATION
from zhllama.weights.settings import read_settings, write_settings

log = logging.getLogger("merge")


def merge_adapters(config: MergeAdapters, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Publishes the merged model. InputError when the adapters do not fit, or change nothing."""
    from components.merge_adapters.proof import prove, require_memory
    from components.merge_adapters.stream import merge_weights
    from zhllama.weights.merge_plan import nothing_changed, plan_merge
    from zhllama.weights.model_config import model_config
    from zhllama.weights.safetensors_io import Checkpoint
    from zhllama.weights.stream import bytes_after

    model = inputs["model"].require_kind("hf-model", option="--model")
    checkpoint = Checkpoint(model)
    checkpoint.refuse_quantised()
    settings = model_config(checkpoint)
    given = inputs.all("adapters")
    plan = plan_merge(model, checkpoint, given, split_references(config.adapters), config.scale)
    adapters, encoder, shapes = [step.adapter for step in plan.steps], plan.encoder, plan.shapes
    settings["tie_word_embeddings"] = plan.tied
    settings["vocab_size"] = rows = shapes[EMBEDDING][0]
    out.facts["lineage"] = plan.lineage

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
    storage.require_room(out.root, written)
    report = merge_weights(checkpoint, adapters, shapes, out)
    changes = {
        name: float(entry["relative_change"])
        for name, entry in report.items()
        if entry["relative_change"] or entry.get("new_rows")
    }
    if not changes:
        raise nothing_changed(split_references(config.adapters), model)
    copied: list[str] = []
    template, why = chosen(model, given)
    log.info("chat template: %s", why)
    if encoder is not None:
        given_settings = read_settings(checkpoint)
        ids = special_ids(encoder, given_settings, checkpoint.where).ending(Chat(encoder, default_of(template)).end)
        write_settings(out, settings, given_settings.get(GENERATION, {}), ids)
        positions = int(settings.get("max_position_embeddings", 2048))
        for name, content in encoder.files(positions, template).items():
            out.add_bytes(name, content)
        out.facts["chat_template"] = why
    else:
        out.add_json("config.json", settings)
        others = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
        copied += [GENERATION, "tokenizer.json", "tokenizer_config.json", *others, *filter(is_template, model.names)]
        why = "as the model has it"
    for name in copied:
        if name in model:
            out.copy(model, name)
    vocabulary = plan.vocabulary
    if vocabulary is not None:
        require_rows(vocabulary.size, rows, f"--model {model.root}", "the merged model")
        multiple = padding_multiple(vocabulary.size, rows)
        dtype = checkpoint.info(EMBEDDING).dtype
        out.vocabulary = replace(vocabulary, tied=plan.tied, dtype=dtype, padding_multiple=multiple)
    kind, several = architecture(settings, checkpoint.where), "s" if len(given) > 1 else ""
    scaled = "" if config.scale == 1 else f", {config.scale:g} of what it was trained to change"
    made = f"A {kind.title} model with {len(given)} adapter{several} merged into it{scaled}."
    pieces = {} if vocabulary is None else {"Vocabulary": f"{vocabulary.size:,} pieces"}
    write_card(out, model, made, pieces | ({} if encoder is None else {"Chat template": why}))
    proof = prove(model, adapters, out, encoder) if config.prove and encoder is not None else None

    count = len(checkpoint.tensors)
    said = {"unchanged": count - len(changes), "changed": report, "proof": proof, "chat_template": why}
    out.add_json("report.json", said, beside=True)
    weights = set(checkpoint.files)
    out.facts["weights_digest"] = digest_of([[file.path, file.sha256] for file in out.files if file.path in weights])
    if config.scale != 1:
        out.facts["scale"] = config.scale
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
