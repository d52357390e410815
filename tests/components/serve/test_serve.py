"""The server as its users see it: through the openai client, by its process, and by its one line when it refuses."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from components.serve import options as serve_options
from components.serve.check import chat_of, check_tokenizer
from components.serve.engines import lay_out
from components.serve.local import SAMPLES, listening, serve_and_ask, served
from components.serve.options import Serve
from components.serve.requests import ApiError, Limits, tokenized
from components.serve.requests import chat as chat_request
from tests.loaded_model import load_model
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.inference.generate import answer
from zhllama.inference.sampling import Sampling
from zhllama.secret_text import mask
from zhllama.stage.command_line import parse
from zhllama.stage.inputs import Inputs
from zhllama.stage.run import run_stage
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.prompt import RECIPE
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import parse_model
from zhllama.tokenizer.special_ids import special_ids
from zhllama.weights.safetensors_io import Checkpoint
from zhllama.weights.settings import GENERATION

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
            yield program, line.split()[0].removesuffix("/v1")
        finally:
            program.kill()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> str:
    """The tiny model without its byte pieces: what it says is text."""
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
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def greedy_answer(model: str) -> str:
    """What the model says when it is asked without a server."""
    loaded = load_model(model)
    (ids,) = answer(loaded, [loaded.prompt_ids(RECIPE.wrap("你好"))], Sampling(do_sample=False, max_new_tokens=12))
    return loaded.encoder.decode(ids)


@pytest.mark.slow
def test_chat_answers_as_the_model_does(client: openai.OpenAI, greedy_answer: str) -> None:
    made: Any = client.chat.completions.create(model="zhllama", messages=QUESTION, temperature=0, max_tokens=12)
    assert made.choices[0].message.content == greedy_answer


@pytest.mark.slow
def test_chat_streams_the_same_answer(client: openai.OpenAI, greedy_answer: str) -> None:
    made: Any = client.chat.completions.create(
        model="zhllama", messages=QUESTION, temperature=0, max_tokens=12, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in made]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces).strip() == greedy_answer.strip()


@pytest.mark.slow
def test_a_question_costs_the_tokens_of_the_training_prompt(client: openai.OpenAI, llama_tokenizer: bytes) -> None:
    made: Any = client.chat.completions.create(model="zhllama", messages=QUESTION, max_tokens=1)
    assert made.usage.prompt_tokens == 1 + len(SentencePieceEncoder(llama_tokenizer).encode(RECIPE.wrap("你好")))


@pytest.mark.slow
def test_bytes_that_are_no_text_do_not_end_a_stream(tiny_model: str) -> None:
    with serving(tiny_model) as (_, address), openai.OpenAI(base_url=f"{address}/v1", api_key="none") as asked:
        for seed in range(3):
            given: Any = {"model": "zhllama", "messages": QUESTION, "max_tokens": 60, "temperature": 2}
            made: Any = asked.chat.completions.create(**given, extra_body={"seed": seed}, stream=True)
            *pieces, last = list(made)
            said = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
            assert "\ufffd" in said  # the untrained model does say such bytes
            assert last.choices[0].finish_reason == "length"
            whole: Any = asked.chat.completions.create(**given, extra_body={"seed": seed})
            # at the end half a character may be held back, and what was said before stray bytes stays said
            assert len(said) >= len(whole.choices[0].message.content.rstrip("\ufffd")) - 8


@pytest.mark.slow
def test_the_served_prompt_is_that_of_transformers_and_of_vllm(model: str, address: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    spoken = [
        {"role": "system", "content": "简短回答。"},
        {"role": "user", "content": "你好, what is  this?\n第二行"},
        {"role": "assistant", "content": "这是 a test。"},
        {"role": "user", "content": "再见🀄"},
    ]
    for messages in (spoken[1:2], spoken[:2], spoken):
        body = json.dumps({"model": "zhllama", "messages": messages}).encode()
        request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as given:
            ours = json.load(given)["tokens"]
        assert ours == list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
        # as vLLM does: the template's text first, then encoded without a BOS of the tokenizer's own
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.slow
def test_completions_and_models_are_there(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["zhllama"]
    made = client.completions.create(model="zhllama", prompt="从前", max_tokens=4)
    assert made.usage is not None
    assert made.usage.completion_tokens == 4


@pytest.mark.slow
def test_what_is_wrong_is_refused_and_the_server_lives_on(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context is 2048 tokens") as refused:
        client.chat.completions.create(model="zhllama", messages=[{"role": "user", "content": "长" * 3000}])
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    broken = httpx2.post(
        f"{client.base_url}chat/completions", content=b"{", headers={"Content-Type": "application/json"}
    )
    assert (broken.status_code, broken.json()["error"]["type"]) == (400, "invalid_request_error")
    made: Any = client.chat.completions.create(model="zhllama", messages=QUESTION, max_tokens=2)
    assert made.choices[0].finish_reason == "length"


@pytest.mark.slow
def test_metrics_and_health_are_in_front(client: openai.OpenAI, address: str) -> None:
    client.completions.create(model="zhllama", prompt="从前", max_tokens=4)
    assert httpx2.get(f"{address}/health").json() == {"status": "ok"}
    assert 'zhllama_requests_total{path="/v1/completions",status="200"}' in httpx2.get(f"{address}/metrics").text


@pytest.mark.slow
def test_answers_are_drawn_as_the_recipe_draws_them(client: openai.OpenAI) -> None:
    def drawn(**more: Any) -> str:
        made: Any = client.chat.completions.create(model="zhllama", messages=QUESTION, max_tokens=20, **more)
        return str(made.choices[0].message.content)

    # a temperature in the request counts, which it would not with a model that says nothing of sampling
    assert len({drawn(temperature=2.0, extra_body={"seed": seed}) for seed in range(4)}) > 1
    assert drawn(extra_body={"seed": 1}) == drawn(extra_body={"seed": 1})


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 0)], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_the_server_too(tiny_model: str, sent: signal.Signals, code: int) -> None:
    with serving(tiny_model) as (program, _):
        (server,) = children(program.pid)
        program.send_signal(sent)
        assert program.wait(120) == code
        assert not is_running(server)


@pytest.mark.slow
def test_an_engine_that_dies_is_started_again(model: str) -> None:
    with (
        served(Serve(model=model, port=0)) as (address, process),
        httpx2.Client(base_url=address, timeout=60) as client,
    ):
        process._process.kill()
        body = {"model": "zhllama", "messages": QUESTION, "max_tokens": 2}
        until = time.monotonic() + 120
        statuses = []
        while 200 not in statuses:
            assert time.monotonic() < until
            statuses.append(client.post("/v1/chat/completions", json=body).status_code)
            time.sleep(0.1)
        assert set(statuses) <= {200, 502, 503}
        assert client.get("/health").status_code == 200


@pytest.mark.slow
def test_nobody_reaches_an_engine_but_its_gateway(model: str) -> None:
    with served(Serve(model=model, port=0)) as (address, process):
        port = int(address.rpartition(":")[2])
        assert stat.S_IMODE(Path(process.socket).parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(Path(process.socket).stat().st_mode) == 0o600
        listening_here = [
            int(line.split()[1].rpartition(":")[2], 16)
            for pid in (os.getpid(), process._process.pid)
            for line in listening_lines(pid)
        ]
        assert listening_here == [port]


def listening_lines(pid: int) -> list[str]:
    """Lines of /proc/net/tcp and tcp6 of sockets that a process listens on."""
    held = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            held.add(os.readlink(link))
    lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text("utf-8").splitlines()[1:]]
    return [line for line in lines if line.split()[3] == "0A" and f"socket:[{line.split()[9]}]" in held]


@pytest.mark.slow
def test_asking_publishes_the_answer_and_ends(model: str, tmp_path: Path) -> None:
    manifest = run_stage(Serve(store=str(tmp_path), model=model, port=0, ask="你好"), serve_and_ask)
    assert manifest.kind == "samples"
    (sample,) = json.loads(open_artifact(manifest.reference).read(SAMPLES))
    assert sample["Input"] == "你好"
    assert sample["Output"]


def test_what_is_asked_is_the_model_that_was_opened_and_not_what_stands_there_now(tmp_path: Path) -> None:
    made = ArtifactWriter(str(tmp_path / "models"), "finetune", "key")
    made.add_json("adapter_config.json", {})
    config = Serve(store=str(tmp_path), model=made.publish("adapter").reference, port=0, ask="你好")
    inputs = Inputs(config)
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(InputError, match="adapter"):
        serve_and_ask(config, inputs, ArtifactWriter(str(tmp_path), "serve", "key"))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_another_address_than_loopback_needs_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZHLLAMA_API_KEY", raising=False)
    with (
        pytest.raises(InputError, match="is not a loopback address, so requests must give an API key"),
        served(parse(Serve, ["--model", "m", "--host", host])),
    ):
        pass


@pytest.mark.slow
def test_on_every_address_the_key_is_asked_for_and_never_logged(model: str, tmp_path: Path) -> None:
    key = "5f3c9d0a-key-of-a-test"
    (tmp_path / "key").write_text(f"{key}\n")
    command = [sys.executable, "-m", "components.serve", "--model", model, "--port", "0", "--host", "0.0.0.0"]
    command += ["--api-key-file", str(tmp_path / "key")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        line = program.stdout.readline()
        address = line.split()[0].replace("0.0.0.0", "127.0.0.1")
        given: Any = {"base_url": address, "max_retries": 0}
        with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
            openai.OpenAI(api_key="wrong", **given).models.list()
        assert [one.id for one in openai.OpenAI(api_key=key, **given).models.list()] == ["zhllama"]
        program.terminate()
        said = line + "".join(program.communicate(timeout=60))
    assert key not in said


@pytest.mark.parametrize(
    ("content", "line"), [("", "it is empty"), ("short", "16 or more ASCII"), ("a key with blanks in it", "no blank")]
)
def test_a_key_that_is_none_is_refused(tmp_path: Path, content: str, line: str) -> None:
    (tmp_path / "key").write_text(content)
    with pytest.raises(InputError, match=line):
        parse(Serve, ["--model", "m", "--api-key-file", str(tmp_path / "key")]).api_key()


def test_a_mounted_key_is_taken_where_no_option_and_no_variable_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the step has it that deploys; the log does not show it."""
    monkeypatch.setattr(serve_options, "KEY_FOLDER", str(tmp_path))
    monkeypatch.delenv("ZHLLAMA_API_KEY", raising=False)
    config = parse(Serve, ["--model", "m"])
    assert config.api_key() == ""
    (tmp_path / "API_KEY").write_text("the-mounted-key-of-the-server\n")
    assert config.api_key() == "the-mounted-key-of-the-server"
    assert mask("refused: the-mounted-key-of-the-server") == "refused: ***"
    monkeypatch.setenv("ZHLLAMA_API_KEY", "the-key-of-a-variable")
    assert config.api_key() == "the-key-of-a-variable"
    (tmp_path / "mine").write_text("the-key-of-an-option")
    assert parse(Serve, ["--model", "m", "--api-key-file", str(tmp_path / "mine")]).api_key() == "the-key-of-an-option"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--name", "a/b"], "--name is 'a/b'"),
        (["--store", "s"], "give --ask too"),
        (["--ask", "x", "--reference", "r"], "give --store too"),
        (["--ask", "x", "--deploy", "kubernetes"], "leave out one"),
        (["--gpus", "0"], "--gpus is 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], line: str) -> None:
    with pytest.raises(InputError, match=line):
        parse(Serve, ["--model", "m", *arguments])


def test_a_port_in_use_is_refused_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = f"127.0.0.1:{port}: Address already in use.*; choose another"
        with pytest.raises(InputError, match=line), listening("127.0.0.1", port):
            pass


def test_an_address_that_is_not_this_machines_is_refused_in_one_line() -> None:
    line = r"192\.0\.2\.1:8000: .*choose another --port or --host"
    with pytest.raises(InputError, match=line), listening("192.0.2.1", 8000):
        pass


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


def change_template(folder: Path, template: str | None = "{{ bos_token }}{{ messages[0]['content'] }}") -> None:
    value = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(value | {"chat_template": template}))


