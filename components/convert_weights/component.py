"""The KFP signature of convert_weights."""

from kfp import dsl

from zhllama.kubernetes.images import image


@dsl.container_component
def convert_weights(
    store: str,
    weights: str,
    ref: dsl.OutputPath(str),
    model: dsl.Output[dsl.Model],
    max_positions: int = 2048,
):
    return dsl.ContainerSpec(
        image=image("convert_weights"),
        command=["python", "-m", "components.convert_weights"],
        args=[
            "--store", store,
            "--weights", weights,
            "--max-positions", max_positions,
            "--output", model.path,
            "--reference", ref,
        ],
    )  # fmt: skip
