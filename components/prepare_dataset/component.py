"""The KFP signature of prepare_dataset."""

from kfp import dsl

from zhllama.kubernetes.images import image


@dsl.container_component
def prepare_dataset(
    store: str,
    tokenizer: str,
    ref: dsl.OutputPath(str),
    dataset: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    text: str = "",
    instructions: str = "",
    block_size: int = 512,
    packing: str = "best-fit",
    validation_fraction: float = 0.01,
    validation: str = "",
    evaluation: str = "",
    skip_bad: bool = False,
    drop_near_duplicates: bool = False,
):
    return dsl.ContainerSpec(
        image=image("prepare_dataset"),
        command=["python", "-m", "components.prepare_dataset"],
        args=[
            "--store", store,
            "--tokenizer", tokenizer,
            "--text", text,
            "--instructions", instructions,
            "--block-size", block_size,
            "--packing", packing,
            "--validation-fraction", validation_fraction,
            "--validation", validation,
            "--evaluation", evaluation,
            "--skip-bad", skip_bad,
            "--drop-near-duplicates", drop_near_duplicates,
            "--output", dataset.path,
            "--reference", ref,
            "--executor-input", "{{$}}",
        ],
    )  # fmt: skip
