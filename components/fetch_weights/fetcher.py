"""The stage: fetch what the plan names, check it, publish it. One file whose sum is wrong stops everything, and nothing
is published. A pickle (.pth, .bin) is never opened here.
"""

import logging
from collections.abc import Mapping

from components.fetch_weights.options import FetchWeights
from components.fetch_weights.plan import CONFIG, Plan, make_plan
from components.fetch_weights.sources import files_of, read
from components.fetch_weights.transfer import Sums, transfer
from zhllama.artifacts.in_memory import in_memory
from zhllama.artifacts.json_file import object_of
from zhllama.artifacts.manifest import Input, Manifest, digest_of
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.progress import human
from zhllama.stage.inputs import Inputs
from zhllama.tokenizer import gguf_tokenizer
from zhllama.tokenizer.effective_model import DESCRIBED, FAST
from zhllama.tokenizer.tiktoken_file import is_tiktoken, tokenizer_files_of
from zhllama.tokenizer.vocabulary import Vocabulary, described_encoder, load_encoder, padding_multiple
from zhllama.weights.fit import require_rows
from zhllama.weights.gguf_config import gguf_places
from zhllama.weights.gguf_file import SUFFIX, GgufFile
from zhllama.weights.meta_format import PARAMS, TOKENIZER, MetaParams
from zhllama.weights.model_config import read_config

log = logging.getLogger("fetch")


def fetch_weights(config: FetchWeights, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Publishes the files. InputError for missing files and wrong sums, StorageFault for a source that fails."""
    plan = make_plan(config.source, config.size, config.expect)
    out.vocabulary = _vocabulary(plan)
    transfer(plan.items, out, config.parallel)

    unknown = [item.name for item in plan.items if not item.verified_by]
    if unknown:
        log.warning("no sum is known for %s: taken as they are (--expect gives them)", ", ".join(unknown))
    # by content, so that the same weights from another place give an artifact of the same digest
    content = digest_of([[file.path, file.sha256] for file in out.files])
    out.inputs = {"source": Input(plan.source.address, content)}
    out.facts["size"] = plan.size
    out.facts["verified"] = {item.name: item.verified_by for item in plan.items if item.verified_by}
    total = human(sum(file.size for file in out.files), "B")
    out.facts["summary"] = f"{len(plan.items)} files, {total}, {len(plan.items) - len(unknown)} verified"
    return out.publish(plan.kind)


def _vocabulary(plan: Plan) -> Vocabulary | None:
    """The contract of the tokenizer that comes along; small files only. InputError when it does not fit the model."""
    items = {item.name: item for item in plan.items}

    def content(name: str) -> bytes:
        sums, found = Sums(items[name]), read(items[name].source, name)
        sums.add(found)
        sums.check()
        return found

    where = f"--source {plan.source.address}"
    if plan.kind == "gguf":
        return _of_gguf(plan, where)
    if plan.kind == "meta-weights":
        params = MetaParams.from_json(content(PARAMS), f"{where}/{PARAMS}")
        if is_tiktoken(tokenizer := content(TOKENIZER)):
            return _contract(tokenizer_files_of(tokenizer, params.use_scaled_rope, f"{where}/{TOKENIZER}"), where)
    elif plan.kind == "hf-model":
        settings = read_config(items, lambda name: object_of(content(name)), where)
    try:
        described = {name: object_of(content(name)) for name in DESCRIBED if name in items}
    except ValueError as error:
        raise InputError(f"{where}: a file of its tokenizer is no JSON object ({error}); fetch another copy") from error
    name = TOKENIZER if TOKENIZER in items else FAST
    if name not in items or (name == FAST and "model" not in described[FAST]):
        return None
    encoder = described_encoder(name, content, described, where)
    if plan.kind != "hf-model":
        return encoder.vocabulary()
    rows = settings["vocab_size"]
    require_rows(encoder.size, rows, where, f"{CONFIG} says")
    return encoder.vocabulary(
        padding_multiple=padding_multiple(encoder.size, rows),
        tied=bool(settings.get("tie_word_embeddings", False)),
        dtype=settings.get("dtype"),
    )


def _of_gguf(plan: Plan, where: str) -> Vocabulary:
    """Of a GGUF, from its header alone. InputError for a model that convert_weights does not do."""
    found = (item.found for item in plan.items if item.name.endswith(SUFFIX))
    gguf = GgufFile(files_of(plan.source, found), "--source")
    rows = gguf_places(gguf)[0]["vocab_size"]
    return _contract(gguf_tokenizer.tokenizer_files_of(gguf.fields, gguf.where), where, rows)


def _contract(files: Mapping[str, bytes], where: str, rows: int | None = None) -> Vocabulary:
    """Of a tokenizer as a model folder has it; rows: of the embedding."""
    artifact = in_memory(files, where.removeprefix("--source "))
    encoder = load_encoder(artifact, "--source")
    if rows is None:
        return encoder.vocabulary()
    require_rows(encoder.size, rows, where, "its embedding has")
    return encoder.vocabulary(padding_multiple=padding_multiple(encoder.size, rows))
