"""The pipeline: the one place where stages are wired.

    fetch → convert ─┐                  ┌─ prepare text ─→ stage 1 → stage 2 → merge ─┐
                     ├→ extend tokenizer┤                                             ├→ SFT → merge → evaluate → deploy
    train tokenizer ─┘                  └─ prepare instructions ──────────────────────┘              → generate

Every part can be replaced by something ready (a model, a Chinese tokenizer, an extended model, published adapters) or
left out (stage 1, both stages of pre-training, SFT). Which, is the run's configuration (configuration.py), and decided
here, in plain ifs: the compiled graph holds the stages that will run and no others. Branches of KFP's cost a pod each,
and a barrier each (830 s for what takes 602 s without, at size tiny). What a run may change is the pipeline's
parameters; settings.py lists both. What KFP can set on a step is in steps.py, what a job's machine is in machines.py.
"""

from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kfp import compiler, dsl, kubernetes

from components.convert_weights.component import convert_weights
from components.evaluate.component import evaluate
from components.evaluate.options import Evaluate
from components.extend_tokenizer.component import extend_tokenizer
from components.fetch_weights.component import fetch_weights
from components.generate.component import generate
from components.generate_instructions.component import generate_instructions
from components.launch_training.component import cleanup_training, launch_training
from components.merge_adapters.component import merge_adapters
from components.prepare_dataset.component import prepare_dataset
from components.prepare_dataset.options import PrepareDataset
from components.serve.component import deploy
from components.train_tokenizer.component import train_tokenizer
from pipelines.configuration import Configuration
from pipelines.machines import as_json, check_given, fixed_arguments, serving_machine, training_machine
from pipelines.manifests.check.go_yaml import quoted
from pipelines.settings import GENERATED
from pipelines.steps import Steps
from zhllama import storage
from zhllama.errors import InputError
from zhllama.mounted_secrets import KEY_FOLDER, MODEL_FOLDER
from zhllama.stage.options import described
from zhllama.storage.private import temporary_folder
from zhllama.training.options import EACH_RUN

REPLAY_HELD_OUT = 0.1
"""Of the replayed text: little text is enough, and it is measured too."""
RUN = dsl.PIPELINE_JOB_ID_PLACEHOLDER


