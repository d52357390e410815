"""Which engine serves a model, how it is started, and what it needs to be told in a request.

transformers' server for a Hugging Face folder, llama.cpp's (llama-cpp-python) for a GGUF file, vLLM's where it is
installed and a GPU is there. Each is somebody else's program behind the same gateway; what differs is in this module:
the command, the path that says it is ready, the names of the sampling settings, and the request fields that it refuses.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.serve.options import EngineName
from zhllama.errors import InputError
from zhllama.inference.sampling import Sampling
from zhllama.kubernetes.model_server import vllm_sampling

HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options")
"""Fields of OpenAI's clients that change nothing in an answer; not every engine takes them, so none is passed on."""


@dataclass(frozen=True)
class Engine:
    """One engine on one model. `command(host, port)` is what starts it, in `folder`."""

    name: str
    folder: Path
    command: Callable[[str, int], list[str]]
    health: str
    """The path that answers 200 once the model is loaded."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a request gets that does not say: the recipe's sampling, where the engine has it not from the model."""
    metrics: str = ""
    """The path of the engine's own Prometheus metrics, if it has any."""
    refuses: tuple[str, ...] = ()
    """Request fields that it cannot honour."""

    def request(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A checked request (requests.py) as this engine takes it."""
        return {**self.defaults, **{name: value for name, value in body.items() if name not in HARMLESS}}


def transformers_engine(folder: Path, name: str) -> Engine:
    """transformers' server on `folder/name`; generation_config.json holds the recipe's sampling (served_folder.py)."""

    def command(host: str, port: int) -> list[str]:
        import torch

        words = [sys.executable, "-m", "components.serve.transformers_server", name]
        words += ["--host", host, "--port", str(port)]
        return words if torch.cuda.is_available() else [*words, "--device", "cpu", "--dtype", "float32"]

    refuses = ("logprobs", "top_logprobs", "presence_penalty", "logit_bias", "response_format", "best_of", "echo")
    return Engine("transformers", folder, command, "/health", refuses=refuses)


def llama_cpp_engine(file: Path, name: str, positions: int) -> Engine:
    """llama.cpp's server on a GGUF file."""

    def command(host: str, port: int) -> list[str]:
        # verbose, it says three hundred lines of tensors and graphs before it serves; a fault it says all the same
        options = {"model": file, "model_alias": name, "host": host, "port": port, "n_ctx": positions, "verbose": False}
        words = [f"--{option}={value}" for option, value in options.items()]
        return [sys.executable, "-m", "llama_cpp.server", *words]

    recipe = Sampling()
    defaults = {
        "temperature": recipe.temperature,
        "top_k": recipe.top_k,
        "top_p": recipe.top_p,
        "repeat_penalty": recipe.repetition_penalty,
    }
    return Engine("llama.cpp", file.parent, command, "/v1/models", defaults)


def vllm_engine(folder: Path, name: str, positions: int) -> Engine:
    """vLLM's server on `folder/name`, in the Python that vLLM is installed in."""

    def command(host: str, port: int) -> list[str]:
        words = [vllm_program() or "vllm", "serve", str(folder / name)]
        words += ["--served-model-name", name, "--host", host, "--port", str(port), "--max-model-len", str(positions)]
        return [*words, *vllm_sampling()]

    return Engine("vllm", folder, command, "/health", metrics="/metrics")


def vllm_program() -> str | None:
    """vLLM's program: of this Python's environment, or on the path. In an image on vLLM's own it belongs to another
    Python, whose packages are those that vLLM wants; ours are newer or older and must not get in its way."""
    return shutil.which("vllm", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def choose(wanted: EngineName, gguf: bool) -> str:
    """The engine for a model of this form. InputError when it is not installed, or does not read that form."""
    if wanted == "auto":
        wanted = "llama.cpp" if gguf else "vllm" if vllm_program() and _has_gpu() else "transformers"
    if gguf != (wanted == "llama.cpp"):
        form = "a GGUF file, which llama.cpp serves" if gguf else "a Hugging Face folder, which llama.cpp cannot read"
        raise InputError(f"serve: --engine {wanted}: the model is {form}; leave out --engine")
    if wanted == "llama.cpp" and not (_installed("llama_cpp") and _installed("pydantic_settings")):
        raise InputError("serve: a GGUF file is served by llama.cpp; pip install 'llama-cpp-python[server]'")
    if wanted == "vllm" and not vllm_program():
        raise InputError("serve: vLLM is not installed here; leave out --engine, or run it in vLLM's own image")
    return wanted


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
