"""The KFP signature of export_model."""

from kfp import dsl

from zhllama.kubernetes.images import image


@dsl.container_component
def export_model(
    store: str,
    model: str,
    ref: dsl.OutputPath(str),
    exported: dsl.Output[dsl.Model],
    format: str = "meta",
    shards: int = 0,
    quantization: str = "",
    name: str = "zhllama",
):
    return dsl.ContainerSpec(
        image=image("export_model"),
        command=["python", "-m", "components.export_model"],
        args=[
            "--store", store,
            "--model", model,
            "--format", format,
            "--shards", shards,
            "--quantization", quantization,
            "--name", name,
            "--output", exported.path,
            "--reference", ref,
        ],
    )  # fmt: skip
