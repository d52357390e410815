"""The pipeline: the one place where stages are wired.

    fetch → convert ─┐                       ┌─ prepare text ─→ stage 1 → stage 2 → merge ─┐
                     ├→ extend vocabulary ───┤                                             ├→ SFT → merge → evaluate
    train tokenizer ─┘                       └─ prepare instructions ──────────────────────┘              → generate
                                                                                                          → deploy

Every part can be replaced by something ready (a model, a Chinese tokenizer, an extended model, published adapters) or
left out (stage 1, both stages of pre-training, SFT). Each such choice is If … Else joined by OneOf over references,
since a consumer of a skipped step would be dropped. Two rules keep clear of faults in kfp 2.17 and its backend, and
tests hold them: all conditions stand in one pipeline (called from another that has some too, kfp puts steps into the
wrong branch), and texts are put together by the step `join`, never here (components/shared/component.py says why).
What KFP can set on a step is in steps.py; docs/pipeline.md lists the parameters.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
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
from components.serve.component import deploy as deploy_model
from components.shared import storage
from components.shared.component import forward, join
from components.shared.errors import InputError
from components.train_tokenizer.component import train_tokenizer
from pipelines import sizes
from pipelines.sizes import Size
from pipelines.steps import Fixed, Steps

MODEL_KEY = "OPENAI_API_KEY"
"""In its secret, and in the step that has a model write instructions; a model of one's own may want none."""
SERVED_KEY = {"API_KEY": "ZHLLAMA_API_KEY"}
"""Key in the secret of a served model → variable of the step that deploys it, and tries it."""
LABELS = "base,stage 1,stage 2,adapted"
"""What the evaluation calls the models that it compares."""


def ref(task: Any) -> Any:
    return task.outputs["ref"]


def adapt_llama(of: Size, fixed: Fixed = Fixed()) -> Any:  # noqa: B008 - it cannot be changed
    """The pipeline with the defaults of a size, for kfp to compile."""
    made = dsl.pipeline(name="adapt-llama", description="Adapt a LLaMA model to Chinese")
    return made(course(of, fixed))


