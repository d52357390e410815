"""Which engine serves a model, how it is started, and what it needs to be told in a request.

transformers' server for a Hugging Face folder, llama.cpp's (llama-cpp-python) for a GGUF file, vLLM's where it is
installed and a GPU is there. Each is somebody else's program behind the same gateway; what differs is in this module.
"""

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.serve.answer_format import in_llama_cpps_words, in_vllms_words
from components.serve.fields import OF_LLAMA_CPP, OF_VLLM, Schema
from components.serve.options import EngineName
from zhllama.artifacts.cache import materialize
from zhllama.errors import InputError
from zhllama.inference.sampling import Sampling
from zhllama.kubernetes.model_server import vllm_sampling
from zhllama.tokenizer.effective_model import DESCRIBED
from zhllama.tokenizer.special_ids import SpecialIds
from zhllama.weights import model_folder
from zhllama.weights.chat_template import is_template
from zhllama.weights.model_config import CONFIG, GENERATION
from zhllama.weights.safetensors_io import Checkpoint

_PYTHON = (sys.executable, "-P", "-m")
"""Without the folder that it is started in: a model's may hold files that are named as modules are."""


@dataclass(frozen=True)
class Engine:
    """One engine on one model. `command` with `--uds` and the path of a socket is what starts it, in `folder`."""

    name: str
    folder: Path
    command: Sequence[str]
    health: str
    """The path that answers 200 once the model is loaded, and while it works."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a request gets that does not say: the recipe's sampling, where the engine has it not from the model."""
    metrics: str = ""
    """The path of the engine's own Prometheus metrics, if it has any."""
    refuses: tuple[str, ...] = ()
    """Request fields that it cannot honour."""
    takes: Mapping[str, Schema] = field(default_factory=dict)
    """Request fields that it alone has."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What it calls a field, where that is another name."""
    keeps_stop: bool = False
    """Whether an answer holds the text that was to stop it."""
    form: Callable[[dict[str, Any]], None] | None = None
    """Puts what form the answer shall have into its words."""
    generation: Mapping[str, Any] | None = None
    """The model's generation settings, where the engine takes some fields in a JSON text of all settings alone."""

    def request(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A request in its own words."""
        made = {self.names.get(name, name): value for name, value in {**self.defaults, **body}.items()}
        if self.form is not None:
            self.form(made)
        if self.generation is not None:
            own = {name: made.pop(name) for name in _OF_TRANSFORMERS if name in made}
            if "sequence_bias" in own:
                own["sequence_bias"] = [[[int(index)], float(bias)] for index, bias in own["sequence_bias"].items()]
            if own:
                made["generation_config"] = json.dumps({**self.generation, **own})
        return made


_OF_TRANSFORMERS = ("top_k", "min_p", "repetition_penalty", "min_new_tokens", "sequence_bias")


def transformers_engine(folder: Path, name: str, generation: Mapping[str, Any]) -> Engine:
    """transformers' server on `folder/name` with these generation settings, as `lay_out` made both."""
    command = [*_PYTHON, "components.serve.transformers_server", name]
    if not _has_gpu():
        command += ["--device", "cpu", "--dtype", "float32"]
    # it takes frequency_penalty for a repetition penalty, and says nothing of the others
    refuses = (
        "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty", "response_format", "best_of", "echo",
        "suffix",
    )  # fmt: skip
    names = {"min_tokens": "min_new_tokens", "logit_bias": "sequence_bias"}
    return Engine(
        "transformers", folder, command, "/health", refuses=refuses, names=names, keeps_stop=True, generation=generation
    )


def llama_cpp_engine(file: Path, name: str, positions: int) -> Engine:
    """llama.cpp's server on a GGUF file."""
    # verbose, it says three hundred lines of tensors and graphs before it serves; a fault it says all the same
    # and it would end a stream, as if the answer were whole, when the next request comes
    options = {"model": file, "model_alias": name, "n_ctx": positions, "verbose": False, "interrupt_requests": False}
    command = [*_PYTHON, "components.serve.llama_cpp_server"]
    command += [f"--{option}={value}" for option, value in options.items()]
    # its logits are kept for the last token alone, and a LLaMA has no pieces for what is to be filled in
    refuses = ("logprobs", "top_logprobs", "suffix")
    # its own min_p is 0.05
    defaults, names = {**_recipe(), "min_p": 0.0}, {"repetition_penalty": "repeat_penalty"}
    # /v1/models waits for the request before it
    return Engine(
        "llama.cpp", file.parent, command, "/docs", defaults, refuses=refuses, names=names, takes=OF_LLAMA_CPP,
        form=in_llama_cpps_words,
    )  # fmt: skip


def vllm_engine(folder: Path, name: str, positions: int) -> Engine:
    """vLLM's server on `folder/name`, in the Python that vLLM is installed in."""
    command = [vllm_program() or "vllm", "serve", str(folder / name), "--served-model-name", name]
    command += ["--max-model-len", str(positions), *vllm_sampling()]
    return Engine("vllm", folder, command, "/health", metrics="/metrics", takes=OF_VLLM, form=in_vllms_words)


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
    if gguf and not all(map(importlib.util.find_spec, ("llama_cpp", "pydantic_settings"))):
        raise InputError("serve: a GGUF file is served by llama.cpp; pip install 'llama-cpp-python[server]'")
    if wanted == "vllm" and not vllm_program():
        raise InputError("serve: vLLM is not installed here; leave out --engine, or run it in vLLM's own image")
    return wanted


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _recipe() -> dict[str, Any]:
    return {name: getattr(Sampling(), name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}


def lay_out(checkpoint: Checkpoint, target: Path, ids: SpecialIds) -> dict[str, Any]:
    """A model's folder for an engine, with generation settings of our own, which it returns. A published model says
    nothing of sampling, and the server takes what a request does not say from the model's generation_config.json: left
    as it is, it would decode greedily and ignore a request's temperature."""
    target.mkdir()
    model_folder.lay_out(checkpoint, target)
    artifact = checkpoint.artifact
    source = materialize(artifact).absolute()
    for name in artifact.names:
        if name in {"tokenizer.model", *DESCRIBED} - {CONFIG} or is_template(name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).symlink_to((source / name).resolve())
    said = checkpoint.settings(GENERATION) if GENERATION in artifact else {}
    settings = {"pad_token_id": ids.eos, **ids.generation({"do_sample": True, **_recipe(), **said})}
    (target / GENERATION).write_text(json.dumps(settings, indent=1) + "\n")
    return settings
