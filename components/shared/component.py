"""The KFP signatures of `forward`. They run in the launcher's image, which holds no torch.

`join` is a step of its own because KFP's backend fills a text that is put together in the pipeline (`f"{a},{b}"`) into
a container's arguments in random order, and hands out unresolved placeholders about every other time
(kubeflow/pipelines issue 13977). Put together in the container's arguments, as here, they are resolved in one pass.
"""

from kfp import dsl

from components.shared.images import image


@dsl.container_component
def forward(value: str, ref: dsl.OutputPath(str)):  # type: ignore[valid-type]
    return dsl.ContainerSpec(
        image=image("launch_training"),
        command=["python", "-m", "components.shared.forward"],
        args=["--value", value, "--reference", ref],
    )


@dsl.container_component
def join(first: str, second: str, ref: dsl.OutputPath(str), third: str = ""):  # type: ignore[valid-type]
    """Several references as one text, comma-separated; an empty one leaves an empty place, which stages pass over."""
    return dsl.ContainerSpec(
        image=image("launch_training"),
        command=["python", "-m", "components.shared.forward"],
        args=["--value", f"{first},{second},{third}", "--reference", ref],
    )
