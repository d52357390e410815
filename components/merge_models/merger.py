"""The stage: do these models fit each other, and what is published. The arithmetic is the library's (blend.py), and so
is the stream that it passes through (stream.py): some rows of each model at a time.
"""

import logging
from collections.abc import Iterable

from components.merge_models.options import MergeModels
from zhllama import storage
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.models import architecture
from zhllama.models.architecture import EMBEDDING
from zhllama.progress import human
from zhllama.stage.inputs import Inputs
from zhllama.weights.chat_template import chosen, template_in
from zhllama.weights.merged_files import changes_in, contract_of_merged, state_changes, write_files
from zhllama.weights.model_card import origin_of, write_card

log = logging.getLogger("merge")

DONE = {
    "linear": "between two, by linear interpolation",
    "slerp": "between two, by spherical interpolation (SLERP)",
    "chat-vector": "with the difference of two others added, a chat vector",
}


def merge_models(config: MergeModels, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Publishes the merged model. InputError when the models do not fit, or merging changes nothing."""
    from zhllama.weights.blend import PARALLEL, Blend
    from zhllama.weights.blend_plan import Source, plan_blend
    from zhllama.weights.safetensors_io import TensorInfo
    from zhllama.weights.stream import Span, bytes_after, rewrite, spans_between

    models = [Source(inputs[name], f"--{name}") for name in ("model", "other", "base") if inputs.get(name)]
    plan = plan_blend(models)
    first, other = models[0], models[1]
    checkpoint = first.checkpoint
    blend = Blend(config.method, config.weights, [one.checkpoint for one in models], plan.rows)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    shapes |= {name: (rows.all, *shapes[name][1:]) for name, rows in plan.rows.items()}
    written = bytes_after(checkpoint, shapes)
    read = sum(info.length for one in models for info in one.checkpoint.tensors.values())
    log.info(
        "%s: %d of %d tensors to change, %s to read, %s to write", config.method, len(blend.touched),
        len(checkpoint.tensors), human(read, "B"), human(written, "B"),
    )  # fmt: skip
    storage.require_room(out.root, written)

    def spans_of(info: TensorInfo) -> Iterable[Span]:
        rows = plan.rows.get(info.name)
        return spans_between(info, shapes[info.name][0], rows or (), None)

    not_finite = "--other: {name} is not finite after the merge; a model holds NaN, or the sum overflows {dtype}"
    report = rewrite(checkpoint, blend.touched, shapes, spans_of, blend.make, out, not_finite)
    changes = changes_in(report)
    if not changes:
        raise InputError(
            f"--other {other.artifact.root}: merging changes no weight of {first.artifact.root}; they are the same"
        )
    if parallel := sum(abs(cosine) > PARALLEL for cosine in blend.cosines.values()):
        log.info("%d of %d tensors as good as parallel, and so merged linear", parallel, len(blend.cosines))

    # an instruct model says how the result is asked; else the model that is changed, if it does
    order = [other, first] if config.method == "chat-vector" else [first, other]
    asked = next((one for one in order if template_in(one.artifact, "")), first)
    template, why = chosen(asked.artifact)
    if asked is other:
        why = "the other model's own"
    log.info("chat template: %s", why)
    settings = first.settings | {"tie_word_embeddings": first.tied, "vocab_size": shapes[EMBEDDING][0]}
    # without a tokenizer that we read, a model's files are its own
    write_files(out, settings, plan.encoder, template, asked.checkpoint if plan.encoder else checkpoint)
    if plan.vocabulary is not None:
        out.vocabulary = contract_of_merged(plan.vocabulary, shapes[EMBEDDING][0], first.tied, checkpoint)
    kind = architecture(settings, first.where).title
    weights = ", ".join(f"{group.replace('_', '-')} {weight:g}" for group, weight in config.weights.items())
    facts = {"Weights of the other": weights}
    # by their names on the Hub, as far as they are known
    if names := dict.fromkeys(base for one in models[1:] if (base := origin_of(one.artifact).base)):
        facts["Merged with"] = ", ".join(names)
    if plan.vocabulary is not None:
        facts["Vocabulary"] = f"{plan.vocabulary.size:,} pieces"
    if plan.encoder is not None:
        facts["Chat template"] = out.facts["chat_template"] = why
    write_card(out, first.artifact, f"A {kind} model {DONE[config.method]}.", facts)
    said = {"unchanged": len(checkpoint.tensors) - len(changes), "changed": report, "chat_template": why}
    out.add_json("report.json", said | {"weights": dict(config.weights)}, beside=True)
    state_changes(out, changes, checkpoint)
    out.facts |= {"method": config.method, "weights": dict(config.weights)}
    return out.publish("hf-model")
