"""The options of serve."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from zhllama.errors import InputError
from zhllama.kubernetes.pods import mapping, tolerations
from zhllama.mounted_secrets import KEY, KEY_FOLDER, READ
from zhllama.stage.options import NotKeyed, Ref, StageOptions, option_of

EngineName = Literal["auto", "transformers", "llama.cpp", "vllm"]
KEY_VARIABLE = "ZHLLAMA_API_KEY"
SHORTEST_KEY = 16


@dataclass(frozen=True, kw_only=True)
class Serve(StageOptions):
    """Serve a model behind an OpenAI-compatible API: on this machine until Ctrl-C, or on a cluster with --deploy."""

    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "sentencepiece")

    store: str = ""
    """With --ask: where the answer is put, a folder or an s3:// prefix. Without it the answer is only printed."""
    model: Ref
    """Reference to the model: a Hugging Face folder, or a GGUF file."""
    engine: EngineName = "auto"
    """What runs it here: transformers, llama.cpp (for GGUF) or vllm. auto: what fits the model and this machine."""
    file: str = ""
    """The GGUF file to serve, where the artifact holds several."""
    host: NotKeyed[str] = "127.0.0.1"
    """Where to listen. Any address but a loopback one needs an API key: ZHLLAMA_API_KEY, or --api-key-file."""
    port: NotKeyed[int] = 8000
    """The port; 0 takes a free one."""
    api_key_file: NotKeyed[str] = ""
    """A file with the API key that requests must give."""
    page: NotKeyed[bool] = True
    """Whether there is a chat page at /."""
    name: str = "zhllama"
    """What requests call the model, and on a cluster what its objects are called."""
    ask: str = ""
    """Ask this through the API, print the answer, and end: a check that the model serves."""
    deploy: Literal["none", "kubernetes", "kserve"] = "none"
    """Deploy to the cluster of this pod or of KUBECONFIG: as a Deployment and Service, or as an InferenceService."""
    machine: NotKeyed[str] = ""
    """Options of this command as one JSON object, {"memory": "64Gi", "gpus": 2}; one that is given by itself wins."""
    namespace: NotKeyed[str] = ""
    """With --deploy: where to. Empty: this pod's, or the context's."""
    replicas: NotKeyed[int] = 1
    """With --deploy: pods, each with the whole model. So on to --address."""
    gpus: NotKeyed[int] = 1
    """GPUs of a pod; the model is split between them."""
    gpu_resource: NotKeyed[str] = "nvidia.com/gpu"
    """What the cluster calls a GPU."""
    cpu: NotKeyed[str] = "8"
    """Processors of a pod."""
    memory: NotKeyed[str] = "64Gi"
    """Memory of a pod."""
    shared_memory: NotKeyed[str] = "8Gi"
    """/dev/shm of a pod, part of its memory."""
    ephemeral_storage: NotKeyed[str] = "20Gi"
    """Node-local disk of a pod: the weights do not touch it."""
    context_length: NotKeyed[int] = 2048
    """Tokens of prompt and answer together."""
    s3_secret: NotKeyed[str] = "zhllama-s3"
    """The secret with the S3 settings; none for web identity."""
    api_key_secret: NotKeyed[str] = "zhllama-api-key"
    """The secret whose API_KEY requests must give. Its value must be here too (ZHLLAMA_API_KEY), to try the server."""
    pull_secret: NotKeyed[str] = ""
    """The secret to pull the images with."""
    proxy_secret: NotKeyed[str] = ""
    """The secret with HTTPS_PROXY, HTTP_PROXY, NO_PROXY for the pods, as far as they are there."""
    ca_config_map: NotKeyed[str] = ""
    """The ConfigMap with certificates (*.crt, *.pem) that pods trust beside the public ones; it may be absent."""
    size: NotKeyed[str] = ""
    """Name of the model size, a label on the objects and pods."""
    labels: NotKeyed[str] = ""
    """More labels of the objects and pods, as JSON: {"cost-centre": "42"}."""
    node_selector: NotKeyed[str] = ""
    """Labels of the nodes that pods may run on, as JSON."""
    tolerations: NotKeyed[str] = ""
    """Taints that pods tolerate, as JSON: [{"key": "nvidia.com/gpu", "operator": "Exists"}]."""
    stop_first: NotKeyed[bool] = False
    """Stop the old pods before the new ones start, where there are no GPUs to spare."""
    openshift: NotKeyed[bool] = False
    """Pods name no user, since OpenShift gives them one and refuses any other."""
    istio: NotKeyed[bool] = False
    """Pods have Istio's sidecar (a native one); S3 is reached past it. Without it they opt out of one."""
    vllm_image: NotKeyed[str] = ""
    """vLLM's image, from a registry of your own, say; empty: vLLM's own of the version that this one was tried with."""
    wait_minutes: NotKeyed[int] = 30
    """How long the new pods may take until they answer."""
    address: NotKeyed[str] = ""
    """Where the service is reached from here; empty: by its name in a pod, else through the API server."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"serve: --port is {self.port}; it must be between 0 (a free one) and 65535")
        if not self.name or not all(letter.isascii() and (letter.isalnum() or letter in "-_") for letter in self.name):
            raise InputError(f"serve: --name is {self.name!r}; use letters, digits, - and _")
        deployed = self.deploy != "none"
        if deployed and self.ask:
            raise InputError("serve: --ask starts a server here and --deploy one on a cluster; leave out one")
        for option in ("output", "reference", "store"):
            needed = "store" if option != "store" else "ask"
            if getattr(self, option) and not getattr(self, needed) and not deployed:
                raise InputError(f"serve: --{option} is for the answer to a question; give --{needed} too")
        for option in ("replicas", "gpus", "context_length", "wait_minutes"):
            if getattr(self, option) < 1:
                raise InputError(f"serve: {option_of(option)} is {getattr(self, option)}; 1 or more is needed")
        for option in ("labels", "node_selector"):
            mapping(f"serve: {option_of(option)}", getattr(self, option))
        tolerations("serve: --tolerations", self.tolerations)

    def api_key(self) -> str:
        """The key: of its file, the environment, or a mounted secret; empty for none. InputError for one that is easily
        guessed."""
        where, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "").strip()
        mounted = Path(KEY_FOLDER, KEY)
        if file := self.api_key_file or (str(mounted) if not key and mounted.exists() else ""):
            where = f"--api-key-file {file}"
            try:
                key = Path(file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"serve: {where}: it cannot be read ({error}); give a file with the key") from error
            if not key:
                raise InputError(f"serve: {where}: it is empty; put the key in it")
        if key and (len(key) < SHORTEST_KEY or not key.isascii() or any(letter.isspace() for letter in key)):
            raise InputError(
                f"serve: {where}: a key has {SHORTEST_KEY} or more ASCII characters and no blank; make one with: "
                "openssl rand -hex 24"
            )
        READ.add(key)
        return key
