"""The KFP signatures of launch_training and of its cleanup, which runs as the pipeline's exit handler.

A job's machine is one input, options of the command as JSON; a training's options that no run changes are another
(`arguments`). Each input stands in a Workflow's nodes several times, and they may not grow past a megabyte together.
"""

from kfp import dsl

from zhllama.kubernetes.images import image


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
    adapter: str = "",
    run_id: str = "",
    backend: str = "pytorchjob",
    machine: str = "",
    max_steps: int = -1,
    learning_rate: float = 2e-4,
    per_device_train_batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    embedding_lr: float = 0.0,
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
            "--run-id", run_id,
            "--backend", backend,
            "--machine", machine,
            "--output", trained.path,
            "--reference", ref,
            "--report", report.path,
            "--executor-input", "{{$}}",
            # its value may begin with dashes
            f"--arguments={arguments}",
            "--",
            "--max-steps", max_steps,
            "--learning-rate", learning_rate,
            "--per-device-train-batch-size", per_device_train_batch_size,
            "--gradient-accumulation-steps", gradient_accumulation_steps,
            "--embedding-lr", embedding_lr,
        ],
    )  # fmt: skip


@dsl.container_component
def cleanup_training(run_id: str, namespace: str = "", backend: str = "pytorchjob"):
    return dsl.ContainerSpec(
        image=image("launch_training"),
        command=["python", "-m", "components.launch_training.cleanup"],
        args=["--run-id", run_id, "--namespace", namespace, "--backend", backend],
    )
