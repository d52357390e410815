"""The stage: do these adapters fit this model, what will the merge need, and what is published.

What does not fit (vocabulary, lineage, names, shapes, room) is found from headers and manifests before a weight is
read. The merge itself is a stream (stream.py).
"""

import logging

from components.merge_adapters.options import MergeAdapters
from zhllama import storage
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.models import architecture
from zhllama.models.architecture import EMBEDDING
from zhllama.progress import human
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import split_references
from zhllama.weights.chat_template import chosen
from zhllama.weights.merged_files import changes_in, contract_of_merged, state_changes, write_files
from zhllama.weights.model_card import write_card

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
    changes = changes_in(report)
    if not changes:
        raise nothing_changed(split_references(config.adapters), model)
    template, why = chosen(model, given)
    log.info("chat template: %s", why)
    write_files(out, settings, encoder, template, checkpoint)
    if encoder is None:
        why = "as the model has it"
    else:
        out.facts["chat_template"] = why
    vocabulary = plan.vocabulary
    if vocabulary is not None:
        out.vocabulary = contract_of_merged(vocabulary, rows, plan.tied, checkpoint)
    kind, several = architecture(settings, checkpoint.where), "s" if len(given) > 1 else ""
    scaled = "" if config.scale == 1 else f", scaled by {config.scale:g}"
    made = f"A {kind.title} model with {len(given)} adapter{several} merged into it{scaled}."
    pieces = {} if vocabulary is None else {"Vocabulary": f"{vocabulary.size:,} pieces"}
    write_card(out, model, made, pieces | ({} if encoder is None else {"Chat template": why}))
    proof = prove(model, adapters, out, encoder) if config.prove and encoder is not None else None

    said = {
        "unchanged": len(checkpoint.tensors) - len(changes),
        "changed": report,
        "proof": proof,
        "chat_template": why,
    }
    out.add_json("report.json", said, beside=True)
    state_changes(out, changes, checkpoint)
    if config.scale != 1:
        out.facts["scale"] = config.scale
    if proof is not None:
        out.facts["proof"] = proof
        out.metrics["proof_relative_difference"] = proof["relative_difference"]
    return out.publish("hf-model")