def drop_fast_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (change_merges, "other ids than training"),
        (drop_bos, "other ids than training"),
        (change_template, "other ids than training for a question"),
        (drop_fast_tokenizer, "no tokenizer.json"),
    ],
)
def test_a_tokenizer_that_is_not_the_trained_one_is_refused(
    folder: Path, llama_tokenizer: bytes, change: Any, line: str
) -> None:
    encoder = SentencePieceEncoder(llama_tokenizer)
    check_tokenizer(folder, encoder, "--model m", Chat(encoder))
    change(folder)
    with pytest.raises(InputError, match=line):
        check_tokenizer(folder, encoder, "--model m", Chat(encoder))


def test_a_model_is_asked_by_its_own_template(folder: Path, llama_tokenizer: bytes) -> None:
    encoder, template = SentencePieceEncoder(llama_tokenizer), "{{ bos_token }}问：{{ messages[-1]['content'] }}\n答："
    change_template(folder)
    (folder / "manifest.json").unlink()
    (folder / "chat_template.jinja").write_text(template)
    chat = chat_of(open_artifact(str(folder)), encoder)
    check_tokenizer(folder, encoder, "--model m", chat)
    assert chat.ids(QUESTION) == [encoder.bos, *encoder.encode("问：你好\n答：")]
    limits = Limits("zhllama", chat, 256)
    ids, _ = chat_request({"model": "zhllama", "messages": QUESTION}, limits)
    assert ids == tokenized({"model": "zhllama", "messages": QUESTION}, limits)["tokens"] == chat.ids(QUESTION)


