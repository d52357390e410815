"""The pipeline: the one place where stages are wired.

    fetch → convert ─┐                       ┌─ prepare text ─→ stage 1 → stage 2 → merge ─┐
                     ├→ extend vocabulary ───┤                                             ├→ SFT → merge → evaluate
    train tokenizer ─┘                       └─ prepare instructions ──────────────────────┘              → generate
                                                                                                          → deploy

Every part can be replaced by something ready (a model, a Chinese tokenizer, an extended model, published adapters) or
left out (stage 1, both stages of pre-training, SFT). Which, is the run's configuration (configuration.py), and decided
here, in plain ifs: the compiled graph holds the stages that will run and no others. Branches of KFP's cost a pod each,
and a barrier each (830 s for what takes 602 s without, at size tiny). What a run may change is the pipeline's
parameters; settings.py lists both. What KFP can set on a step is in steps.py, what a job's machine is in machines.py.
"""

import inspect
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from kfp import compiler, dsl, kubernetes

from components.convert_weights.component import convert_weights
from components.evaluate.component import evaluate
from components.extend_tokenizer.component import extend_tokenizer
from components.fetch_weights.component import fetch_weights
from components.generate.component import generate
from components.generate_instructions.component import generate_instructions
from components.launch_training.component import cleanup_training, launch_training
from components.merge_adapters.component import merge_adapters
from components.prepare_dataset.component import prepare_dataset
from components.serve.component import deploy
from components.train_tokenizer.component import train_tokenizer
from pipelines.configuration import Configuration
from pipelines.machines import as_json, fixed_arguments, serving_machine, training_machine
from pipelines.steps import Steps, Why, reference
from zhllama import storage
from zhllama.errors import InputError
from zhllama.training.options import EACH_RUN

RUN = dsl.PIPELINE_JOB_ID_PLACEHOLDER
MODEL_KEY = "OPENAI_API_KEY"
"""In its secret, and in the step that has a model write instructions; a model of one's own may want none."""
SERVED_KEY = {"API_KEY": "ZHLLAMA_API_KEY"}
"""Key in the secret of a served model → variable of the step that deploys it, and tries it."""


