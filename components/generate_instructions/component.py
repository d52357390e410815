"""The KFP signature of generate_instructions. The key comes as OPENAI_API_KEY from a secret of the pipeline's."""

from kfp import dsl

from components.shared.images import image


@dsl.container_component
def generate_instructions(
    store: str,
    items: int,
    base_url: str,
    model: str,
    ref: dsl.OutputPath(str),  # type: ignore[valid-type]
    instructions: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    seeds: str = "",
    per_request: int = 20,
    temperature: float = 1.0,
    seed: int = 42,
):
    return dsl.ContainerSpec(
        image=image("generate_instructions"),
        command=["python", "-m", "components.generate_instructions"],
        args=[
            "--store", store,
            "--items", items,
            "--base-url", base_url,
            "--model", model,
            "--seeds", seeds,
            "--per-request", per_request,
            "--temperature", temperature,
            "--seed", seed,
            "--output", instructions.path,
            "--reference", ref,
            "--executor-output", "{{$.outputs.output_file}}",
        ],
    )  # fmt: skip
