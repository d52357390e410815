"""The KFP signature of fetch_weights."""

from kfp import dsl

from zhllama.kubernetes.images import image


@dsl.container_component
def fetch_weights(
    store: str,
    source: str,
    ref: dsl.OutputPath(str),
    weights: dsl.Output[dsl.Model],
    size: str = "",
    expect: str = "",
):
    return dsl.ContainerSpec(
        image=image("fetch_weights"),
        command=["python", "-m", "components.fetch_weights"],
        args=[
            "--store", store,
            "--source", source,
            "--size", size,
            "--expect", expect,
            "--output", weights.path,
            "--reference", ref,
        ],
    )  # fmt: skip