def course(told: Configuration, steps: Steps, given: SimpleNamespace) -> None:
    """Wires the stages. given: the pipeline's parameters."""
    shape, why = told.shape, told.reason
    store = given.store

    # --- the model to start from

    if shape.base == "weights":
        fetched = steps.data(
            fetch_weights, "fetch_weights", why("start"),
            store=store, source=given.weights, size=told["size"], expect=given.expect,
        )  # fmt: skip
        converted = steps.weights(
            convert_weights, "convert_weights", why("start"), store=store, weights=reference(fetched)
        )
        base = reference(converted)
    elif shape.base == "model":
        base = given.model
    else:
        base = given.extended_model

    # --- its vocabulary; published adapters bring their own, and what they learnt

    if shape.start == "adapters":
        published = steps.weights(
            merge_adapters, "merge_published", why("start"), store=store, model=base, adapters=given.adapters
        )
        chinese = reference(published)
    elif shape.start == "extended":
        chinese = given.extended_model
    elif shape.tokenizer == "given":
        extended = steps.weights(
            extend_tokenizer, "extend_tokenizer", why("tokenizer"),
            store=store, model=base, chinese_tokenizer=given.chinese_tokenizer,
        )  # fmt: skip
        chinese = reference(extended)
    else:
        pieces = steps.data(
            train_tokenizer, "train_tokenizer", why("tokenizer"),
            store=store, text=given.text, vocab_size=given.vocab_size, skip_bad=told["skip_bad"],
        )  # fmt: skip
        extended = steps.weights(
            extend_tokenizer, "extend_tokenizer", why("tokenizer"),
            store=store, model=base, chinese_tokenizer=reference(pieces),
        )  # fmt: skip
        chinese = reference(extended)

    # --- data: packed blocks; what nothing learns from is measured as it is

    packing = {"store": store, "tokenizer": chinese, "skip_bad": told["skip_bad"]}
    packing["drop_near_duplicates"] = told["drop_near_duplicates"]
    if shape.stage2 or shape.instructions != "none":
        packing |= {"block_size": given.block_size, "validation_fraction": given.validation_fraction}
        packing |= {"evaluation": given.evaluation}

    measured = {"text": given.text, "text_validation": given.text_validation}
    if shape.stage2:
        packed_text = steps.data(
            prepare_dataset, "prepare_text", why("run_pretraining"),
            text=given.text, validation=given.text_validation, **packing,
        )  # fmt: skip
        measured = {"text": reference(packed_text)}

    if shape.instructions == "none":
        items = given.instructions if shape.start == "adapters" else ""
        validation = given.instructions_validation if shape.start == "adapters" else ""
        measured |= {"instructions": items, "instructions_validation": validation}
    else:
        if shape.instructions == "given":
            items, name = given.instructions, "prepare_instructions"
        else:
            items, name = reference(_instructions(told, steps, given)), "prepare_generated"
        packed_items = steps.data(
            prepare_dataset, name, why("instructions"),
            instructions=items, validation=given.instructions_validation, **packing,
        )  # fmt: skip
        measured |= {"instructions": reference(packed_items)}

    # --- continued pre-training: the embeddings alone, then LoRA with embeddings

    compared = {"base": base}
    trainings = []
    first = second = chinese
    if shape.stage1:
        embeddings = _trained(told, steps, given, "embeddings", model=first, dataset=measured["text"])
        first = second = reference(embeddings)
        compared["stage 1"] = first
        trainings.append(first)
    if shape.stage2:
        adapter = "" if shape.stage1 else given.lora_adapter
        lora = _trained(told, steps, given, "lora", model=first, dataset=measured["text"], adapter=adapter)
        merged_lora = steps.weights(
            merge_adapters, "merge_lora", why("run_pretraining"), store=store, model=first, adapters=reference(lora)
        )
        second = reference(merged_lora)
        compared["stage 2"] = second
        trainings.append(reference(lora))

    # --- instruction tuning

    adapted = second
    if shape.sft:
        sft = _trained(
            told, steps, given, "sft", model=second, dataset=measured["instructions"], adapter=given.sft_adapter
        )
        merged_sft = steps.weights(
            merge_adapters, "merge_sft", why("run_sft"), store=store, model=second, adapters=reference(sft)
        )
        adapted = reference(merged_sft)
        trainings.append(reference(sft))
        if shape.check_merge:
            # the same weights as one after the other, from stage 1's model in one call
            steps.weights(
                merge_adapters, "merge_both", why("check_merge"),
                store=store, model=first, adapters=reference(lora), adapters_2=reference(sft),
            )  # fmt: skip

    # --- what came of it

    models = {label: model for label, model in compared.items() if model is not adapted}
    steps.evaluation(
        evaluate, "evaluate", "always",
        store=store,
        model=adapted,
        labels=",".join((*models, "adapted")) if models else "",
        english=given.english_text,
        exams=given.exams,
        **measured,
        **_several("baseline", models.values()),
        **_several("trainings", trainings),
    )  # fmt: skip
    steps.evaluation(
        generate, "generate", "always", store=store, model=adapted, input=given.prompts, default_prompt=given.prompt
    )
    if shape.deploy != "none":
        deployed = steps.deploy(
            deploy, "deploy", why("deploy"), model=adapted, machine=as_json(serving_machine(told))
        )  # fmt: skip
        kubernetes.use_secret_as_env(deployed, told["serve_secret"], SERVED_KEY)