def test_a_conversation_that_the_template_refuses_is_the_clients_fault(llama_tokenizer: bytes) -> None:
    encoder = SentencePieceEncoder(llama_tokenizer)
    limits = Limits("zhllama", Chat(encoder, "{{ raise_exception('no system message') }}"), 256)
    with pytest.raises(ApiError, match="refuses this conversation: no system message") as raised:
        chat_request({"model": "zhllama", "messages": QUESTION}, limits)
    assert raised.value.status == 400


def test_a_model_without_a_template_is_refused(folder: Path, llama_tokenizer: bytes) -> None:
    change_template(folder, None)
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="no chat template"):
        chat_of(open_artifact(str(folder)), SentencePieceEncoder(llama_tokenizer))


def test_what_the_model_says_of_sampling_wins_over_the_recipe(
    folder: Path, tmp_path: Path, llama_tokenizer: bytes
) -> None:
    (folder / GENERATION).write_text('{"temperature": 0.7}')
    (folder / "manifest.json").unlink()
    lay_out(
        Checkpoint(open_artifact(str(folder))),
        tmp_path / "view",
        special_ids(SentencePieceEncoder(llama_tokenizer), {}, ""),
    )
    settings = json.loads((tmp_path / "view" / GENERATION).read_text())
    assert settings["temperature"] == 0.7
    assert settings["top_k"] == 40


