"""A GGUF file behind llama.cpp's server: checked before it starts, and then served as any other model."""

import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

pytest.importorskip("llama_cpp", reason="NOT CHECKED: llama-cpp-python is not here (make gguf), so no GGUF is served")

from components.export_model.exporter import export_model
from components.export_model.options import ExportModel
from components.serve.check import check_gguf
from components.serve.local import served
from components.serve.options import Serve
from tests.loaded_model import load_model
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.inference.generate import answer
from zhllama.inference.sampling import Sampling
from zhllama.stage.run import run_stage
from zhllama.tokenizer.prompt import RECIPE

pytestmark = pytest.mark.gguf

QUESTION: Any = [{"role": "user", "content": "你好"}]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, extended_model: str) -> str:
    """The reference of the extended model's export: a file in float32 and one in float16."""
    store = str(tmp_path_factory.mktemp("exported"))
    config = ExportModel(store=store, model=extended_model, format="gguf", quantization="f32,f16")
    return run_stage(config, export_model).reference


@pytest.fixture(scope="module")
def address(exported: str) -> Iterator[str]:
    with served(Serve(model=exported, file="model-f32.gguf", port=0)) as (made, _):
        yield made


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_llama_cpp_answers_as_the_model_does(client: openai.OpenAI, extended_model: str) -> None:
    loaded = load_model(extended_model)
    (ids,) = answer(loaded, [loaded.prompt_ids(RECIPE.wrap("你好"))], Sampling(do_sample=False, max_new_tokens=1))
    made: Any = client.chat.completions.create(model="zhllama", messages=QUESTION, temperature=0, max_tokens=1)
    assert made.usage.prompt_tokens == len(loaded.prompt_ids(RECIPE.wrap("你好")))
    assert "\ufffd" not in loaded.encoder.decode(ids)
    assert made.choices[0].message.content.strip() == loaded.encoder.decode(ids).strip()


def test_it_streams_and_counts_and_is_checked_as_any_model(client: openai.OpenAI, address: str) -> None:
    made: Any = client.chat.completions.create(model="zhllama", messages=QUESTION, max_tokens=20, stream=True)
    assert list(made)[-1].choices[0].finish_reason in ("length", "stop")
    with pytest.raises(openai.BadRequestError, match="context is 2048 tokens"):
        client.chat.completions.create(model="zhllama", messages=[{"role": "user", "content": "长" * 3000}])
    assert client.completions.create(model="zhllama", prompt="从前", max_tokens=4).choices
    assert httpx2.get(f"{address}/health").json() == {"status": "ok"}
    assert "zhllama_requests_total" in httpx2.get(f"{address}/metrics").text


GRAMMARS = (
    "root ::= (((",
    "root ::= undefined",
    'x ::= "a"',
    'root ::= root "a"',
    "\0",
    "",
    "root ::= [",
    "中文",
    f'root ::= {"(" * 20_000}"a"{")" * 20_000}',
)


def refused(client: openai.OpenAI, **more: Any) -> str:
    """Why; whole and as a stream alike."""
    said = set()
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model="zhllama", messages=QUESTION, max_tokens=4, stream=stream, **more)
        said.add(error.value.body["message"])  # type: ignore[index]
    (only,) = said
    return str(only)


def test_a_grammar_that_cannot_be_read_is_refused_and_one_that_can_is_followed(client: openai.OpenAI) -> None:
    for grammar in GRAMMARS:
        if grammar:
            assert "cannot read this grammar" in refused(client, extra_body={"grammar": grammar})
    with pytest.raises(openai.BadRequestError, match="cannot read this grammar"):
        client.completions.create(model="zhllama", prompt="x", max_tokens=4, extra_body={"grammar": GRAMMARS[0]})
    for schema in ({"type": "string", "minLength": 10**9}, {"type": "array", "items": {}, "maxItems": 10**9}):
        assert "response_format must be" in refused(client, extra_body={"response_format": {"schema": schema}})
    followed: Any = client.chat.completions.create(
        model="zhllama", messages=QUESTION, max_tokens=8, extra_body={"grammar": 'root ::= "abc"'}
    )
    assert followed.choices[0].message.content == "abc"


PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 3}}, "required": ["name"]}
HELD: list[tuple[Any, str]] = [
    (PERSON, r'\{"name":".{0,3}"\}'),
    ({"const": "好"}, '"好"'),
    ({"type": "string", "pattern": "^(a|b)c$"}, '"[ab]c"'),
    ({"$defs": {"string": {"const": "x"}}, "type": "object", "required": ["a", "string"],
      "properties": {"a": {"$ref": "#/$defs/string"}, "string": {"type": "string", "maxLength": 1}}},
     r'\{"a":"x","string":".?"\}'),
]  # fmt: skip
NOT_HELD: list[tuple[Any, str]] = [
    ({"type": "integer", "minimum": 1}, "it does not know minimum"),
    ({"type": "string", "pattern": "^a|b$"}, "it does not know the pattern"),
    ({"type": "string", "pattern": r"^\d$"}, "cannot read this grammar"),
    ({"$ref": "#/nowhere"}, "nowhere"),
    ({"$ref": "https://127.0.0.1:1/"}, "remote schemas"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "does not find #/$defs/a"),
    ({"type": "thing"}, "Unrecognized schema"),
    ({"enum": ["\0", '"', "\\"]}, "cannot read this grammar"),
    ({"properties": {f"a{at}": {} for at in range(900)}}, "more than 256 properties"),
]


