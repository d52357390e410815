"""The KFP signatures of serve: a check that a published model serves, and its deployment to the run's own cluster.

The first starts the server on loopback, holds its tokenizer against SentencePiece, asks `ask` through the API,
publishes question and answer, and ends with the server. It deploys nothing.
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


@dsl.container_component
def deploy(
    model: str,
    ref: dsl.OutputPath(str),  # type: ignore[valid-type]
    tried: dsl.Output[dsl.Artifact],
    kind: str = "kubernetes",
    name: str = "zhllama",
    namespace: str = "",
    replicas: int = 1,
    gpus: int = 1,
    gpu_resource: str = "nvidia.com/gpu",
    cpu: str = "8",
    memory: str = "64Gi",
    shared_memory: str = "8Gi",
    ephemeral_storage: str = "20Gi",
    context_length: int = 2048,
    stop_first: bool = False,
    openshift: bool = False,
    vllm_image: str = "",
    wait_minutes: int = 30,
    s3_secret: str = "zhllama-s3",
    api_key_secret: str = "zhllama-api-key",
    pull_secret: str = "",
    proxy_secret: str = "",
    ca_config_map: str = "",
    size: str = "",
    labels: dict = {},  # noqa: B006 - KFP reads it, and nobody writes it
    node_selector: dict = {},  # noqa: B006
    tolerations: list = [],  # noqa: B006
):
    """Deploys a model, whole or not at all; `ref` is the address at which it answers, `tried` what it was asked there
    and answered.

    The step needs ZHLLAMA_API_KEY in its environment, from the key API_KEY of `api_key_secret`
    (`kubernetes.use_secret_as_env`), and its account the Role zhllama-deployer.
    """
    return dsl.ContainerSpec(
        image=image("serve"),
        command=["python", "-m", "components.serve"],
        args=[
            "--deploy", kind,
            "--model", model,
            "--name", name,
            "--namespace", namespace,
            "--replicas", replicas,
            "--gpus", gpus,
            "--gpu-resource", gpu_resource,
            "--cpu", cpu,
            "--memory", memory,
            "--shared-memory", shared_memory,
            "--ephemeral-storage", ephemeral_storage,
            "--context-length", context_length,
            "--stop-first", stop_first,
            "--openshift", openshift,
            "--vllm-image", vllm_image,
            "--wait-minutes", wait_minutes,
            "--s3-secret", s3_secret,
            "--api-key-secret", api_key_secret,
            "--pull-secret", pull_secret,
            "--proxy-secret", proxy_secret,
            "--ca-config-map", ca_config_map,
            "--size", size,
            "--labels", labels,
            "--node-selector", node_selector,
            "--tolerations", tolerations,
            "--output", tried.path,
            "--reference", ref,
        ],
    )  # fmt: skip
