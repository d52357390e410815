"""The served model: checked, started, announced, and stopped with whoever started it.

The server is transformers' own (`transformers serve`), as a child process on the artifact's folder; with a tiny model
it answers 5 s after the command. It cannot check API keys, so it listens on loopback only. Before it is announced the
tokenizer that it uses is held against SentencePiece: ids in are the ids of training.
"""

import ipaddress
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.shared.artifact import ArtifactWriter, Manifest, open_artifact
from components.shared.cli import Ref, StageOptions, not_keyed, parse, run_stage
from components.shared.errors import InputError

if TYPE_CHECKING:
    from components.serve.server import Server

SAMPLES = "samples.json"
PACKAGES = ("torch", "transformers", "sentencepiece")


@dataclass(frozen=True, kw_only=True)
class Serve(StageOptions):
    """Serve a model on this machine behind an OpenAI-compatible API. Ctrl-C ends it."""

    store: str = ""
    """With --ask: where the answer is put, a folder or an s3:// prefix. Without it the answer is only printed."""
    model: Ref
    """Reference to the model."""
    host: not_keyed(str) = "127.0.0.1"  # type: ignore[valid-type]
    """A loopback address: the server cannot check API keys."""
    port: not_keyed(int) = 8000  # type: ignore[valid-type]
    """The port; 0 takes a free one."""
    name: str = "zhllama"
    """What requests call the model."""
    ask: str = ""
    """Ask this through the API, print the answer, and end: a check that the model serves."""

    def __post_init__(self) -> None:
        if not _is_loopback(self.host):
            raise InputError(
                f"serve: --host {self.host} is not a loopback address, and transformers' server cannot check API keys; "
                "leave out --host, and put a proxy that checks keys, or an ssh tunnel, in front"
            )
        if not 0 <= self.port <= 65535:
            raise InputError(f"serve: --port is {self.port}; it must be between 0 (a free one) and 65535")
        if not self.name or not all(letter.isascii() and (letter.isalnum() or letter in "-_") for letter in self.name):
            raise InputError(f"serve: --name is {self.name!r}; use letters, digits, - and _")
        for option, needed in (("output", "store"), ("reference", "store"), ("store", "ask")):
            if getattr(self, option) and not getattr(self, needed):
                raise InputError(f"serve: --{option} is for the answer to a question; give --{needed} too")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run() -> None:
    """The command: serve until stopped, or ask one question for the store or for the screen."""
    config = parse(Serve, sys.argv[1:])
    if config.store:
        run_stage(config, serve_and_ask, PACKAGES)
    elif config.ask:
        print(_ask(config))
    else:
        _serve(config)


def serve_and_ask(config: Serve, out: ArtifactWriter) -> Manifest:
    """Starts the server, asks `--ask`, stops it, and publishes question and answer."""
    answer = _ask(config)
    out.add_json(SAMPLES, [{"Input": config.ask, "Output": answer}])
    out.facts["summary"] = f"{len(answer)} characters answered"
    return out.publish("samples")


def _ask(config: Serve) -> str:
    with served(config) as server:
        return server.ask(config.ask)


def _serve(config: Serve) -> None:
    with served(config) as server:
        try:
            print(
                f'{server.address}/v1 answers as "{config.name}". Ctrl-C ends it. To ask it:\n'
                f"curl {server.address}/v1/chat/completions -H 'Content-Type: application/json' "
                f'-d \'{{"model": "{config.name}", "messages": [{{"role": "user", "content": "你好"}}]}}\'',
                flush=True,
            )
            server.wait()
        except KeyboardInterrupt:
            print("stopped", flush=True)


@contextmanager
def served(config: Serve) -> "Iterator[Server]":
    """A server that answers for `--model`. InputError where the model is not fit to be served."""
    from components.serve.server import Server
    from components.serve.view import check_tokenizer, lay_out
    from components.shared.inference import check_model

    artifact = open_artifact(config.model, "--model").expect("hf-model", option="--model")
    encoder, _ = check_model(artifact, "--model")
    with tempfile.TemporaryDirectory(prefix="zhllama-serve-") as folder:
        laid_out = lay_out(artifact.local(), Path(folder) / config.name, encoder)
        with Server(Path(folder), config.name, config.host, config.port) as server:
            # while the server reads its weights
            check_tokenizer(laid_out, encoder, f"--model {artifact.root}")
            server.wait_until_healthy()
            yield server
