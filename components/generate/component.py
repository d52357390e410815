"""The KFP signature of generate: a prompt or a file of instructions. A conversation needs a terminal."""

from kfp import dsl

from zhllama.kubernetes.images import image


@dsl.container_component
def generate(
    store: str,
    model: str,
    ref: dsl.OutputPath(str),  # type: ignore[valid-type]
    samples: dsl.Output[dsl.Artifact],
    adapters: str = "",
    prompt: str = "",
    default_prompt: str = "",
    input: str = "",
    with_prompt: bool = True,
    do_sample: bool = True,
    temperature: float = 0.2,
    max_new_tokens: int = 400,
    seed: int = 42,
    precision: str = "auto",
    context_length: int = 0,
):
    return dsl.ContainerSpec(
        image=image("generate"),
        command=["python", "-m", "components.generate"],
        args=[
            "--store", store,
            "--model", model,
            "--adapters", adapters,
            "--prompt", prompt,
            "--default-prompt", default_prompt,
            "--input", input,
            "--with-prompt", with_prompt,
            "--do-sample", do_sample,
            "--temperature", temperature,
            "--max-new-tokens", max_new_tokens,
            "--seed", seed,
            "--precision", precision,
            "--context-length", context_length,
            "--output", samples.path,
            "--reference", ref,
        ],
    )  # fmt: skip