def test_the_server_stops_by_the_tokenizer_and_not_by_what_the_model_says(
    folder: Path, tmp_path: Path, llama_tokenizer: bytes
) -> None:
    (folder / GENERATION).write_text('{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}')
    (folder / "manifest.json").unlink()
    lay_out(
        Checkpoint(open_artifact(str(folder))),
        tmp_path / "view",
        special_ids(SentencePieceEncoder(llama_tokenizer), {}, ""),
    )
    settings = json.loads((tmp_path / "view" / GENERATION).read_text())
    assert [settings[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 2]


@pytest.mark.slow
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


# --- a folder that is no whole model ----------------------------------------------------------------------------------


def cut_shard(folder: Path) -> None:
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])


def drop_shard(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


def swap_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.model"
    proto = parse_model(file.read_bytes())
    proto.pieces.add(piece="中文", score=-40_000.0)
    file.write_bytes(proto.SerializeToString())


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True], ids=["a folder", "an artifact"])
@pytest.mark.parametrize(
    ("damage", "line", "verified"),
    [
        (cut_shard, "cut short", "bytes, the manifest says"),
        (drop_shard, "shard .* is missing", "not there, the manifest says"),
        (swap_tokenizer, "its tokenizer has 801 pieces and the embedding 800 rows", "bytes, the manifest says"),
    ],
)
def test_what_is_no_whole_model_is_refused_before_an_engine_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, line: str, verified: str, kept: bool
) -> None:
    started: list[Any] = []
    monkeypatch.setattr("components.serve.engine_process.EngineProcess.__enter__", started.append)
    manifest = folder / "manifest.json"
    if kept:
        # the manifest names its own place
        value = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**value, "root": str(folder)}))
    else:
        manifest.unlink()
    damage(folder)
    with pytest.raises(InputError, match=verified if kept else line), served(Serve(model=str(folder), port=0)):
        pass
    assert not started
