"""The KFP signature of finetune, in the step's own pod; launch_training runs it as a job on many nodes."""

from kfp import dsl

from components.shared.images import image


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
    lora_r: int = 0,
    lora_alpha: float = 0.0,
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
            "--lora-r", lora_r,
            "--lora-alpha", lora_alpha,
            "--train-embeddings", train_embeddings,
            "--output", adapted.path,
            "--reference", ref,
            "--report", report.path,
            "--executor-output", "{{$.outputs.output_file}}",
        ],
    )  # fmt: skip
