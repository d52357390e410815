"""The server on this machine: model checked, engine started, gateway listening, all of it ended together. Before it is
announced the tokenizer that the engine uses is held against SentencePiece: ids in are the ids of training."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from components.serve.check import chat_of, check_gguf, check_tokenizer, check_weights
from components.serve.connections import OnceInAWhile, limited, room
from components.serve.engine_process import EngineProcess
from components.serve.engines import choose, lay_out, llama_cpp_engine, transformers_engine, vllm_engine
from components.serve.gateway import Gateway, is_loopback
from components.serve.options import KEY_VARIABLE, Serve
from components.serve.requests import Limits
from zhllama.artifacts.cache import materialize
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.stage.inputs import Inputs
from zhllama.storage.private import temporary_folder
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.settings import ids_of

SAMPLES = "samples.json"
STOP_SECONDS = 5
BACKLOG = 1_024
"""Connections that wait to be accepted."""
ACCEPTED_AT_ONCE = 16
"""Of them, in one turn of the loop: what is accepted has its descriptor some turns before it is counted, and asyncio,
out of descriptors, accepts nobody for a second."""


def serve(config: Serve) -> None:
    """Serves until it is stopped (Ctrl-C, SIGTERM); RuntimeError when the engine ends by itself."""
    with served(config) as (address, engine):
        try:
            key = f" -H 'Authorization: Bearer '\"${KEY_VARIABLE}\"" if config.api_key() else ""
            page = f"{address}/ is a chat page. " if config.page else ""
            print(
                f'{address}/v1 answers as "{config.name}". {page}Ctrl-C ends it. To ask it:\n'
                f"curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' "
                f'-d \'{{"model": "{config.name}", "messages": [{{"role": "user", "content": "你好"}}]}}\'',
                flush=True,
            )
            engine.wait()
        except KeyboardInterrupt:
            print("stopped", flush=True)


def serve_and_ask(config: Serve, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Starts the server, asks `--ask`, stops it, and publishes question and answer."""
    answer = ask(config, inputs["model"])
    out.add_json(SAMPLES, [{"Input": config.ask, "Output": answer}])
    out.facts["summary"] = f"{len(answer)} characters answered"
    return out.publish("samples")


def ask(config: Serve, artifact: Artifact | None = None) -> str:
    """Starts the server, asks `--ask` through the API, and ends it. artifact: as of `served`."""
    body = {"model": config.name, "messages": [{"role": "user", "content": config.ask}]}
    headers = {"Authorization": f"Bearer {key}"} if (key := config.api_key()) else {}
    with served(config, artifact) as (address, _):
        url = f"{address}/v1/chat/completions"
        answer = httpx2.post(url, json=body, headers=headers, timeout=None, trust_env=False).raise_for_status()
        return str(answer.json()["choices"][0]["message"]["content"])


@contextmanager
def served(config: Serve, artifact: Artifact | None = None) -> Iterator[tuple[str, EngineProcess]]:
    """The address of a server that answers for `--model`, and the engine behind it. artifact: the model, where it is
    open already. InputError where the model is not fit to be served, or the place is not."""
    api_key = config.api_key()
    if not api_key and not is_loopback(config.host):
        raise InputError(
            f"serve: --host {config.host} is not a loopback address, so requests must give an API key; set "
            f"{KEY_VARIABLE} or --api-key-file (openssl rand -hex 24 makes a key)"
        )
    artifact = artifact or open_artifact(config.model, "--model")
    artifact.require_kind("hf-model", "gguf", option="--model")
    file = gguf_file(artifact, config.file)
    chosen = choose(config.engine, gguf=file is not None)
    # before the weights are read: a port that is taken is known at once
    with (
        listening(config.host, config.port) as listener,
        temporary_folder() as temporary,
    ):
        folder = Path(temporary)
        if file is None:
            encoder, positions = check_weights(artifact)
            chat = chat_of(artifact, encoder)
            checkpoint = Checkpoint(artifact)
            if chosen == "transformers":
                checkpoint.refuse_quantised()
            generation = lay_out(checkpoint, folder / config.name, ids_of(checkpoint, encoder))
            if chosen == "vllm":
                engine = vllm_engine(folder, config.name, positions)
            else:
                engine = transformers_engine(folder, config.name, generation)
        else:
            path = materialize(artifact) / file
            where = f"--model {artifact.root}/{file}"
            encoder, positions, chat = check_gguf(path, artifact.manifest.vocabulary, where)
            engine = llama_cpp_engine(path, config.name, positions)
        limits = Limits(config.name, chat, positions, engine.refuses, engine.takes)
        with EngineProcess(engine) as process:
            if file is None:
                # while the engine reads its weights
                check_tokenizer(folder / config.name, encoder, f"--model {artifact.root}", chat)
            process.wait_until_healthy()
            gateway = Gateway(
                limits, engine, "http://engine", lambda: process.alive, api_key, config.host, process.socket
            )
            with running(gateway.app(config.page), listener):
                host, port = listener.getsockname()[:2]
                yield f"http://{f'[{host}]' if ':' in host else host}:{port}", process


def gguf_file(artifact: Artifact, chosen: str) -> str | None:
    """The GGUF file to serve, or None for a Hugging Face folder. InputError where `chosen` is wrong or needed."""
    files = [name for name in artifact.names if name.endswith(".gguf")]
    if chosen:
        if chosen not in artifact:
            raise InputError(f"--model {artifact.root}: no file {chosen}; it has {', '.join(files) or 'no GGUF file'}")
        return chosen
    if "config.json" in artifact:
        return None
    if len(files) > 1:
        raise InputError(
            f"--model {artifact.root}: {len(files)} GGUF files; choose one with --file: {', '.join(files)}"
        )
    return files[0] if files else None


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound; InputError when the port is taken or the address is not this machine's."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(place, family=family, backlog=BACKLOG)
    except OSError as error:
        raise InputError(f"serve: {host}:{port}: {error.strerror or error}; choose another --port or --host") from error
    with listener:
        # what it accepts inherits this. asyncio sets it on sockets that say they are TCP's, which this one does not:
        # without it an answer waits up to 40 ms for the acknowledgement of its head
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listener


@contextmanager
def running(app: Any, listener: socket.socket) -> Iterator[None]:
    """An application that answers on the socket, in a thread of its own, as long as the block runs."""
    import uvicorn

    # the gateway has a line of its own for a request; what is no HTTP is nobody's fault here
    quiet: Any = {"log_level": "error", "access_log": False, "server_header": False}
    held: Any = {"http": limited(room()), "ws": "none", "lifespan": "off", "backlog": ACCEPTED_AT_ONCE}
    server = uvicorn.Server(uvicorn.Config(app, **quiet, **held, timeout_graceful_shutdown=STOP_SECONDS))

    async def answer() -> None:
        asyncio.get_running_loop().set_exception_handler(OnceInAWhile())
        await server.serve([listener])

    thread = threading.Thread(target=asyncio.run, args=(answer(),), daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.02)
        if not thread.is_alive():
            raise RuntimeError("the gateway ended before it listened; its lines are above")
    # asyncio has one number for both
    listener.listen(BACKLOG)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(STOP_SECONDS + 5)
        listener.close()
