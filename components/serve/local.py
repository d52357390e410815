"""The server on this machine: model checked, engine started, gateway listening, all of it ended together."""

import json
import logging
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from components.serve.engine_process import EngineProcess
from components.serve.engines import Engine, choose, llama_cpp_engine, transformers_engine, vllm_engine
from components.serve.gateway import Gateway, is_loopback
from components.serve.options import KEY_VARIABLE, Serve
from components.serve.page import chat_page
from components.serve.requests import Limits
from components.serve.served_folder import check_sizes, check_tokenizer, gguf_file, lay_out, positions_of
from zhllama.artifacts.cache import materialize
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.inference.check import check_model

log = logging.getLogger("serve")

STOP_SECONDS = 5


class Server:
    """A gateway that listens, in a thread of its own, and the engine behind it."""

    def __init__(self, gateway: Gateway, engine: EngineProcess, config: Serve, listener: socket.socket) -> None:
        import uvicorn

        host, port = listener.getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self.engine = engine
        self.gateway = gateway
        self._name = config.name
        self._api_key = config.api_key()
        self._listener = listener
        settings = uvicorn.Config(
            gateway.app(chat_page(gateway) if config.page else None),
            log_level="warning",
            # the gateway has a line of its own for a request
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.02)
            if not self._thread.is_alive():
                raise RuntimeError("the gateway ended before it listened; its lines are above")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(STOP_SECONDS + 5)
        self._listener.close()

    def wait(self) -> NoReturn:
        """Until the engine ends by itself, which is a RuntimeError."""
        self.engine.wait()

    def ask(self, text: str) -> str:
        """The answer to one question, through the API."""
        body = {"model": self._name, "messages": [{"role": "user", "content": text}]}
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(f"{self.address}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])


def serve(config: Serve) -> None:
    """Serves until it is stopped (Ctrl-C, SIGTERM); RuntimeError when the engine ends by itself."""
    with served(config) as server:
        try:
            key = f" -H 'Authorization: Bearer '\"${KEY_VARIABLE}\"" if server.gateway.needs_key else ""
            page = f"{server.address}/ is a chat page. " if config.page else ""
            print(
                f'{server.address}/v1 answers as "{config.name}". {page}Ctrl-C ends it. To ask it:\n'
                f"curl {server.address}/v1/chat/completions{key} -H 'Content-Type: application/json' "
                f'-d \'{{"model": "{config.name}", "messages": [{{"role": "user", "content": "你好"}}]}}\'',
                flush=True,
            )
            server.wait()
        except KeyboardInterrupt:
            print("stopped", flush=True)


def ask(config: Serve, artifact: Artifact | None = None) -> str:
    """Starts the server, asks `--ask`, and ends it. artifact: what is behind `--model`, where it is open already."""
    with served(config, artifact) as server:
        return server.ask(config.ask)


@contextmanager
def served(config: Serve, artifact: Artifact | None = None) -> Iterator[Server]:
    """A server that answers for `--model`. InputError where the model is not fit to be served, or the place is not."""
    api_key = config.api_key()
    if not api_key and not is_loopback(config.host):
        raise InputError(
            f"serve: --host {config.host} is not a loopback address, so requests must give an API key; set "
            f"{KEY_VARIABLE} or --api-key-file (openssl rand -hex 24 makes a key)"
        )
    artifact = artifact or open_artifact(config.model, "--model")
    artifact.require_kind("hf-model", "gguf", option="--model")
    file = gguf_file(artifact, config.file)
    name = choose(config.engine, gguf=file is not None)
    # before the weights are read: a port that is taken is known at once
    with (
        listening(config.host, config.port) as listener,
        tempfile.TemporaryDirectory(prefix="zhllama-serve-") as folder,
    ):
        make = _from_folder if file is None else _from_gguf
        limits, engine, where = make(config, artifact, Path(folder), file or name)
        with EngineProcess(engine) as process:
            if file is None:
                # while the engine reads its weights
                check_tokenizer(Path(folder) / config.name, limits.encoder, where)
            process.wait_until_healthy()
            gateway = Gateway(limits, engine, process.address, lambda: process.alive, api_key, config.host)
            with Server(gateway, process, config, listener) as server:
                yield server


def _from_folder(config: Serve, artifact: Artifact, folder: Path, engine: str) -> tuple[Limits, Engine, str]:
    check_sizes(artifact, f"--model {artifact.root}")
    encoder, _ = check_model(artifact, "--model")
    positions = positions_of(artifact)
    lay_out(materialize(artifact), folder / config.name, encoder)
    made = vllm_engine(folder, config.name, positions) if engine == "vllm" else transformers_engine(folder, config.name)
    return Limits(config.name, encoder, positions, made.refuses), made, f"--model {artifact.root}"


def _from_gguf(config: Serve, artifact: Artifact, folder: Path, file: str) -> tuple[Limits, Engine, str]:
    from components.serve.gguf_vocabulary import checked_vocabulary

    path = materialize(artifact) / file
    encoder, positions = checked_vocabulary(path, artifact.manifest.vocabulary, f"--model {artifact.root}/{file}")
    made = llama_cpp_engine(path, config.name, positions)
    return Limits(config.name, encoder, positions, made.refuses), made, f"--model {path}"


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound; InputError when the port is taken or the address is not this machine's."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(place, family=family, backlog=256)
    except OSError as error:
        raise InputError(f"serve: {host}:{port}: {error.strerror or error}; choose another --port or --host") from error
    with listener:
        # what it accepts inherits this. asyncio sets it on sockets that say they are TCP's, which this one does not:
        # without it an answer waits up to 40 ms for the acknowledgement of its head
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listener