def course(of: Size, fixed: Fixed = Fixed()) -> Callable[..., None]:  # noqa: B008 - it cannot be changed
    """The function that kfp makes the pipeline of: its signature and docstring are the pipeline's parameters."""
    training, work, serving = of.lora, of.work, of.serving

    def pipeline(
        store: str,
        # the model
        weights: str = "",
        expect: str = "",
        size: str = of.name,
        model: str = "",
        chinese_tokenizer: str = "",
        extended_model: str = "",
        adapters: str = "",
        lora_adapter: str = "",
        sft_adapter: str = "",
        # what it learns from
        text: str = "",
        text_validation: str = "",
        english_text: str = "",
        exams: str = "",
        instructions: str = "",
        instructions_validation: str = "",
        import_instructions: str = "",
        prompts: str = "",
        prompt: str = "请介绍一下你自己。",
        vocab_size: int = of.vocab_size,
        block_size: int = of.block_size,
        validation_fraction: float = of.validation_fraction,
        evaluation: str = "",
        skip_bad: bool = False,
        drop_near_duplicates: bool = False,
        # instructions that a model writes
        generate_items: int = 0,
        generate_base_url: str = "",
        generate_model: str = "",
        generate_secret: str = "zhllama-openai",
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
        # which stages run
        run_pretraining: bool = True,
        run_stage1: bool = True,
        run_sft: bool = True,
        check_merge: bool = not of.sft.gpu,
        deploy: str = "none",
        # how it is trained
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
        # the training jobs
        backend: str = "pytorchjob",
        namespace: str = "",
        processes_per_node: int = training.processes_per_node,
        gpu_resource: str = training.gpu,
        training_cpu: str = training.cpu,
        training_memory: str = training.memory,
        training_shared_memory: str = training.shared_memory,
        training_ephemeral_storage: str = training.ephemeral_storage,
        training_deadline_seconds: int = training.deadline_seconds,
        training_waiting_seconds: int = 604800,
        training_grace_seconds: int = 300,
        training_attempts: int = 3,
        training_min_nodes: int = 0,
        training_max_nodes: int = 0,
        training_account: str = "zhllama-training",
        queue: str = "",
        priority_class: str = "",
        team: str = "",
        labels: dict = {},  # noqa: B006 - KFP reads it, and nobody writes it
        annotations: dict = {},  # noqa: B006
        # the steps
        control_cpu: str = work.control.cpu,
        control_memory: str = work.control.memory,
        data_cpu: str = work.data.cpu,
        data_memory: str = work.data.memory,
        weights_cpu: str = work.weights.cpu,
        weights_memory: str = work.weights.memory,
        evaluation_cpu: str = work.evaluation.cpu,
        evaluation_memory: str = work.evaluation.memory,
        evaluation_gpus: str = "1" if work.evaluation.gpu else "0",
        # where pods run
        node_selector: dict = {},  # noqa: B006
        tolerations: list = [],  # noqa: B006
        gpu_node_selector: dict = {},  # noqa: B006
        gpu_tolerations: list = [],  # noqa: B006
        # secrets, certificates, proxy
        s3_secret: str = "zhllama-s3",
        pull_secret: str = "zhllama-pull",
        proxy_secret: str = "zhllama-proxy",
        ca_config_map: str = "zhllama-ca",
        # the served model
        serve_name: str = f"llama-{of.name}",
        serve_replicas: int = serving.replicas,
        serve_gpus: int = serving.gpus,
        serve_cpu: str = serving.cpu,
        serve_memory: str = serving.memory,
        serve_shared_memory: str = serving.shared_memory,
        serve_ephemeral_storage: str = serving.ephemeral_storage,
        serve_context_length: int = serving.context_length,
        serve_stop_first: bool = False,
        serve_openshift: bool = False,
        serve_image: str = "",
        serve_wait_minutes: int = 30,
        serve_secret: str = "zhllama-api-key",
    ):
        """Adapt a LLaMA model to Chinese.

        Args:
            store: Where everything is put: an s3:// prefix.
            weights: The model's weights: Meta's files or a Hugging Face model; an s3://, https:// or hf:// address.
            expect: A file of SHA-256 sums that the weights must have.
            size: The model's size, which the weights must have; a label on what is made.
            model: A model that is ready (a reference), instead of `weights`.
            chinese_tokenizer: A Chinese SentencePiece model that is ready, instead of one trained on `text`.
            extended_model: A model with its Chinese vocabulary, instead of all that makes one.
            adapters: Published adapters, in order: they are merged and measured, and nothing is trained.
            lora_adapter: An adapter that stage 2 goes on from, trained on the model that comes in; stage 1 is left out.
            sft_adapter: An adapter that instruction tuning goes on from, trained on the model that comes to it.
            text: Chinese text to learn from: folders or prefixes, with weights as in zh:0.9,en:0.1.
            text_validation: Text that is held out; without it a share of `text` is.
            english_text: English text, to measure what is forgotten.
            exams: Multiple-choice questions, as C-Eval's.
            instructions: Alpaca items to learn from.
            instructions_validation: Items that are held out; without them a share of `instructions` is.
            import_instructions: Public data sets to take instructions from, where none are given.
            prompts: A file of instructions that the result answers.
            prompt: What it answers without such a file.
            vocab_size: Pieces of the Chinese tokenizer.
            block_size: Tokens of a training block.
            validation_fraction: The share that is held out.
            evaluation: Evaluation data that the training data must not hold.
            skip_bad: Whether damaged lines are left out, and not refused.
            drop_near_duplicates: Whether texts that nearly repeat another are left out.
            generate_items: How many instructions a model writes, where none are given.
            generate_base_url: The address of its OpenAI-compatible API.
            generate_model: Its name there.
            generate_secret: Secret with its key, under OPENAI_API_KEY; it may be absent.
            generate_seeds: Items that it is shown as examples.
            generate_against: Items that must not be repeated.
            generate_catalogue: The topics and kinds of tasks to ask for.
            generate_max_cost: At most this much money; 0, no limit.
            generate_max_tokens: At most this many tokens; 0, no limit.
            generate_price_prompt: Price of a million tokens asked; below 0, unknown.
            generate_price_answer: Price of a million tokens answered; below 0, unknown.
            generate_concurrency: Requests side by side.
            generate_requests_per_minute: At most so many; 0, no limit.
            generate_tokens_per_minute: At most so many; 0, no limit.
            generate_batch: Whether the API's batches are used.
            run_pretraining: Whether there is continued pre-training; false leaves out both of its stages.
            run_stage1: Whether its stage 1 (the embeddings alone) runs.
            run_sft: Whether there is instruction tuning.
            check_merge: Whether both adapters are also merged in one call, which must give the same weights.
            deploy: Whether the result is served on the cluster: none, kubernetes or kserve.
            embeddings_steps: Optimizer steps of stage 1.
            embeddings_learning_rate: Its learning rate.
            embeddings_batch: Its blocks for each process and forward pass.
            embeddings_accumulation: Its forward passes for each optimizer step.
            embeddings_nodes: Its nodes.
            embeddings_arguments: More options of its command, as one text; they come last, and win.
            lora_steps: Optimizer steps of stage 2.
            lora_learning_rate: Its learning rate.
            lora_batch: Its blocks for each process and forward pass.
            lora_accumulation: Its forward passes for each optimizer step.
            lora_nodes: Its nodes.
            lora_embedding_rows: The rows of the embeddings that it trains: all, new, or auto.
            lora_embedding_learning_rate: The embeddings' own learning rate; 0, the same.
            lora_arguments: More options of its command.
            sft_steps: Optimizer steps of instruction tuning.
            sft_learning_rate: Its learning rate.
            sft_batch: Its blocks for each process and forward pass.
            sft_accumulation: Its forward passes for each optimizer step.
            sft_nodes: Its nodes.
            sft_arguments: More options of its command.
            sft_trains_embeddings: Whether it trains embed_tokens and lm_head too.
            lora_rank: Rank of the LoRA matrices; an adapter that is gone on from must have the same.
            lora_alpha: Their alpha.
            lora_dropout: Their dropout.
            backend: What runs the jobs: pytorchjob, trainjob, or local (processes; `zhllama run` says so).
            namespace: Where jobs and the served model are; empty, the run's own.
            processes_per_node: Training processes of a node: its GPUs.
            gpu_resource: What the cluster calls a GPU; empty, none is used.
            training_cpu: CPU of a node's pod.
            training_memory: Its memory, /dev/shm included.
            training_shared_memory: Its /dev/shm.
            training_ephemeral_storage: Its disk, for model and data.
            training_deadline_seconds: A job runs this long at most; waiting in a queue does not count.
            training_waiting_seconds: It waits this long at most, for its queue or its nodes; 0, for ever.
            training_grace_seconds: What it gets to write a checkpoint when it is stopped.
            training_attempts: Jobs that may fail before a training does.
            training_min_nodes: Elastic: a job goes on with as few nodes as this; 0, it needs all of them.
            training_max_nodes: Elastic: and with as many as this. Not with ZeRO.
            training_account: The jobs' service account; it needs no rights.
            queue: Kueue's local queue.
            priority_class: Kueue's workload priority class.
            team: A label on the jobs.
            labels: More labels of the jobs, the served model and their pods, as JSON.
            annotations: Annotations of the jobs, as JSON.
            control_cpu: CPU of the steps that pass references on and follow jobs.
            control_memory: Their memory.
            data_cpu: CPU of the steps that fetch weights, prepare data and deploy.
            data_memory: Their memory.
            weights_cpu: CPU of the steps that convert, extend and merge models.
            weights_memory: Their memory.
            evaluation_cpu: CPU of the steps that run a model.
            evaluation_memory: Their memory.
            evaluation_gpus: Their GPUs, 1 or 0; of no effect at a size whose steps have none.
            node_selector: Labels of the nodes for steps without a GPU, as JSON.
            tolerations: Taints that these steps tolerate, as a JSON list.
            gpu_node_selector: Labels of the nodes for jobs, the served model and steps with a GPU, as JSON.
            gpu_tolerations: Taints that these tolerate, as a JSON list.
            s3_secret: Secret with the S3 settings, for steps, jobs and the served model; none, web identity.
            pull_secret: Secret to pull images with; it may be absent.
            proxy_secret: Secret with HTTPS_PROXY, HTTP_PROXY and NO_PROXY; it may be absent.
            ca_config_map: ConfigMap with certificates to trust (*.crt, *.pem); it may be absent.
            serve_name: What requests call the served model, and what its objects are called.
            serve_replicas: Its pods.
            serve_gpus: GPUs of each; the model is split between them.
            serve_cpu: CPU of each.
            serve_memory: Memory of each, /dev/shm included.
            serve_shared_memory: /dev/shm of each.
            serve_ephemeral_storage: Disk of each; the weights do not touch it.
            serve_context_length: Tokens of prompt and answer together.
            serve_stop_first: Whether old pods stop before new ones start, where there are no GPUs to spare.
            serve_openshift: Whether pods name no user, since OpenShift gives them one.
            serve_image: vLLM's image, from a registry of your own, say.
            serve_wait_minutes: How long they may take until they answer.
            serve_secret: Secret with the key that requests must give, under API_KEY.
        """
        steps = Steps(
            size=of,
            fixed=fixed,
            resources={
                "control": (control_cpu, control_memory),
                "data": (data_cpu, data_memory),
                "weights": (weights_cpu, weights_memory),
                "evaluation": (evaluation_cpu, evaluation_memory),
            },
            gpu=(gpu_resource, evaluation_gpus),
            s3_secret=s3_secret,
            pull_secret=pull_secret,
            proxy_secret=proxy_secret,
            ca_config_map=ca_config_map,
            node_selector=node_selector,
            tolerations=tolerations,
            gpu_node_selector=gpu_node_selector,
            gpu_tolerations=gpu_tolerations,
        )

        def passed_on(value: Any) -> Any:
            """The branch in which a stage is left out: what went in comes out."""
            return ref(steps.control(forward(value=value), "pass on"))

        def held_out_or_whole(held_out: Any, whole: Any) -> Any:
            """Where nothing is trained: what the evaluation reads as it is."""
            with dsl.If(held_out != ""):
                some = passed_on(held_out)
            with dsl.Else():
                all_of_it = passed_on(whole)
            return passed_on(dsl.OneOf(some, all_of_it))

        def trained(stage: str, **given: Any) -> Any:
            """A training as a job of its own, on the machines that the size names."""
            machine = of.training(stage)
            task = launch_training(
                store=store,
                stage=stage,
                size=size,
                run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
                warmup_steps=machine.warmup_ratio,
                weight_decay=machine.weight_decay,
                save_steps=machine.save_steps,
                deepspeed=machine.deepspeed,
                backend=backend,
                namespace=namespace,
                processes_per_node=processes_per_node,
                gpu_resource=gpu_resource,
                cpu=training_cpu,
                memory=training_memory,
                shared_memory=training_shared_memory,
                ephemeral_storage=training_ephemeral_storage,
                deadline_seconds=training_deadline_seconds,
                waiting_seconds=training_waiting_seconds,
                grace_seconds=training_grace_seconds,
                attempts=training_attempts,
                min_nodes=training_min_nodes,
                max_nodes=training_max_nodes,
                service_account=training_account,
                queue=queue,
                priority_class=priority_class,
                team=team,
                labels=labels,
                annotations=annotations,
                node_selector=gpu_node_selector,
                tolerations=gpu_tolerations,
                s3_secret=s3_secret,
                pull_secret=pull_secret,
                proxy_secret=proxy_secret,
                ca_config_map=ca_config_map,
                **given,
            )
            return steps.launch(task, f"train_{stage}")

        cleanup = cleanup_training(run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, namespace=namespace, backend=backend)
        with dsl.ExitHandler(steps.control(cleanup, "cleanup_training")):
            # --- the model to start from

            with dsl.If(model != ""):
                ready = passed_on(model)
            with dsl.Elif(extended_model != ""):
                ready_extended = passed_on(extended_model)
            with dsl.Else():
                fetched = fetch_weights(store=store, source=weights, size=size, expect=expect)
                steps.data(fetched, "fetch_weights")
                converted = steps.weights(convert_weights(store=store, weights=ref(fetched)), "convert_weights")
            base = dsl.OneOf(ready, ready_extended, ref(converted))

            # --- its vocabulary; published adapters bring their own, and what they learnt

            with dsl.If(adapters != ""):
                published = merge_adapters(store=store, model=base, adapters=adapters)
                steps.weights(published, "merge_published")
            with dsl.Elif(extended_model != ""):
                given = passed_on(extended_model)
            with dsl.Elif(chinese_tokenizer != ""):
                with_given = extend_tokenizer(store=store, model=base, chinese_tokenizer=chinese_tokenizer)
                steps.weights(with_given, "extend_by_given")
            with dsl.Else():
                pieces = train_tokenizer(store=store, text=text, vocab_size=vocab_size, skip_bad=skip_bad)
                steps.data(pieces, "train_tokenizer")
                extended = extend_tokenizer(store=store, model=base, chinese_tokenizer=ref(pieces))
                steps.weights(extended, "extend_tokenizer")
            chinese = dsl.OneOf(ref(published), given, ref(with_given), ref(extended))

            # --- data: packed blocks

            packing = {"store": store, "tokenizer": chinese, "block_size": block_size}
            packing |= {"validation_fraction": validation_fraction, "evaluation": evaluation}
            packing |= {"skip_bad": skip_bad, "drop_near_duplicates": drop_near_duplicates}
            with dsl.If(adapters != ""):
                measured_text = held_out_or_whole(text_validation, text)
            with dsl.Elif(run_pretraining == False):  # noqa: E712 - a KFP channel
                only_measured_text = held_out_or_whole(text_validation, text)
            with dsl.Else():
                packed_text = prepare_dataset(text=text, validation=text_validation, **packing)
                steps.data(packed_text, "prepare_text")
            text_data = dsl.OneOf(measured_text, only_measured_text, ref(packed_text))

            with dsl.If(adapters != ""):
                items = held_out_or_whole(instructions_validation, instructions)
            with dsl.Elif(instructions != ""):
                packed_items = prepare_dataset(instructions=instructions, validation=instructions_validation, **packing)
                steps.data(packed_items, "prepare_instructions")
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
                steps.data(made_items, "generate_instructions")
                kubernetes.use_secret_as_env(made_items, generate_secret, {MODEL_KEY: MODEL_KEY}, optional=True)
                packed_made = prepare_dataset(
                    instructions=ref(made_items), validation=instructions_validation, **packing
                )
                steps.data(packed_made, "prepare_generated")
            instruction_data = dsl.OneOf(items, ref(packed_items), no_items, ref(packed_made))

            # --- continued pre-training: the embeddings alone, then LoRA with embeddings

            shape = {"lora_r": lora_rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
            with dsl.If(adapters != ""):
                no_stage_1 = passed_on(chinese)
            with dsl.Elif(run_pretraining == False):  # noqa: E712 - a KFP channel
                unwanted_stage_1 = passed_on(chinese)
            with dsl.Elif(run_stage1 == False):  # noqa: E712 - a KFP channel
                skipped_stage_1 = passed_on(chinese)
            with dsl.Elif(lora_adapter != ""):
                # the embeddings that it goes on from are in the adapter
                earlier_stage_1 = passed_on(chinese)
            with dsl.Else():
                embeddings = trained(
                    "embeddings",
                    model=chinese,
                    dataset=text_data,
                    max_steps=embeddings_steps,
                    learning_rate=embeddings_learning_rate,
                    per_device_train_batch_size=embeddings_batch,
                    gradient_accumulation_steps=embeddings_accumulation,
                    nodes=embeddings_nodes,
                    arguments=embeddings_arguments,
                )
            first = dsl.OneOf(no_stage_1, unwanted_stage_1, skipped_stage_1, earlier_stage_1, ref(embeddings))

            with dsl.If(adapters != ""):
                no_stage_2, no_lora = passed_on(first), passed_on("")
            with dsl.Elif(run_pretraining == False):  # noqa: E712 - a KFP channel
                unwanted_stage_2, unwanted_lora = passed_on(first), passed_on("")
            with dsl.Else():
                lora = trained(
                    "lora",
                    model=first,
                    dataset=text_data,
                    adapter=lora_adapter,
                    max_steps=lora_steps,
                    learning_rate=lora_learning_rate,
                    per_device_train_batch_size=lora_batch,
                    gradient_accumulation_steps=lora_accumulation,
                    nodes=lora_nodes,
                    embedding_rows=lora_embedding_rows,
                    embedding_lr=lora_embedding_learning_rate,
                    arguments=lora_arguments,
                    **shape,
                )
                merged_lora = merge_adapters(store=store, model=first, adapters=ref(lora))
                steps.weights(merged_lora, "merge_lora")
            second = dsl.OneOf(no_stage_2, unwanted_stage_2, ref(merged_lora))
            trained_lora = dsl.OneOf(no_lora, unwanted_lora, ref(lora))

            # --- instruction tuning

            with dsl.If(adapters != ""):
                no_sft, no_tuning = passed_on(second), passed_on("")
            with dsl.Elif(run_sft == False):  # noqa: E712 - a KFP channel
                skipped_sft, skipped_tuning = passed_on(second), passed_on("")
            with dsl.Else():
                sft = trained(
                    "sft",
                    model=second,
                    dataset=instruction_data,
                    adapter=sft_adapter,
                    max_steps=sft_steps,
                    learning_rate=sft_learning_rate,
                    per_device_train_batch_size=sft_batch,
                    gradient_accumulation_steps=sft_accumulation,
                    nodes=sft_nodes,
                    arguments=sft_arguments,
                    train_embeddings=sft_trains_embeddings,
                    **shape,
                )
                merged_sft = merge_adapters(store=store, model=second, adapters=ref(sft))
                steps.weights(merged_sft, "merge_sft")
                with dsl.If(check_merge == True):  # noqa: E712 - a KFP channel
                    both = steps.control(join(first=trained_lora, second=ref(sft)), "both adapters")
                    # the same weights as one after the other, from stage 1's model in one call
                    steps.weights(merge_adapters(store=store, model=first, adapters=ref(both)), "merge_both")
            adapted = dsl.OneOf(no_sft, skipped_sft, ref(merged_sft))
            trained_sft = dsl.OneOf(no_tuning, skipped_tuning, ref(sft))

            # --- what came of it

            baselines = steps.control(join(first=base, second=first, third=second), "models to compare")
            trainings = steps.control(join(first=first, second=trained_lora, third=trained_sft), "trainings to show")
            compared = evaluate(
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
            steps.evaluation(compared, "evaluate")
            with dsl.If(prompts != ""):
                steps.evaluation(generate(store=store, model=adapted, input=prompts), "generate")
            with dsl.Else():
                steps.evaluation(generate(store=store, model=adapted, prompt=prompt), "generate_one")
            with dsl.If(deploy != "none"):
                deployed = deploy_model(
                    model=adapted,
                    kind=deploy,
                    name=serve_name,
                    namespace=namespace,
                    replicas=serve_replicas,
                    gpus=serve_gpus,
                    gpu_resource=gpu_resource,
                    cpu=serve_cpu,
                    memory=serve_memory,
                    shared_memory=serve_shared_memory,
                    ephemeral_storage=serve_ephemeral_storage,
                    context_length=serve_context_length,
                    stop_first=serve_stop_first,
                    openshift=serve_openshift,
                    vllm_image=serve_image,
                    wait_minutes=serve_wait_minutes,
                    s3_secret=s3_secret,
                    api_key_secret=serve_secret,
                    pull_secret=pull_secret,
                    proxy_secret=proxy_secret,
                    ca_config_map=ca_config_map,
                    size=size,
                    labels=labels,
                    node_selector=gpu_node_selector,
                    tolerations=gpu_tolerations,
                )
                steps.deploy(deployed, "deploy")
                kubernetes.use_secret_as_env(deployed, serve_secret, SERVED_KEY)

    return pipeline


def compile_pipeline(size: str, path: Path, fixed: Fixed = Fixed()) -> None:  # noqa: B008 - it cannot be changed
    """Writes the pipeline of a size as YAML; the same bytes every time. InputError where the file cannot be written."""
    if path.suffix not in (".yaml", ".yml") or path.is_dir():
        raise InputError(f"{path}: kfp writes a pipeline with its settings as YAML alone; name a file as pipeline.yaml")
    try:
        # kfp writes where it is told, bit by bit: a disk that is full must not leave half a pipeline
        with TemporaryDirectory() as folder:
            whole = Path(folder, "pipeline.yaml")
            compiler.Compiler().compile(adapt_llama(sizes.load(size), fixed), str(whole))
            storage.write_bytes(str(path), whole.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; choose another place") from error
