"""The KFP signature of extend_tokenizer."""

from kfp import dsl

from zhllama.kubernetes.images import image


@dsl.container_component
def extend_tokenizer(
    store: str,
    model: str,
    ref: dsl.OutputPath(str),
    extended: dsl.Output[dsl.Model],
    chinese_tokenizer: str = "",
    scores: str = "distinct",
    pieces: str = "han",
    pad: bool = True,
    init: str = "piece-mean",
    pad_to_multiple_of: int = 1,
):
    return dsl.ContainerSpec(
        image=image("extend_tokenizer"),
        command=["python", "-m", "components.extend_tokenizer"],
        args=[
            "--store", store,
            "--model", model,
            "--chinese-tokenizer", chinese_tokenizer,
            "--scores", scores,
            "--pieces", pieces,
            "--pad", pad,
            "--init", init,
            "--pad-to-multiple-of", pad_to_multiple_of,
            "--output", extended.path,
            "--reference", ref,
        ],
    )  # fmt: skip
