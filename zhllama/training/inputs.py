"""What a training reads, checked before any weight is loaded, and before any process starts: no torch here.

Equal vocabulary contracts of model, dataset and adapter; blocks no longer than the model's positions; LoRA targets
that exist; an adapter that belongs to this model. Each failure is one line and costs a second, not a node's download.
"""

from dataclasses import dataclass

from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.data.packed import KIND, TRAIN
from zhllama.errors import InputError
from zhllama.stage.inputs import Inputs
from zhllama.tokenizer.vocabulary import Encoder, Vocabulary, require_equal, rows_fit
from zhllama.training.options import TrainingOptions, deepspeed_settings, zero_stage
from zhllama.training.shape import ADAPTER_WEIGHTS, PICKLED_WEIGHTS, lora_shape
from zhllama.weights.safetensors_io import Checkpoint

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class TrainingInputs:
    model: Artifact
    dataset: Artifact
    adapter: Artifact | None
    vocabulary: Vocabulary


def checked_inputs(options: TrainingOptions, opened: Inputs) -> TrainingInputs:
    """Model, dataset and adapter, checked that they belong together. InputError otherwise."""
    model = opened["model"].require_kind("hf-model", option="--model")
    dataset = opened["dataset"].require_kind(KIND, option="--dataset")
    adapter = opened.get("adapter")
    if adapter is not None:
        adapter.require_kind("adapter", option="--adapter")

    names = f"--model {options.model}", f"--dataset {options.dataset}"
    vocabulary = vocabulary_of(model)
    require_equal(dataset.manifest.vocabulary, vocabulary, names[1], names[0])
    assert vocabulary is not None
    if adapter is not None:
        require_equal(vocabulary_of(adapter), vocabulary, f"--adapter {options.adapter}", names[0])
        base = adapter.manifest.facts.get("base_digest")
        if base is not None and base != model.digest:
            raise InputError(
                f"--adapter {options.adapter}: it was trained on another model ({str(base)[:8]}) than {names[0]} "
                f"({model.digest[:8]}); give that model, or merge the adapter and start a new one"
            )

    try:
        config = read_object(model, "config.json")
    except (ValueError, TypeError) as error:
        said = f"--model {model.root}: config.json is no model's configuration ({error}); fetch the model again"
        raise InputError(said) from error
    if config.get("model_type") != "llama":
        raise InputError(f"--model {model.root}: model_type {config.get('model_type')!r}; only llama is supported")
    rows = config["vocab_size"]
    if not rows_fit(vocabulary.size, rows, model.manifest.vocabulary):
        said = f"config.json has vocab_size {rows}, its tokenizer {vocabulary.rows} rows"
        raise InputError(f"{names[0]}: {said}; give the model's own tokenizer, or extend the model first")
    facts = dataset.manifest.facts
    if TRAIN not in facts.get("splits", {}):
        raise InputError(f"{names[1]}: no blocks to train on in it; give what prepare_dataset wrote")
    block, positions = facts["block_size"], config["max_position_embeddings"]
    if block > positions:
        said = f"blocks of {block} tokens, but the model has {positions} positions"
        raise InputError(f"{names[1]}: {said}; prepare the dataset with a smaller --block-size")
    stage = zero_stage(deepspeed_settings(options))
    tensors = Checkpoint(model).tensors
    if options.gives_adapter:
        shape = lora_shape(options, model, adapter)
        if adapter is not None and ADAPTER_WEIGHTS not in adapter and PICKLED_WEIGHTS not in adapter:
            said = f"neither {ADAPTER_WEIGHTS} nor {PICKLED_WEIGHTS} in it; publish or fetch the adapter again"
            raise InputError(f"--adapter {adapter.root}: {said}")
        for target in shape.targets:
            if not any(name.endswith(f".{target}.weight") and len(one.shape) == 2 for name, one in tensors.items()):
                raise InputError(f"--lora-targets {target}: {names[0]} has no such layer; LLaMA's are q_proj, v_proj …")
        if shape.embeddings == "new" and stage == 3:
            said = "under ZeRO-3 the embeddings lie in parts, and no rows of them can be trained alone"
            raise InputError(f"--embedding-rows new: {said}; give --deepspeed zero2 or none")
    packing = dataset.manifest.configuration.get("packing")
    if options.faithful and packing != "faithful":
        said = f"was packed as {packing or 'nobody says what'}, several documents to a block"
        raise InputError(f"--faithful: {names[1]} {said}; prepare it with --packing faithful")
    if EMBEDDING not in tensors:
        raise InputError(f"{names[0]}: it has no tensor {EMBEDDING}; a LLaMA model is needed")
    return TrainingInputs(model, dataset, adapter, vocabulary)


def vocabulary_of(artifact: Artifact) -> Vocabulary | None:
    """The contract in the manifest, or, in a plain folder, of its tokenizer.model; None without either."""
    if artifact.manifest.vocabulary is not None:
        return artifact.manifest.vocabulary
    if "tokenizer.model" in artifact:
        return Encoder(artifact.read("tokenizer.model"), f"{artifact.root}/tokenizer.model").vocabulary()
    return None