def course(told: Configuration, steps: Steps, given: SimpleNamespace) -> None:
    """Wires the stages. given: the pipeline's parameters."""
    shape, why = told.shape, told.reason
    # adds a step, and gives the reference of what it makes
    step = partial(steps.result, store=given.store)

    # --- the model to start from

    if shape.base == "weights":
        fetched = step(
            "data", fetch_weights, "fetch_weights", why("start"),
            source=given.weights, size=told["size"], expect=given.expect,
        )  # fmt: skip
        base = step("weights", convert_weights, "convert_weights", why("start"), weights=fetched)
    else:
        base = given.model if shape.base == "model" else given.extended_model

    # --- its vocabulary; published adapters bring their own, and what they learnt

    if shape.start == "adapters":
        chinese = step(
            "weights", merge_adapters, "merge_published", why("start"), model=base, adapters=given.adapters
        )  # fmt: skip
    elif shape.start == "extended":
        chinese = given.extended_model
    elif not shape.extends:
        chinese = base
    else:
        if shape.tokenizer == "given":
            pieces = given.chinese_tokenizer
        else:
            continued = {"base": base} if shape.tokenizer == "continue" else {}
            pieces = step(
                "data", train_tokenizer, "train_tokenizer", why("tokenizer"),
                text=given.text, vocab_size=given.vocab_size, skip_bad=told["skip_bad"], **continued,
            )  # fmt: skip
        chinese = step(
            "weights", extend_tokenizer, "extend_tokenizer", why("tokenizer"), model=base, chinese_tokenizer=pieces
        )

    # --- data: packed blocks; what nothing learns from is measured as it is

    packing = {"tokenizer": chinese, "skip_bad": told["skip_bad"], "drop_near_duplicates": told["drop_near_duplicates"]}
    if shape.stage2 or shape.instructions != "none":
        packing |= {name: getattr(given, name) for name in ("block_size", "validation_fraction", "evaluation")}

    measured = {"text": given.text, "text_validation": given.text_validation}
    if shape.stage2:
        measured = {"text": step(
            "data", prepare_dataset, "prepare_text", why("run_pretraining"),
            text=given.text, validation=given.text_validation, **packing,
        )}  # fmt: skip

    if shape.instructions == "none":
        items = given.instructions if shape.start == "adapters" else ""
        validation = given.instructions_validation if shape.start == "adapters" else ""
        measured |= {"instructions": items, "instructions_validation": validation}
    else:
        if shape.instructions == "given":
            items, name = given.instructions, "prepare_instructions"
        else:
            items, name = _instructions(told, steps, given), "prepare_generated"
        measured["instructions"] = step(
            "data", prepare_dataset, name, why("instructions"),
            instructions=items, validation=given.instructions_validation, **packing,
            **_told(told, PrepareDataset, "template"),
        )  # fmt: skip

    # --- what must not be lost: mixed into every training; what is measured of it nothing learns from

    english, replayed = given.english_text, {}
    if shape.replay != "none":
        if shape.replay == "own":
            text = step(
                "evaluation", generate, "generate_replay", why("replay"), model=base,
                replay_documents=given.replay_documents,
            )  # fmt: skip
        else:
            text = getattr(given, shape.replay)
        measured_on = {} if shape.replay == "english_text" else {"evaluation_2": english}
        replayed["replay"] = step(
            "data", prepare_dataset, "prepare_replay", why("replay"),
            text=text, tokenizer=chinese, skip_bad=told["skip_bad"], block_size=given.block_size,
            validation_fraction=REPLAY_HELD_OUT, evaluation=given.evaluation, **measured_on,
        )  # fmt: skip
        english = replayed["replay"] if shape.replay == "english_text" else english

    # --- continued pre-training: the embeddings alone, then LoRA with embeddings

    compared = {"base": base}
    trainings = []
    first = adapted = chinese
    if shape.stage1:
        first = adapted = _trained(
            told, steps, given, "embeddings", model=chinese, dataset=measured["text"], **replayed
        )
        compared["stage 1"] = first
        trainings.append(first)
    if shape.stage2:
        adapter = "" if shape.stage1 else given.lora_adapter
        replayed |= _budgeted(told, trainings)
        lora = _trained(told, steps, given, "lora", model=first, dataset=measured["text"], adapter=adapter, **replayed)
        adapted = step("weights", merge_adapters, "merge_lora", why("run_pretraining"), model=first, adapters=lora)
        compared["stage 2"] = adapted
        trainings.append(lora)

    # --- instruction tuning

    if shape.sft:
        items = measured["instructions"]
        replayed |= _budgeted(told, trainings)
        sft = _trained(told, steps, given, "sft", model=adapted, dataset=items, adapter=given.sft_adapter, **replayed)
        adapted = step("weights", merge_adapters, "merge_sft", why("run_sft"), model=adapted, adapters=sft)
        trainings.append(sft)
        if shape.check_merge:
            # the same weights as one after the other, from stage 1's model in one call
            step(
                "weights", merge_adapters, "merge_both", why("check_merge"), model=first, adapters=lora, adapters_2=sft
            )

    # --- what came of it

    models = {label: model for label, model in compared.items() if model is not adapted}
    evaluated = steps.add(
        "evaluation", evaluate, "evaluate", "always",
        store=given.store,
        model=adapted,
        labels=",".join((*models, "adapted")) if models else "",
        english=english,
        exams=given.exams,
        prompts=given.prompts,
        **_told(told, Evaluate, "max_bytes", "max_items", "max_prompts", "samples", "front", prefix="evaluation_"),
        questions=given.questions,
        require=given.require,
        **measured,
        **_several("baseline", models.values()),
        **_several("trainings", trainings),
    )  # fmt: skip
    steps.add(
        "evaluation", generate, "generate", "always",
        store=given.store, model=adapted, input=given.prompts, default_prompt=given.prompt,
    )  # fmt: skip
    if told["deploy"] != "none":
        deployed = steps.add(
            "deploy", deploy, "deploy", why("deploy"), model=adapted, machine=as_json(serving_machine(told))
        )
        # what is required of the result has to hold before anybody is served by it
        deployed.after(evaluated)
        # without it serve says what it needs
        kubernetes.use_secret_as_volume(deployed, told["serve_secret"], KEY_FOLDER, optional=True)


def _budgeted(told: Configuration, trainings: list[Any]) -> dict[str, Any]:
    """All trainings of a course have one forgetting budget, counted from where the first began."""
    return {"forgetting_base": trainings[-1]} if trainings and told["forgetting_budget"] else {}