def test_an_answer_is_held_to_its_schema_or_the_schema_is_refused_by_what_is_not_read(client: openai.OpenAI) -> None:
    def forms(schema: Any) -> list[dict[str, Any]]:
        openais = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return [{"response_format": form} for form in (openais, {"type": "json_object", "schema": schema})]

    for schema, wanted in HELD:
        for form in forms(schema):
            made: Any = client.chat.completions.create(
                model="zhllama", messages=QUESTION, max_tokens=60, temperature=0, extra_body=form
            )
            assert re.fullmatch(wanted, made.choices[0].message.content.replace(" ", "")), schema
    for schema, why in NOT_HELD:
        for form in forms(schema):
            assert why in (said := refused(client, extra_body=form)), schema
            assert "it reads $ref (#/…), anyOf" in said
    with pytest.raises(openai.BadRequestError, match="with messages alone"):
        client.completions.create(model="zhllama", prompt="x", extra_body={"response_format": {"type": "json_object"}})


def test_a_second_request_does_not_cut_the_first_ones_stream(client: openai.OpenAI) -> None:
    asked: Any = {"model": "zhllama", "messages": QUESTION, "max_tokens": 60, "temperature": 0}
    asked["extra_body"] = {"min_tokens": 60}
    first: Any = client.chat.completions.create(**asked, stream=True)
    next(first)
    assert client.completions.create(model="zhllama", prompt="从前", max_tokens=4).choices
    *_, last = first
    assert last.choices[0].finish_reason == "length"


def test_health_is_answered_while_it_works(client: openai.OpenAI, address: str) -> None:
    asked: Any = {"model": "zhllama", "messages": QUESTION, "max_tokens": 100, "extra_body": {"min_tokens": 100}}
    working: Any = client.chat.completions.create(**asked, stream=True)
    next(working)
    assert httpx2.get(f"{address}/health", timeout=60).json() == {"status": "ok"}
    working.close()


def test_an_engine_that_a_request_ends_is_started_again_and_the_request_is_502(exported: str) -> None:
    with served(Serve(model=exported, file="model-f32.gguf", port=0)) as (address, process):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        asked: Any = {"model": "zhllama", "messages": QUESTION, "max_tokens": 500, "extra_body": {"min_tokens": 500}}
        stream: Any = client.chat.completions.create(**asked, stream=True)
        next(stream)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(client.chat.completions.create, **asked)
            process._process.send_signal(signal.SIGSEGV)
            with pytest.raises(openai.APIStatusError) as error:
                waiting.result(60)
        assert error.value.status_code in (502, 503)
        with pytest.raises(openai.APIError, match="broke off"):
            list(stream)
        until = time.monotonic() + 120
        while httpx2.get(f"{address}/health", timeout=60).status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert client.completions.create(model="zhllama", prompt="从前", max_tokens=4).choices


# --- what is refused --------------------------------------------------------------------------------------------------


def test_of_several_files_one_must_be_named(exported: str) -> None:
    for file, line in (("", "choose one with --file: model-f16.gguf, model-f32.gguf"), ("x.gguf", "no file x.gguf")):
        with pytest.raises(InputError, match=line), served(Serve(model=exported, file=file, port=0)):
            pass


def test_another_engine_cannot_serve_it(exported: str, extended_model: str) -> None:
    file = Serve(model=exported, file="model-f16.gguf", engine="transformers", port=0)
    with pytest.raises(InputError, match=r"a GGUF file, which llama\.cpp serves"), served(file):
        pass
    folder = Serve(model=extended_model, engine="llama.cpp", port=0)
    with pytest.raises(InputError, match=r"a Hugging Face folder, which llama\.cpp cannot read"), served(folder):
        pass


@pytest.fixture
def file(exported: str, tmp_path: Path) -> Path:
    """A copy of a file, to be changed."""
    return Path(shutil.copy(Path(exported).parent / "model-f16.gguf", tmp_path / "m.gguf"))


def test_a_file_of_its_own_is_checked_by_what_is_inside(file: Path, extended_model: str) -> None:
    encoder, positions, chat = check_gguf(file, None, "--model m")
    assert positions == 2048
    assert chat.ids(QUESTION) == [1, *encoder.encode(RECIPE.wrap("你好"))]
    own = load_model(extended_model).encoder
    assert encoder.encode("你好，世界 hello") == own.encode("你好，世界 hello")
    assert encoder.vocabulary().digest == own.vocabulary().digest


def test_a_vocabulary_that_is_not_the_manifests_is_refused(file: Path, tiny_model: str) -> None:
    contract = open_artifact(tiny_model).manifest.vocabulary
    with pytest.raises(InputError, match="the manifest says 800 pieces"):
        check_gguf(file, contract, "--model m")


def test_what_is_no_gguf_or_cut_short_is_refused_in_one_line(file: Path) -> None:
    content = file.read_bytes()
    for damaged in (content[:1000], b"GGUF", b"nonsense" * 100):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match="not a GGUF file, or damaged"):
            check_gguf(file, None, "--model m")


def test_a_file_is_asked_by_the_template_in_it(file: Path) -> None:
    content = file.read_bytes()
    assert content.count(b"### Response: ") == 1
    file.write_bytes(content.replace(b"### Response: ", b"### Response: "[:-1] + b"-"))
    encoder, _, chat = check_gguf(file, None, "--model m")
    assert chat.ids(QUESTION) == [1, *encoder.encode(RECIPE.wrap("你好")[:-1] + "-")]