def _instructions(told: Configuration, steps: Steps, given: SimpleNamespace) -> Any:
    """The step that has a model write instructions, or imports them."""
    if told.shape.instructions == "import":
        return steps.data(
            generate_instructions, "generate_instructions", told.reason("instructions"),
            store=given.store, import_from=given.import_instructions, against=given.generate_against,
            items=given.generate_items,
        )  # fmt: skip
    options = (
        "items", "base_url", "model", "seeds", "against", "catalogue", "max_cost", "max_tokens", "price_prompt",
        "price_answer", "requests_per_minute", "tokens_per_minute",
    )  # fmt: skip
    made = steps.data(
        generate_instructions, "generate_instructions", told.reason("instructions"),
        store=given.store,
        concurrency=told["generate_concurrency"],
        batch=told["generate_batch"],
        **{name: getattr(given, f"generate_{name}") for name in options},
    )  # fmt: skip
    if told["generate_secret"]:
        kubernetes.use_secret_as_env(made, told["generate_secret"], {MODEL_KEY: MODEL_KEY}, optional=True)
    return made


def _trained(told: Configuration, steps: Steps, given: SimpleNamespace, training: str, **inputs: Any) -> Any:
    """A training as a job of its own, on the machines that its size and settings name."""
    for option, name in EACH_RUN.items():
        if hasattr(given, f"{training}_{name}"):
            inputs[option] = getattr(given, f"{training}_{name}")
    return steps.launch(
        launch_training, f"train_{training}", told.reason(f"run_{training}"),
        store=given.store,
        stage=training,
        run_id=RUN,
        backend=given.backend,
        machine=as_json(training_machine(told, training)),
        arguments=fixed_arguments(told, training),
        **inputs,
    )  # fmt: skip


def _several(option: str, values: Any) -> dict[str, Any]:
    """Inputs of a component that takes several references: option, option_2, option_3."""
    return {option if at == 1 else f"{option}_{at}": value for at, value in enumerate(values, 1)}


# --- compiling --------------------------------------------------------------------------------------------------------


def adapt_llama(told: Configuration, made: list[Why] | None = None) -> Any:
    """The pipeline of a configuration, for kfp to compile. made: gets its steps, and why each is there."""
    # those that have to be given come first, as in any signature
    parameters = sorted(told.parameters(), key=lambda one: not one[2])

    def pipeline(*channels: Any) -> None:
        given = SimpleNamespace(**{setting.name: at for (setting, _, _), at in zip(parameters, channels, strict=True)})
        steps = Steps(configuration=told, made=[] if made is None else made)
        cleanup = steps.control(
            cleanup_training, "cleanup_training", "always, at the run's end",
            run_id=RUN, namespace=told["namespace"], backend=given.backend,
        )  # fmt: skip
        with dsl.ExitHandler(cleanup):
            course(told, steps, given)

    # kfp reads a pipeline's parameters from the function's signature and docstring
    pipeline.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                setting.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if required else default,
                annotation=setting.kind,
            )
            for setting, default, required in parameters
        ]
    )
    notes = "\n".join(f"    {setting.name}: {setting.note}" for setting, _, _ in parameters)
    pipeline.__doc__ = f"Adapt a LLaMA model to Chinese.\n\nArgs:\n{notes}\n"
    return dsl.pipeline(name="adapt-llama", description="Adapt a LLaMA model to Chinese")(pipeline)


def compile_pipeline(told: Configuration, path: Path) -> list[Why]:
    """Writes the pipeline of a configuration as YAML, the same bytes every time; its steps, and why each is there.
    InputError where the file cannot be written."""
    if path.suffix not in (".yaml", ".yml") or path.is_dir():
        raise InputError(f"{path}: kfp writes a pipeline with its settings as YAML alone; name a file as pipeline.yaml")
    made: list[Why] = []
    try:
        # kfp writes where it is told, bit by bit: a disk that is full must not leave half a pipeline
        with TemporaryDirectory() as folder:
            whole = Path(folder, "pipeline.yaml")
            compiler.Compiler().compile(adapt_llama(told, made), str(whole))
            storage.write_bytes(str(path), whole.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; choose another place") from error
    return made
