"""Which engine serves a model, how it is started, and what it needs to be told in a request.

transformers' server for a Hugging Face folder, llama.cpp's (llama-cpp-python) for a GGUF file, vLLM's where it is
installed and a GPU is there. Each is somebody else's program behind the same gateway; what differs is in this module.
"""

import collections
import importlib.util
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Self

import httpx2

from components.serve.options import EngineName
from zhllama.artifacts.json_file import object_of
from zhllama.errors import InputError
from zhllama.inference.sampling import Sampling
from zhllama.kubernetes.model_server import vllm_sampling
from zhllama.retries import with_retries
from zhllama.stage.child_processes import die_with_parent
from zhllama.tokenizer.special_ids import SpecialIds
from zhllama.weights.settings import GENERATION

log = logging.getLogger("engine")

START_SECONDS = 900.0
"""For reading a large model from a slow disk."""
STOP_SECONDS = 10.0
LOOPBACK = "127.0.0.1"
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@dataclass(frozen=True)
class Engine:
    """One engine on one model. `command` with `--host` and `--port` is what starts it, in `folder`."""

    name: str
    folder: Path
    command: Sequence[str]
    health: str
    """The path that answers 200 once the model is loaded."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a request gets that does not say: the recipe's sampling, where the engine has it not from the model."""
    metrics: str = ""
    """The path of the engine's own Prometheus metrics, if it has any."""
    refuses: tuple[str, ...] = ()
    """Request fields that it cannot honour."""
    takes: tuple[str, ...] = ()
    """Request fields that it alone has."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What it calls a field, where that is another name."""
    keeps_stop: bool = False
    """Whether an answer holds the text that was to stop it."""
    generation: Mapping[str, Any] | None = None
    """The model's generation settings, where the engine takes some fields in a JSON text of all settings alone."""

    def request(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A request in its own words."""
        made = {self.names.get(name, name): value for name, value in {**self.defaults, **body}.items()}
        if self.generation is not None:
            own = {name: made.pop(name) for name in _OF_TRANSFORMERS if name in made}
            if "sequence_bias" in own:
                own["sequence_bias"] = [[[int(index)], float(bias)] for index, bias in own["sequence_bias"].items()]
            if own:
                made["generation_config"] = json.dumps({**self.generation, **own})
        return made


_OF_TRANSFORMERS = ("top_k", "min_p", "repetition_penalty", "min_new_tokens", "sequence_bias")
_OF_LLAMA_CPP = ("mirostat_mode", "mirostat_tau", "mirostat_eta", "grammar", "logit_bias_type")
_OF_VLLM = (
    "stop_token_ids", "ignore_eos", "bad_words", "allowed_token_ids", "length_penalty", "use_beam_search",
    "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens",
    "prompt_logprobs", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "chat_template_kwargs", "return_token_ids", "priority",
)  # fmt: skip


def transformers_engine(folder: Path, name: str, generation: Mapping[str, Any]) -> Engine:
    """transformers' server on `folder/name` with these generation settings, as `lay_out` made both."""
    command = [sys.executable, "-m", "components.serve.transformers_server", name]
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
    options = {"model": file, "model_alias": name, "n_ctx": positions, "verbose": False}
    command = [sys.executable, "-m", "llama_cpp.server", *(f"--{option}={value}" for option, value in options.items())]
    # its own min_p is 0.05
    defaults, names = {**_recipe(), "min_p": 0.0}, {"repetition_penalty": "repeat_penalty"}
    return Engine("llama.cpp", file.parent, command, "/v1/models", defaults, names=names, takes=_OF_LLAMA_CPP)


def vllm_engine(folder: Path, name: str, positions: int) -> Engine:
    """vLLM's server on `folder/name`, in the Python that vLLM is installed in."""
    command = [vllm_program() or "vllm", "serve", str(folder / name), "--served-model-name", name]
    command += ["--max-model-len", str(positions), *vllm_sampling()]
    return Engine("vllm", folder, command, "/health", metrics="/metrics", takes=_OF_VLLM)


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


def lay_out(source: Path, target: Path, ids: SpecialIds) -> dict[str, Any]:
    """Links the files of a model folder into `target`, with generation settings of our own, which it returns. A
    published model says nothing of sampling, and the server takes what a request does not say from the model's
    generation_config.json: left as it is, it would decode greedily and ignore a request's temperature."""
    target.mkdir()
    for file in source.iterdir():
        if file.name != GENERATION:
            (target / file.name).symlink_to(file.resolve())
    given = source / GENERATION
    try:
        said = object_of(given.read_bytes()) if given.exists() else {}
    except ValueError as error:
        raise InputError(f"{given}: no JSON object ({error}); publish the model again") from error
    settings = {"pad_token_id": ids.eos, **ids.generation({"do_sample": True, **_recipe(), **said})}
    (target / GENERATION).write_text(json.dumps(settings, indent=1) + "\n")
    return settings


class EngineProcess:
    """An engine as a child process on loopback: `with EngineProcess(engine) as process: process.wait_until_healthy()`.

    It stays in our process group, so that what ends the group (Ctrl-C, a runner) ends it too; a signal to us alone is
    passed on when the `with` block is left, and the kernel ends it when we are killed. Its output becomes our log.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last: collections.deque[str] = collections.deque(maxlen=5)
        self.address = ""
        """`http://127.0.0.1:43210`."""

    def __enter__(self) -> Self:
        with socket.create_server((LOOPBACK, 0)) as probe:
            port = probe.getsockname()[1]
        self.address = f"http://{LOOPBACK}:{port}"
        self._process = subprocess.Popen(
            [*self._engine.command, "--host", LOOPBACK, "--port", str(port)],
            cwd=self._engine.folder,
            # passive: idle threads leave the cores to others (zhllama/inference/load.py)
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **QUIET, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").strip()
            # what is asked is the gateway's to record
            if line and '" 200' not in line and "[Request received]" not in line:
                self._last.append(line)
                log.info("%s", line)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_healthy(self) -> None:
        """RuntimeError when the engine ends before it answers, or does not within a quarter of an hour."""
        try:
            with httpx2.Client(base_url=self.address, timeout=5, trust_env=False) as client:
                with_retries(
                    lambda: client.get(self._engine.health).raise_for_status(),
                    lambda error: isinstance(error, httpx2.HTTPError),
                    seconds=START_SECONDS, first=0.1, longest=0.1, goes_on=lambda: self.alive,
                )  # fmt: skip
        except httpx2.HTTPError:
            if not self.alive:
                self._ended()
            raise RuntimeError(f"the engine did not answer within {START_SECONDS:.0f} s") from None

    def wait(self) -> NoReturn:
        """Until the engine ends by itself, which is a RuntimeError."""
        self._process.wait()
        self._ended()

    def _ended(self) -> NoReturn:
        self._reader.join(STOP_SECONDS)
        said = " | ".join(self._last) or "it said nothing"
        raise RuntimeError(f"the engine ({self._engine.name}) ended with {self._process.returncode}: {said}")

    def __exit__(self, *_: object) -> None:
        """SIGTERM, and SIGKILL when it does not go within ten seconds."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._process.kill()
        self._process.wait()
        self._reader.join(STOP_SECONDS)
