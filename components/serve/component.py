"""The KFP signature of serve: a check that a published model serves.

The step starts the server on loopback, holds its tokenizer against SentencePiece, asks `ask` through the API, publishes
question and answer, and ends with the server. It deploys nothing.
"""

from kfp import dsl

from components.shared.images import image


@dsl.container_component
def serve(
    store: str,
    model: str,
    ref: dsl.OutputPath(str),  # type: ignore[valid-type]
    samples: dsl.Output[dsl.Artifact],
    ask: str = "你好，请介绍一下你自己。",
):
    return dsl.ContainerSpec(
        image=image("serve"),
        command=["python", "-m", "components.serve"],
        args=["--store", store, "--model", model, "--ask", ask, "--output", samples.path, "--reference", ref],
    )
