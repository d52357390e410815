"""The KFP signatures of launch_training and of its cleanup, which runs as the pipeline's exit handler.

Numbers that a job's pods ask for are texts here, and may be empty: "" means the default of the command.
"""

from kfp import dsl

from components.shared.images import image


@dsl.container_component
def launch_training(
    store: str,
    stage: str,
    model: str,
    dataset: str,
    ref: dsl.OutputPath(str),
    trained: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    backend: str = "pytorchjob",
    size: str = "",
    adapter: str = "",
    nodes: int = 1,
    processes_per_node: int = 1,
    gpu_resource: str = "",
    training_image: str = "",
    cpu: str = "2",
    memory: str = "8Gi",
    shared_memory: str = "2Gi",
    ephemeral_storage: str = "20Gi",
    queue: str = "",
    s3_secret: str = "",
    pull_secret: str = "",
    service_account: str = "",
    namespace: str = "",
    run_id: str = "",
    deadline_seconds: int = 86400,
    max_steps: int = -1,
    learning_rate: float = 2e-4,
    warmup_steps: float = 0.05,
    weight_decay: float = 0.01,
    per_device_train_batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    save_steps: int = 500,
    precision: str = "auto",
    deepspeed: str = "zero2",
    lora_r: int = 0,
    lora_alpha: float = 0.0,
    lora_dropout: float = -1.0,
    embedding_rows: str = "auto",
    embedding_lr: float = 0.0,
    train_embeddings: bool = False,
    arguments: str = "",
):
    return dsl.ContainerSpec(
        image=image("launch_training"),
        command=["python", "-m", "components.launch_training"],
        args=[
            "--store", store,
            "--stage", stage,
            "--model", model,
            "--dataset", dataset,
            "--adapter", adapter,
            "--backend", backend,
            "--size", size,
            "--nodes", nodes,
            "--processes-per-node", processes_per_node,
            "--gpu-resource", gpu_resource,
            "--training-image", training_image,
            "--cpu", cpu,
            "--memory", memory,
            "--shared-memory", shared_memory,
            "--ephemeral-storage", ephemeral_storage,
            "--queue", queue,
            "--s3-secret", s3_secret,
            "--pull-secret", pull_secret,
            "--service-account", service_account,
            "--namespace", namespace,
            "--run-id", run_id,
            "--deadline-seconds", deadline_seconds,
            "--output", trained.path,
            "--reference", ref,
            "--report", report.path,
            "--executor-input", "{{$}}",
            # its value may begin with dashes
            f"--arguments={arguments}",
            "--",
            "--max-steps", max_steps,
            "--learning-rate", learning_rate,
            "--warmup-steps", warmup_steps,
            "--weight-decay", weight_decay,
            "--per-device-train-batch-size", per_device_train_batch_size,
            "--gradient-accumulation-steps", gradient_accumulation_steps,
            "--save-steps", save_steps,
            "--precision", precision,
            "--deepspeed", deepspeed,
            "--lora-r", lora_r,
            "--lora-alpha", lora_alpha,
            "--lora-dropout", lora_dropout,
            "--embedding-rows", embedding_rows,
            "--embedding-lr", embedding_lr,
            "--train-embeddings", train_embeddings,
        ],
    )  # fmt: skip


@dsl.container_component
def cleanup_training(run_id: str, namespace: str = "", backend: str = "pytorchjob"):
    return dsl.ContainerSpec(
        image=image("launch_training"),
        command=["python", "-m", "components.launch_training.cleanup"],
        args=["--run-id", run_id, "--namespace", namespace, "--backend", backend],
    )
