"""The KFP signature of `forward`. It runs in the launcher's image, which holds no torch."""

from kfp import dsl

from components.shared.images import image


@dsl.container_component
def forward(value: str, ref: dsl.OutputPath(str)):  # type: ignore[valid-type]
    return dsl.ContainerSpec(
        image=image("launch_training"),
        command=["python", "-m", "components.shared.forward"],
        args=["--value", value, "--reference", ref],
    )
