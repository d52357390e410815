"""The KFP signature of train_tokenizer."""

from kfp import dsl

from zhllama.kubernetes.images import image


@dsl.container_component
def train_tokenizer(
    store: str,
    text: str,
    ref: dsl.OutputPath(str),
    tokenizer: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    vocab_size: int = 20000,
    skip_bad: bool = False,
):
    return dsl.ContainerSpec(
        image=image("train_tokenizer"),
        command=["python", "-m", "components.train_tokenizer"],
        args=[
            "--store", store,
            "--text", text,
            "--vocab-size", vocab_size,
            "--skip-bad", skip_bad,
            "--output", tokenizer.path,
            "--reference", ref,
            "--executor-input", "{{$}}",
        ],
    )  # fmt: skip
