"""The KFP signature of merge_adapters."""

from kfp import dsl

from zhllama.kubernetes.images import image


@dsl.container_component
def merge_adapters(
    store: str,
    model: str,
    adapters: str,
    ref: dsl.OutputPath(str),
    merged: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    adapters_2: str = "",
    prove: bool = False,
):
    return dsl.ContainerSpec(
        image=image("merge_adapters"),
        command=["python", "-m", "components.merge_adapters"],
        args=[
            "--store", store,
            "--model", model,
            "--adapters", adapters,
            "--adapters", adapters_2,
            "--prove", prove,
            "--output", merged.path,
            "--reference", ref,
            "--executor-input", "{{$}}",
        ],
    )  # fmt: skip
