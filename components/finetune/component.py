"""The KFP signature of finetune, in the step's own pod; launch_training runs it as a job on many nodes."""

from kfp import dsl

from zhllama.kubernetes.images import image


@dsl.container_component
def finetune(
    store: str,
    model: str,
    dataset: str,
    ref: dsl.OutputPath(str),
    adapted: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    adapter: str = "",
    max_steps: int = -1,
    learning_rate: float = 1e-4,
    per_device_train_batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    num_train_epochs: float = 1.0,
    save_steps: int = 500,
    precision: str = "auto",
    gradient_checkpointing: bool = False,
    deepspeed: str = "zero2",
    faithful: bool = False,
    lora_r: int = 0,
    lora_alpha: float = 0.0,
    lora_dropout: float = -1.0,
    embedding_rows: str = "auto",
    embedding_lr: float = 0.0,
    train_embeddings: bool = False,
):
    return dsl.ContainerSpec(
        image=image("finetune"),
        command=["python", "-m", "components.finetune"],
        args=[
            "--store", store,
            "--model", model,
            "--dataset", dataset,
            "--adapter", adapter,
            "--max-steps", max_steps,
            "--learning-rate", learning_rate,
            "--per-device-train-batch-size", per_device_train_batch_size,
            "--gradient-accumulation-steps", gradient_accumulation_steps,
            "--num-train-epochs", num_train_epochs,
            "--save-steps", save_steps,
            "--precision", precision,
            "--gradient-checkpointing", gradient_checkpointing,
            "--deepspeed", deepspeed,
            "--faithful", faithful,
            "--lora-r", lora_r,
            "--lora-alpha", lora_alpha,
            "--lora-dropout", lora_dropout,
            "--embedding-rows", embedding_rows,
            "--embedding-lr", embedding_lr,
            "--train-embeddings", train_embeddings,
            "--output", adapted.path,
            "--reference", ref,
            "--report", report.path,
            "--executor-input", "{{$}}",
        ],
    )  # fmt: skip
