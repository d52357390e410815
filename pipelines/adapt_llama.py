"""The pipeline: the one place where stages are wired.

    fetch → convert ─┐                       ┌─ prepare text ─→ stage 1 → stage 2 → merge ─┐
                     ├→ extend vocabulary ───┤                                             ├→ SFT → merge → evaluate
    train tokenizer ─┘                       └─ prepare instructions ──────────────────────┘              → generate

Every part can be replaced by something ready (a model, a Chinese tokenizer, an extended model, published adapters) or
left out (stage 1, SFT). Each such choice is If … Else joined by OneOf over references, since a consumer of a skipped
step would be dropped. Two rules keep clear of faults in kfp 2.17 and its backend, and tests hold them: all conditions
stand in one pipeline (called from another that has some too, kfp puts steps into the wrong branch), and texts are put
together by the step `join`, never here (components/shared/component.py says why).
"""

from pathlib import Path
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
from components.shared.component import forward, join
from components.shared.errors import InputError
from components.train_tokenizer.component import train_tokenizer
from pipelines import sizes
from pipelines.sizes import Size

S3_SECRET = "zhllama-s3"
"""The secret that steps take their S3 settings from, key by key (k8s/base); without it, the account's identity."""
S3_KEYS = ("ZHLLAMA_S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
MODEL_SECRET = "zhllama-openai"
"""The secret that holds the key of the model that writes instructions; a model of one's own may want none."""
MODEL_KEY = "OPENAI_API_KEY"
LABELS = "base,stage 1,stage 2,adapted"
"""What the evaluation calls the models that it compares."""


def step(task: Any, title: str) -> Any:
    """A task as ours are: with a name for people, and never from KFP's cache, whose references may lead nowhere."""
    task.set_display_name(title).set_caching_options(False)
    kubernetes.use_secret_as_env(task, S3_SECRET, {key: key for key in S3_KEYS}, optional=True)
    return task


def streams_weights(task: Any, size: Size) -> Any:
    """A step that reads or writes a whole model: it gets what the size says."""
    task.set_cpu_request(size.work.cpu).set_memory_request(size.work.memory).set_memory_limit(size.work.memory)
    return task


def ref(task: Any) -> Any:
    return task.outputs["ref"]


def passed_on(value: Any) -> Any:
    """The branch in which a stage is left out: what went in comes out."""
    return ref(step(forward(value=value), "pass on"))


def trained(stage: str, of: Size, **given: Any) -> Any:
    """A training as a job of its own, on the machines that the size names."""
    machine = of.training(stage)
    task = launch_training(
        stage=stage,
        run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        warmup_steps=machine.warmup_ratio,
        weight_decay=machine.weight_decay,
        save_steps=machine.save_steps,
        deepspeed=machine.deepspeed,
        gpu_resource=machine.gpu,
        cpu=machine.cpu,
        memory=machine.memory,
        shared_memory=machine.shared_memory,
        ephemeral_storage=machine.ephemeral_storage,
        deadline_seconds=machine.deadline_seconds,
        s3_secret=S3_SECRET,
        **given,
    )
    return step(task, f"train_{stage}")


def adapt_llama(of: Size) -> Any:
    """The pipeline with the defaults of a size, for kfp to compile."""

    @dsl.pipeline(name="adapt-llama", description="Adapt a LLaMA model to Chinese")
    def pipeline(
        store: str,
        # what to start from
        weights: str = "",
        expect: str = "",
        size: str = of.name,
        model: str = "",
        chinese_tokenizer: str = "",
        extended_model: str = "",
        adapters: str = "",
        # what to learn from
        text: str = "",
        text_validation: str = "",
        english_text: str = "",
        exams: str = "",
        instructions: str = "",
        instructions_validation: str = "",
        # instructions to import from public data sets, or to have a model write
        import_instructions: str = "",
        generate_items: int = 0,
        generate_base_url: str = "",
        generate_model: str = "",
        generate_secret: str = MODEL_SECRET,
        generate_seeds: str = "",
        generate_against: str = "",
        generate_catalogue: str = "",
        generate_max_cost: float = 0.0,
        generate_max_tokens: int = 0,
        generate_price_prompt: float = -1.0,
        generate_price_answer: float = -1.0,
        generate_concurrency: int = 16,
        generate_requests_per_minute: float = 0.0,
        generate_tokens_per_minute: float = 0.0,
        generate_batch: bool = False,
        prompts: str = "",
        prompt: str = "请介绍一下你自己。",
        # what to do
        run_stage1: bool = True,
        run_sft: bool = True,
        check_merge: bool = not of.sft.gpu,
        vocab_size: int = of.vocab_size,
        block_size: int = of.block_size,
        validation_fraction: float = of.validation_fraction,
        evaluation: str = "",
        skip_bad: bool = False,
        drop_near_duplicates: bool = False,
        # how to train
        embeddings_steps: int = of.embeddings.steps,
        embeddings_learning_rate: float = of.embeddings.learning_rate,
        embeddings_batch: int = of.embeddings.batch,
        embeddings_accumulation: int = of.embeddings.accumulation,
        embeddings_nodes: int = of.embeddings.nodes,
        embeddings_arguments: str = of.embeddings.arguments,
        lora_steps: int = of.lora.steps,
        lora_learning_rate: float = of.lora.learning_rate,
        lora_batch: int = of.lora.batch,
        lora_accumulation: int = of.lora.accumulation,
        lora_nodes: int = of.lora.nodes,
        lora_embedding_rows: str = "auto",
        lora_embedding_learning_rate: float = 0.0,
        lora_arguments: str = of.lora.arguments,
        sft_steps: int = of.sft.steps,
        sft_learning_rate: float = of.sft.learning_rate,
        sft_batch: int = of.sft.batch,
        sft_accumulation: int = of.sft.accumulation,
        sft_nodes: int = of.sft.nodes,
        sft_arguments: str = of.sft.arguments,
        sft_trains_embeddings: bool = of.sft_trains_embeddings,
        lora_rank: int = of.adapter.rank,
        lora_alpha: float = of.adapter.alpha,
        lora_dropout: float = of.adapter.dropout,
        # where to train
        backend: str = "pytorchjob",
        namespace: str = "",
        processes_per_node: int = of.lora.processes_per_node,
    ):
        cleanup = cleanup_training(run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, namespace=namespace, backend=backend)
        with dsl.ExitHandler(step(cleanup, "cleanup_training")):
            # --- the model to start from

            with dsl.If(model != ""):
                ready = passed_on(model)
            with dsl.Elif(extended_model != ""):
                ready_extended = passed_on(extended_model)
            with dsl.Else():
                fetched = step(fetch_weights(store=store, source=weights, size=size, expect=expect), "fetch_weights")
                converted = step(convert_weights(store=store, weights=ref(fetched)), "convert_weights")
            base = dsl.OneOf(ready, ready_extended, ref(converted))

            # --- its vocabulary; published adapters bring their own, and what they learnt

            with dsl.If(adapters != ""):
                published = step(merge_adapters(store=store, model=base, adapters=adapters), "merge_published")
            with dsl.Elif(extended_model != ""):
                given = passed_on(extended_model)
            with dsl.Elif(chinese_tokenizer != ""):
                with_given = extend_tokenizer(store=store, model=base, chinese_tokenizer=chinese_tokenizer)
                step(with_given, "extend_by_given")
            with dsl.Else():
                pieces = train_tokenizer(store=store, text=text, vocab_size=vocab_size, skip_bad=skip_bad)
                step(pieces, "train_tokenizer")
                extended = extend_tokenizer(store=store, model=base, chinese_tokenizer=ref(pieces))
                step(extended, "extend_tokenizer")
            chinese = dsl.OneOf(ref(published), given, ref(with_given), ref(extended))

            # --- data: packed blocks; where nothing is trained, what the evaluation reads as it is

            packing = {"store": store, "tokenizer": chinese, "block_size": block_size}
            packing |= {"validation_fraction": validation_fraction, "evaluation": evaluation}
            packing |= {"skip_bad": skip_bad, "drop_near_duplicates": drop_near_duplicates}
            with dsl.If(adapters == ""):
                packed_text = prepare_dataset(text=text, validation=text_validation, **packing)
                step(packed_text, "prepare_text")
            with dsl.Elif(text_validation != ""):
                held_out_text = passed_on(text_validation)
            with dsl.Else():
                plain_text = passed_on(text)
            text_data = dsl.OneOf(ref(packed_text), held_out_text, plain_text)

            with dsl.If(adapters != ""):
                with dsl.If(instructions_validation != ""):
                    held_out_items = passed_on(instructions_validation)
                with dsl.Else():
                    plain_items = passed_on(instructions)
                items = passed_on(dsl.OneOf(held_out_items, plain_items))
            with dsl.Elif(instructions != ""):
                packed_items = prepare_dataset(instructions=instructions, validation=instructions_validation, **packing)
                step(packed_items, "prepare_instructions")
            with dsl.Elif(run_sft == False):  # noqa: E712 - a KFP channel
                no_items = passed_on("")
            with dsl.Else():
                made_items = generate_instructions(
                    store=store,
                    items=generate_items,
                    base_url=generate_base_url,
                    model=generate_model,
                    import_from=import_instructions,
                    seeds=generate_seeds,
                    against=generate_against,
                    catalogue=generate_catalogue,
                    max_cost=generate_max_cost,
                    max_tokens=generate_max_tokens,
                    price_prompt=generate_price_prompt,
                    price_answer=generate_price_answer,
                    concurrency=generate_concurrency,
                    requests_per_minute=generate_requests_per_minute,
                    tokens_per_minute=generate_tokens_per_minute,
                    batch=generate_batch,
                )
                step(made_items, "generate_instructions")
                kubernetes.use_secret_as_env(made_items, generate_secret, {MODEL_KEY: MODEL_KEY}, optional=True)
                packed_made = prepare_dataset(
                    instructions=ref(made_items), validation=instructions_validation, **packing
                )
                step(packed_made, "prepare_generated")
            instruction_data = dsl.OneOf(items, ref(packed_items), no_items, ref(packed_made))

            # --- continued pre-training: the embeddings alone, then LoRA with embeddings

            job = {"store": store, "size": size, "backend": backend, "namespace": namespace}
            job["processes_per_node"] = processes_per_node
            shape = {"lora_r": lora_rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
            with dsl.If(adapters != ""):
                no_stage_1 = passed_on(chinese)
            with dsl.Elif(run_stage1 == False):  # noqa: E712 - a KFP channel
                skipped_stage_1 = passed_on(chinese)
            with dsl.Else():
                embeddings = trained(
                    "embeddings",
                    of,
                    model=chinese,
                    dataset=text_data,
                    max_steps=embeddings_steps,
                    learning_rate=embeddings_learning_rate,
                    per_device_train_batch_size=embeddings_batch,
                    gradient_accumulation_steps=embeddings_accumulation,
                    nodes=embeddings_nodes,
                    arguments=embeddings_arguments,
                    **job,
                )
            first = dsl.OneOf(no_stage_1, skipped_stage_1, ref(embeddings))

            with dsl.If(adapters != ""):
                no_stage_2, no_lora = passed_on(first), passed_on("")
            with dsl.Else():
                lora = trained(
                    "lora",
                    of,
                    model=first,
                    dataset=text_data,
                    max_steps=lora_steps,
                    learning_rate=lora_learning_rate,
                    per_device_train_batch_size=lora_batch,
                    gradient_accumulation_steps=lora_accumulation,
                    nodes=lora_nodes,
                    embedding_rows=lora_embedding_rows,
                    embedding_lr=lora_embedding_learning_rate,
                    arguments=lora_arguments,
                    **job,
                    **shape,
                )
                merged_lora = step(merge_adapters(store=store, model=first, adapters=ref(lora)), "merge_lora")
            second = dsl.OneOf(no_stage_2, ref(merged_lora))
            lora_adapter = dsl.OneOf(no_lora, ref(lora))

            # --- instruction tuning

            with dsl.If(adapters != ""):
                no_sft, no_tuning = passed_on(second), passed_on("")
            with dsl.Elif(run_sft == False):  # noqa: E712 - a KFP channel
                skipped_sft, skipped_tuning = passed_on(second), passed_on("")
            with dsl.Else():
                sft = trained(
                    "sft",
                    of,
                    model=second,
                    dataset=instruction_data,
                    max_steps=sft_steps,
                    learning_rate=sft_learning_rate,
                    per_device_train_batch_size=sft_batch,
                    gradient_accumulation_steps=sft_accumulation,
                    nodes=sft_nodes,
                    arguments=sft_arguments,
                    train_embeddings=sft_trains_embeddings,
                    **job,
                    **shape,
                )
                merged_sft = step(merge_adapters(store=store, model=second, adapters=ref(sft)), "merge_sft")
                with dsl.If(check_merge == True):  # noqa: E712 - a KFP channel
                    both = step(join(first=lora_adapter, second=ref(sft)), "both adapters")
                    # the same weights as one after the other, from stage 1's model in one call
                    step(merge_adapters(store=store, model=first, adapters=ref(both)), "merge_both")
            adapted = dsl.OneOf(no_sft, skipped_sft, ref(merged_sft))
            sft_adapter = dsl.OneOf(no_tuning, skipped_tuning, ref(sft))

            # --- what came of it

            baselines = step(join(first=base, second=first, third=second), "models to compare")
            trainings = step(join(first=first, second=lora_adapter, third=sft_adapter), "trainings to show")
            evaluation = evaluate(
                store=store,
                model=adapted,
                baseline=ref(baselines),
                labels=LABELS,
                text=text_data,
                english=english_text,
                exams=exams,
                instructions=instruction_data,
                trainings=ref(trainings),
            )
            step(evaluation, "evaluate")
            with dsl.If(prompts != ""):
                step(generate(store=store, model=adapted, input=prompts), "generate")
            with dsl.Else():
                step(generate(store=store, model=adapted, prompt=prompt), "generate_one")

    return pipeline


def compile_pipeline(size: str, path: Path) -> None:
    """Writes the pipeline of a size as YAML; the same bytes every time. InputError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        compiler.Compiler().compile(adapt_llama(sizes.load(size)), str(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; choose another place") from error
