"""The KFP signatures of serve: a check that a published model serves, and its deployment to the run's own cluster.

The first starts the server on loopback, holds its tokenizer against SentencePiece, asks `ask` through the API,
publishes question and answer, and ends with the server. It deploys nothing.
"""

from kfp import dsl

from zhllama.kubernetes.images import image


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


@dsl.container_component
def deploy(model: str, machine: str, ref: dsl.OutputPath(str), tried: dsl.Output[dsl.Artifact]):  # type: ignore[valid-type]
    """Deploys a model, whole or not at all; `ref` is the address at which it answers, `tried` what it was asked there
    and answered. machine: options of the command as JSON, `deploy` (kubernetes or kserve) among them.

    The step needs ZHLLAMA_API_KEY in its environment, from the key API_KEY of the machine's `api_key_secret`
    (`kubernetes.use_secret_as_env`), and its account the Role zhllama-deployer.
    """
    return dsl.ContainerSpec(
        image=image("serve"),
        command=["python", "-m", "components.serve"],
        args=["--model", model, "--machine", machine, "--output", tried.path, "--reference", ref],
    )