def _instructions(told: Configuration, steps: Steps, given: SimpleNamespace) -> Any:
    """Instructions that a model writes, or imported ones."""
    if told.shape.instructions == "import":
        names: tuple[str, ...] = ("items", "against")
        more = {"import_from": given.import_instructions}
    else:
        names = GENERATED
        more = {"concurrency": told["generate_concurrency"], "batch": told["generate_batch"]}
    more |= {name: getattr(given, f"generate_{name}") for name in names}
    made = steps.add(
        "data", generate_instructions, "generate_instructions", told.reason("instructions"), store=given.store, **more
    )
    if told.shape.instructions == "generate" and told["generate_secret"]:
        kubernetes.use_secret_as_volume(made, told["generate_secret"], MODEL_FOLDER, optional=True)
    return made.outputs["ref"]


def _trained(told: Configuration, steps: Steps, given: SimpleNamespace, training: str, **inputs: Any) -> Any:
    """A training as a job of its own, on the machines that its size and settings name."""
    of_run = {option: f"{training}_{name}" for option, name in EACH_RUN.items()}
    inputs |= {option: getattr(given, name) for option, name in of_run.items() if hasattr(given, name)}
    return steps.result(
        "launch", launch_training, f"train_{training}", told.reason(f"run_{training}"),
        store=given.store,
        stage=training,
        run_id=RUN,
        backend=given.backend,
        machine=as_json(training_machine(told, training)),
        arguments=fixed_arguments(told, training),
        **inputs,
    )  # fmt: skip


def _told(told: Configuration, stage: type, *options: str, prefix: str = "") -> dict[str, Any]:
    """A stage's compiled options that are not at its defaults: what a step is told stands in each of Argo's nodes."""
    return {one: told[prefix + one] for one in options if told[prefix + one] != described(stage)[one].default}


def _several(option: str, values: Any) -> dict[str, Any]:
    """Inputs of a component that takes several references: option, option_2, option_3."""
    return {option if at == 1 else f"{option}_{at}": value for at, value in enumerate(values, 1)}


# --- compiling --------------------------------------------------------------------------------------------------------


def adapt_llama(told: Configuration, made: list[tuple[str, str]]) -> Any:
    """The pipeline of a configuration, for kfp to compile. made: gets its steps, and why each is there."""
    # those that have to be given come first, as in any signature
    parameters = sorted(told.parameters(), key=lambda one: not one[2])

    def pipeline(*channels: Any) -> None:
        given = SimpleNamespace(**{setting.name: at for (setting, _, _), at in zip(parameters, channels, strict=True)})
        steps = Steps(configuration=told, made=made)
        cleanup = steps.add(
            "cleanup", cleanup_training, "cleanup_training", "always, at the run's end",
            run_id=RUN, namespace=told["namespace"], backend=given.backend,
        )  # fmt: skip
        with dsl.ExitHandler(cleanup):
            course(told, steps, given)

    # kfp reads a pipeline's parameters from the function's signature and docstring
    named = Parameter.POSITIONAL_OR_KEYWORD
    pipeline.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter(one.name, named, default=Parameter.empty if required else default, annotation=one.kind)
            for one, default, required in parameters
        ]
    )
    notes = "\n".join(f"    {setting.name}: {setting.note}" for setting, _, _ in parameters)
    pipeline.__doc__ = f"Adapt a LLaMA model to Chinese.\n\nArgs:\n{notes}\n"
    return dsl.pipeline(name="adapt-llama", description="Adapt a LLaMA model to Chinese")(pipeline)


def compile_pipeline(told: Configuration, path: Path) -> list[tuple[str, str]]:
    """Writes the pipeline of a configuration as YAML, the same bytes every time; its steps, and why each is there.
    InputError where the file cannot be written."""
    if path.suffix not in (".yaml", ".yml") or path.is_dir():
        raise InputError(f"{path}: kfp writes a pipeline with its settings as YAML alone; name a file as pipeline.yaml")
    check_given(told)
    made: list[tuple[str, str]] = []
    try:
        # kfp writes where it is told, bit by bit: a disk that is full must not leave half a pipeline
        with temporary_folder() as folder:
            whole = Path(folder, "pipeline.yaml")
            compiler.Compiler().compile(adapt_llama(told, made), str(whole))
            storage.write_bytes(str(path), quoted(whole.read_text(encoding="utf-8")).encode())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; choose another place") from error
    return made
