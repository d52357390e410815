"""The server as its users see it: through the openai client, by its process, and by its one line when it refuses."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from components.serve.serve import SAMPLES, Serve, serve_and_ask, served
from components.serve.server import free_port
from components.serve.view import GENERATION, check_tokenizer, lay_out
from components.shared.artifact import open_artifact
from components.shared.cli import parse, run_stage
from components.shared.errors import InputError
from components.shared.inference import Sampling, answer, load_model
from components.shared.prompt import wrap
from components.shared.vocabulary import Encoder

QUESTION = [{"role": "user", "content": "你好"}]


@contextmanager
def serving(model: str, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command on a free port: its process, and the address that it printed."""
    command = [sys.executable, "-m", "components.serve", "--model", model, "--port", "0", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            line = program.stdout.readline()
            assert line.startswith("http://"), program.stderr.read() if program.stderr else ""
            yield program, line.split()[0]
        finally:
            program.kill()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> str:
    """The tiny model without its byte pieces: what it says is text (the server's stream ends at stray bytes)."""
    loaded = load_model(tiny_model)
    loaded.model.get_output_embeddings().weight[3:259] = 0.0
    folder = tmp_path_factory.mktemp("model")
    loaded.model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny_model).parent / name, folder)
    return str(folder)


@pytest.fixture(scope="module")
def address(model: str) -> Iterator[str]:
    with serving(model) as (_, found):
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def greedy_answer(model: str) -> str:
    """What the model says when it is asked without a server."""
    loaded = load_model(model)
    (ids,) = answer(loaded, [loaded.prompt_ids(wrap("你好"))], Sampling(do_sample=False, max_new_tokens=12))
    return loaded.encoder.decode(ids)


def test_chat_answers_as_the_model_does(client: openai.OpenAI, greedy_answer: str) -> None:
    made: Any = client.chat.completions.create(model="zhllama", messages=QUESTION, temperature=0, max_tokens=12)
    assert made.choices[0].message.content == greedy_answer


def test_chat_streams_the_same_answer(client: openai.OpenAI, greedy_answer: str) -> None:
    made: Any = client.chat.completions.create(
        model="zhllama", messages=QUESTION, temperature=0, max_tokens=12, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in made]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces).strip() == greedy_answer.strip()


def test_a_question_costs_the_tokens_of_the_training_prompt(client: openai.OpenAI, llama_tokenizer: bytes) -> None:
    made: Any = client.chat.completions.create(model="zhllama", messages=QUESTION, max_tokens=1)
    assert made.usage.prompt_tokens == 1 + len(Encoder(llama_tokenizer).encode(wrap("你好")))


def test_completions_and_models_are_there(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["zhllama"]
    made = client.completions.create(model="zhllama", prompt="从前", max_tokens=4)
    assert made.usage is not None
    assert made.usage.completion_tokens == 4


def test_answers_are_drawn_as_the_recipe_draws_them(client: openai.OpenAI) -> None:
    def drawn(**more: Any) -> str:
        made: Any = client.chat.completions.create(model="zhllama", messages=QUESTION, max_tokens=20, **more)
        return str(made.choices[0].message.content)

    # a temperature in the request counts, which it would not with a model that says nothing of sampling
    assert len({drawn(temperature=2.0, extra_body={"seed": seed}) for seed in range(4)}) > 1
    assert drawn(extra_body={"seed": 1}) == drawn(extra_body={"seed": 1})


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 0)], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_the_server_too(tiny_model: str, sent: signal.Signals, code: int) -> None:
    with serving(tiny_model) as (program, _):
        (server,) = children(program.pid)
        program.send_signal(sent)
        assert program.wait(30) == code
        assert not is_running(server)


def test_a_server_that_dies_is_a_fault(model: str) -> None:
    with served(Serve(model=model, port=0)) as server:
        server._process.kill()
        with pytest.raises(RuntimeError, match="the server ended with -9"):
            server.wait()


def test_asking_publishes_the_answer_and_ends(model: str, tmp_path: Path) -> None:
    manifest = run_stage(Serve(store=str(tmp_path), model=model, port=0, ask="你好"), serve_and_ask)
    assert manifest.kind == "samples"
    (sample,) = json.loads(open_artifact(manifest.reference).read(SAMPLES))
    assert sample["Input"] == "你好"
    assert sample["Output"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_another_address_than_loopback_is_refused(host: str) -> None:
    with pytest.raises(InputError, match="is not a loopback address, and transformers' server cannot check API keys"):
        parse(Serve, ["--model", "m", "--host", host])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_is_taken(host: str) -> None:
    assert parse(Serve, ["--model", "m", "--host", host]).host == host


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--name", "a/b"], "--name is 'a/b'"),
        (["--store", "s"], "give --ask too"),
        (["--ask", "x", "--reference", "r"], "give --store too"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], line: str) -> None:
    with pytest.raises(InputError, match=line):
        parse(Serve, ["--model", "m", *arguments])


def test_a_port_in_use_is_refused_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}: Address already in use; choose another with --port"):
            free_port("127.0.0.1", port)


def test_a_wrong_model_is_refused_by_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "components.serve", "--model", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --model {tmp_path}/none: nothing is there")


@pytest.fixture
def folder(tiny_model: str, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, to be changed."""
    shutil.copytree(Path(tiny_model).parent, tmp_path / "model")
    return tmp_path / "model"


def change_merges(folder: Path) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    value["model"]["merges"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(value))


def drop_bos(folder: Path) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    value["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(value))


def change_template(folder: Path) -> None:
    value = json.loads((folder / "tokenizer_config.json").read_text())
    value["chat_template"] = "{{ bos_token }}{{ messages[0]['content'] }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(value))


def drop_template(folder: Path) -> None:
    value = json.loads((folder / "tokenizer_config.json").read_text())
    del value["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(value))


def drop_fast_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (change_merges, "other ids than tokenizer.model"),
        (drop_bos, "other ids than tokenizer.model"),
        (change_template, "not the training prompt"),
        (drop_template, "no chat template"),
        (drop_fast_tokenizer, "no tokenizer.json"),
    ],
)
def test_a_tokenizer_that_is_not_the_trained_one_is_refused(
    folder: Path, llama_tokenizer: bytes, change: Any, line: str
) -> None:
    check_tokenizer(folder, Encoder(llama_tokenizer), "--model m")
    change(folder)
    with pytest.raises(InputError, match=line):
        check_tokenizer(folder, Encoder(llama_tokenizer), "--model m")


def test_what_the_model_says_of_sampling_wins_over_the_recipe(
    folder: Path, tmp_path: Path, llama_tokenizer: bytes
) -> None:
    (folder / GENERATION).write_text('{"temperature": 0.7}')
    settings = json.loads((lay_out(folder, tmp_path / "view", Encoder(llama_tokenizer)) / GENERATION).read_text())
    assert settings["temperature"] == 0.7
    assert settings["top_k"] == 40


def test_a_killed_command_takes_its_server_with_it(model: str):
    with serving(model) as (program, address):
        program.kill()
        program.wait()
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
            except (urllib.error.URLError, ConnectionError):
                return
    pytest.fail("the server outlived the command that started it")
