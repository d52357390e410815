"""The gateway before an engine of the tests' own: who is let in, what is refused, what comes back; and it lives on."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import openai
import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.serve import fields
from components.serve.engines import Engine, llama_cpp_engine, transformers_engine, vllm_engine
from components.serve.gateway import OPEN, Gateway, is_loopback
from components.serve.local import listening
from components.serve.page import PATHS
from components.serve.requests import ApiError, Limits, chat, completion, parse_json
from tests.components.serve.fronts import listening_front
from tests.fake_engine import FakeEngine
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.prompt import RECIPE
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.vocabulary import Encoder

KEY = "a-key-for-the-tests-only"
QUESTION = [{"role": "user", "content": "你好"}]
CHAT = "/v1/chat/completions"


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[httpx2.Client]:
    with listening_front(engine) as made:
        yield made


def body(**more: Any) -> dict[str, Any]:
    return {"model": "zhllama", "messages": QUESTION, **more}


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """The error; fails where the body is not OpenAI's."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if answer.status_code < 500 else "server_error")
    return dict(error)


# --- what comes back --------------------------------------------------------------------------------------------------


def test_an_answer_comes_back_and_the_engine_is_told_how_long_it_may_be(
    client: httpx2.Client, engine: FakeEngine
) -> None:
    answer = client.post(CHAT, json=body(user="someone", stream_options={"include_usage": True}))
    assert answer.json()["choices"][0]["message"]["content"] == "好的。"
    ((path, sent),) = engine.seen
    assert path == CHAT
    assert sent == body(max_tokens=256 - len(Chat(engine.encoder).ids(QUESTION)))


def test_a_stream_comes_back_event_by_event_and_ends_as_openais_do(client: httpx2.Client, engine: FakeEngine) -> None:
    # separators that are no line ends in an event stream
    engine.pieces = ["好", "\u2028的", "\x85。"]
    with client.stream("POST", CHAT, json=body(stream=True)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.read().split(b"\n\n") if line]
    assert lines[-1] == b"data: [DONE]"
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "好\u2028的\x85。"


def test_what_the_front_accepts_sends_at_once() -> None:
    # an answer is sent in two pieces, and a stream in many: none may wait for the one before to be acknowledged
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_completion_reads_the_prompt_as_it_is(client: httpx2.Client, engine: FakeEngine) -> None:
    assert client.post("/v1/completions", json={"model": "zhllama", "prompt": ["从前"]}).json()["choices"][0]["text"]
    assert engine.seen[0][1]["prompt"] == "从前"


def test_an_engine_hears_its_own_words(client: httpx2.Client, engine: FakeEngine, encoder: Encoder) -> None:
    given = body(top_k=-1, repeat_penalty=1.2, min_tokens=2, logit_bias={"5": 1}, max_tokens=9)
    assert client.post(CHAT, json=given).status_code == 200
    sent = engine.seen[0][1]
    assert sent == body(top_k=0, repetition_penalty=1.2, min_tokens=2, logit_bias={"5": 1}, max_tokens=9)
    llama_cpp = llama_cpp_engine(Path("m.gguf"), "zhllama", 256).request(sent)
    assert llama_cpp["repeat_penalty"] == 1.2
    assert "repetition_penalty" not in llama_cpp
    # what the recipe has, and nothing of llama.cpp's own
    assert [llama_cpp[name] for name in ("top_k", "min_p", "temperature", "top_p")] == [0, 0, 0.2, 0.9]
    transformers = transformers_engine(Path(), "zhllama", {"top_k": 40, "top_p": 0.9, "eos_token_id": 2}).request(sent)
    assert json.loads(transformers.pop("generation_config")) == {
        "top_k": 0, "top_p": 0.9, "eos_token_id": 2, "repetition_penalty": 1.2, "min_new_tokens": 2,
        "sequence_bias": [[[5], 1.0]],
    }  # fmt: skip
    assert transformers == body(max_tokens=9)
    assert transformers_engine(Path(), "zhllama", {"top_k": 40}).request(body()) == body()
    assert vllm_engine(Path(), "zhllama", 256).request(sent) == sent


def test_ids_become_text_again(client: httpx2.Client, encoder: Encoder) -> None:
    ids = client.post("/tokenize", json={"model": "zhllama", "prompt": "a</s>今天"}).json()["tokens"]
    assert ids == [1, *encoder.encode("a"), 2, *encoder.encode("今天")]
    back = client.post("/detokenize", json={"model": "zhllama", "tokens": ids}).json()
    assert back == {"prompt": "<s> a</s> 今天"}
    for wrong in ({}, {"tokens": "x"}, {"tokens": [True]}, {"tokens": [800]}):
        answer = client.post("/detokenize", json={"model": "zhllama", **wrong})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "tokens")


def test_a_chat_template_that_never_ends_is_400_and_others_are_answered(engine: FakeEngine) -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    limits = Limits("zhllama", Chat(engine.encoder, endless), 256)
    with pytest.raises(ApiError, match="does not end within 5 s") as raised:
        chat(body(), limits)
    assert raised.value.status == 400


def test_tokenize_gives_the_ids_of_training(client: httpx2.Client, encoder: Encoder) -> None:
    asked = client.post("/tokenize", json={"model": "zhllama", "prompt": "今天"}).json()
    assert asked == {"tokens": [1, *encoder.encode("今天")], "count": len(asked["tokens"]), "max_model_len": 256}
    asked = client.post("/tokenize", json=body()).json()
    assert asked["tokens"] == [1, *encoder.encode(RECIPE.wrap("你好"))]


def test_the_model_is_listed(client: httpx2.Client) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["zhllama"]
    assert client.get("/v1/models/zhllama").json()["max_model_len"] == 256
    assert error_of(client.get("/v1/models/gpt-4"))["code"] == "model_not_found"


def test_metrics_count_requests_and_tokens_and_hold_no_text(client: httpx2.Client, encoder: Encoder) -> None:
    client.post(CHAT, json=body())
    client.post(CHAT, json=body(model="other"))
    with client.stream("POST", CHAT, json=body(stream=True)) as answer:
        answer.read()
    text = client.get("/metrics").text
    assert f'zhllama_requests_total{{path="{CHAT}",status="200"}} 2.0' in text
    assert f'zhllama_requests_total{{path="{CHAT}",status="404"}} 1.0' in text
    assert f"zhllama_prompt_tokens_total {2.0 * len(Chat(encoder).ids(QUESTION))}" in text
    assert "zhllama_answer_tokens_total 6.0" in text
    assert "zhllama_requests_running 0.0" in text
    assert "zhllama_first_token_seconds_count 1.0" in text
    assert 'zhllama_engine_up{model="zhllama"} 1.0' in text
    assert "fake_engine_metric 1" in text
    assert "你好" not in text


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b'{"model": "zhllama"', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "a JSON object is needed"),
        (b'{"temperature": NaN}', "NaN is no number"),
        (b'{"model": "\\ud800"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_body_that_is_no_json_object_is_400(client: httpx2.Client, content: bytes, said: str) -> None:
    for path in (CHAT, "/v1/completions", "/tokenize"):
        answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert said in error_of(answer)["message"]
    assert client.post(CHAT, json=body()).status_code == 200


@pytest.mark.parametrize(
    ("change", "status", "param", "said"),
    [
        ({"model": None}, 400, "model", "must be the name"),
        ({"model": "gpt-4"}, 404, "model", "does not exist; this server has 'zhllama'"),
        ({"messages": []}, 400, "messages", "at least one"),
        ({"messages": "你好"}, 400, "messages", "must be a list"),
        ({"messages": ["你好"]}, 400, "messages", r"messages[0] must be an object"),
        ({"messages": [{"content": "x"}]}, 400, "messages", "messages[0].role must be"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages", "not 'tool'"),
        ({"messages": [{"role": "user"}]}, 400, "messages", "content must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "must be text"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "x"}]}, 400, "messages", "the user's"),
        ({"messages": [{"role": "user", "content": "长" * 500}]}, 400, "messages", "context is 256 tokens"),
        ({"max_tokens": 250}, 400, "messages", "and 250 for the answer"),
        ({"max_completion_tokens": 250}, 400, "messages", "and 250 for the answer"),
        ({"max_tokens": 0}, 400, "max_tokens", "between 1"),
        ({"max_tokens": 1.5}, 400, "max_tokens", "whole number"),
        ({"temperature": "hot"}, 400, "temperature", "must be a number"),
        ({"temperature": 3}, 400, "temperature", "between 0 and 2"),
        ({"top_p": True}, 400, "top_p", "must be a number"),
        ({"stream": "yes"}, 400, "stream", "true or false"),
        ({"stop": 5}, 400, "stop", "must be a text"),
        ({"n": 2}, 400, "n", "one answer"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "text alone"),
        ({"stop": ["x", ""]}, 400, "stop", "an empty text"),
        ({"logprobs": True}, 400, "logprobs", "this engine"),
        ({"top_k": 1.5}, 400, "top_k", "whole number"),
        ({"top_k": -2}, 400, "top_k", "between -1"),
        ({"min_p": 2}, 400, "min_p", "between 0 and 1"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty", "between 0.01"),
        ({"repeat_penalty": 0}, 400, "repetition_penalty", "between 0.01"),
        ({"repeat_penalty": 1, "repetition_penalty": 2}, 400, "repetition_penalty", "are one"),
        ({"min_tokens": 9, "max_tokens": 8}, 400, "min_tokens", "more than the 8"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "ids below 800"),
        ({"logit_bias": {"800": 1}}, 400, "logit_bias", "ids below 800"),
        ({"logit_bias": [1]}, 400, "logit_bias", "ids with a number each"),
        ({"mirostat_mode": 2}, 400, "mirostat_mode", "nothing that this server knows"),
    ],
)
def test_a_wrong_request_is_refused_in_openais_form_and_the_engine_hears_nothing(
    client: httpx2.Client, engine: FakeEngine, change: dict[str, Any], status: int, param: str, said: str
) -> None:
    answer = client.post(CHAT, json=body(**change))
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (status, param)
    assert said in error["message"]
    assert not engine.seen
    assert client.post(CHAT, json=body()).status_code == 200


def test_a_prompt_longer_than_the_context_has_openais_code(client: httpx2.Client) -> None:
    long = client.post("/v1/completions", json={"model": "zhllama", "prompt": "长" * 300})
    assert (long.status_code, error_of(long)["code"]) == (400, "context_length_exceeded")


def test_a_body_of_many_megabytes_is_413(client: httpx2.Client) -> None:
    answer = client.post(CHAT, json=body(user="x" * 5_000_000))
    assert (answer.status_code, error_of(answer)["type"]) == (413, "invalid_request_error")


def test_a_path_or_method_that_is_not_there_is_told_in_json(client: httpx2.Client) -> None:
    assert client.get("/v1/embeddings").status_code == 404
    assert error_of(client.post("/v1/embeddings", json={}))["message"] == "there is no /v1/embeddings here"
    wrong = client.get(CHAT)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert error_of(wrong)["message"] == f"{CHAT} answers to POST, not to GET"
    assert client.delete("/v1/models").status_code == 405


_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
_FIELDS = ("model", "messages", "prompt", "temperature", "top_p", "max_tokens", "seed", "stop", "stream", "n", "tools",
           "max_completion_tokens", "logprobs", "response_format", "tool_choice", "user", "top_k", "logit_bias",
           "repeat_penalty", "min_tokens")  # fmt: skip


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(_FIELDS), _json, max_size=6), st.booleans())
@settings(max_examples=300)
def test_whatever_is_asked_is_in_order_or_a_4xx(llama_tokenizer: bytes, asked: dict[str, Any], usable: bool) -> None:
    limits = Limits("zhllama", Chat(SentencePieceEncoder(llama_tokenizer)), 256)
    given_body = {**asked, **(body() if usable else {}), **({"prompt": "x"} if usable else {})}
    for check in (chat, completion):
        try:
            found = check(parse_json(json.dumps(given_body).encode()), limits)
        except ApiError as error:
            assert error.status in (400, 404)  # noqa: PT017 - either is right
        else:
            ids, checked = found
            assert ids[0] == 1
            assert 1 <= checked["max_tokens"] <= 256 - len(ids)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"stop": ["x"] * 100_000}, "at most 16 texts"),
        ({"stop": "x" * 100_000}, "at most 256"),
        ({"generation_config": "{}"}, "generation_config is nothing"),
        ({"messages": [{"role": "user", "content": ""}] * 135_000}, "135,000 messages are more"),
        ({"messages": [{"role": "user", "content": "a" * 4_000_000}]}, "4,000,000 characters are more"),
        ({"messages": [{"role": "user", "content": " " * 4_000_000}]}, "4,000,000 characters are more"),
        ({"messages": [{"role": "x" * 4_000_000, "content": ""}]}, "role must be"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls is nothing"),
        ({"model": "x" * 4_000_000}, "does not exist"),
        ({"x" * 4_000_000: 1}, "is nothing that this server knows"),
        ({"logit_bias": {str(index): 0 for index in range(800)} | {f"{index:08}": 0 for index in range(800)}}, "1,024"),
        ({"response_format": {"type": "json_object", "schema": {"enum": ["x" * 100_000]}}}, "an object, of 65,536"),
        ({"response_format": {"schema": {"enum": list(range(100_000))}}}, "an object, of 65,536"),
        ({"response_format": json.loads('{"x":' * 40 + "1" + "}" * 40)}, "32 levels"),
        ({"response_format": {"schema": {"type": "string", "minLength": 10**9}}}, "what it repeats counted"),
        ({"response_format": {"schema": {"items": {"maxItems": 1e9}}}}, "what it repeats counted"),
        ({"response_format": {"type": "json_object", "schema": {"x": '{"maxItems": 1e9}'}}}, "what it repeats counted"),
        ({"response_format": {"schema": {}}}, "response_format must be"),
        ({"response_format": {"type": "xml"}}, "response_format must be"),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format must be"),
        ({"response_format": {"type": "json_schema", "schema": {}}}, "response_format must be"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format must be"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}}, "json_schema.x"),
        ({"temperature": 10**4_000}, "temperature must be"),
        ({"max_tokens": 10**4_000}, "max_tokens must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"prompt": "x"}, "prompt is nothing"),
        ({"tool_choice": "auto", "modalities": ["audio"]}, "text alone"),
        ({"n": True}, "one answer"),
        ({"best_of": 2}, "best_of is nothing"),
    ],
    ids=lambda given: str(given)[:40],
)  # fmt: skip
def test_work_is_counted_before_it_is_done(
    client: httpx2.Client, engine: FakeEngine, more: dict[str, Any], said: str
) -> None:
    begin = time.process_time()
    answer = client.post(CHAT, json=body(**more))
    assert answer.status_code in (400, 404)
    assert said in error_of(answer)["message"]
    assert len(answer.content) < 1_000
    # of the processor, the client's part too: the worst of them took 155 s
    assert time.process_time() - begin < 3
    assert not engine.seen


@pytest.mark.parametrize(
    "content",
    [
        '{"model": "zhllama", "model": "zhllama", "messages": [{"role": "user", "content": "x"}]}',
        '{"model": "zhllama", "messages": [{"role": "user", "role": "system", "content": "x"}]}',
        '{"model": "zhllama", "temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
        '{"model": "zhllama", "temperature": -Infinity, "messages": [{"role": "user", "content": "x"}]}',
        '{"model": "zhllama", "seed": ' + "9" * 5_000 + ', "messages": [{"role": "user", "content": "x"}]}',
        '{"model": "zhllama", "metadata": ' + "[" * 150 + "]" * 150 + ', "messages": []}',
    ],
    ids=["a key twice", "deep inside too", "infinity", "its name", "a number of 5,000 digits", "nested"],
)
def test_json_that_programs_read_in_more_than_one_way_is_refused(client: httpx2.Client, content: str) -> None:
    answer = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, error_of(answer)["message"][:20]) == (400, "the body is not JSON")


def test_every_field_of_openais_client_is_decided(client: httpx2.Client, engine: FakeEngine) -> None:
    said = {
        "store": True, "metadata": {"a": "b"}, "user": "me", "seed": 3, "stream_options": {"include_usage": True},
        "response_format": {"type": "text"}, "service_tier": "auto", "parallel_tool_calls": True, "tools": [],
        "safety_identifier": "x", "prompt_cache_key": "x", "modalities": ["text"], "n": 1, "tool_choice": "none",
    }  # fmt: skip
    assert client.post(CHAT, json=body(**said)).status_code == 200
    assert engine.seen[-1][1].keys() == {"model", "messages", "seed", "max_tokens"}
    for known, names in (
        (fields.CHAT, openai.types.chat.completion_create_params.CompletionCreateParamsNonStreaming),
        (fields.COMPLETION, openai.types.completion_create_params.CompletionCreateParamsNonStreaming),
    ):
        undecided = names.__annotations__.keys() - known.keys() - fields.NOTHING.keys()
        assert undecided <= {"reasoning_effort", "verbosity", "web_search_options", "moderation"}


_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 3_000), st.floats(-3, 3), st.text("ax", max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text("a5", max_size=3), inner, max_size=2)),
    max_leaves=5,
)


@given(st.data())
def test_the_table_means_what_json_schema_means(data: Any) -> None:
    tables = (fields.CHAT, fields.COMPLETION, fields.TOKENIZE, fields.OF_LLAMA_CPP, fields.OF_VLLM)
    schema = data.draw(st.sampled_from([schema for table in tables for schema in table.values()]))
    value = data.draw(_values | st.sampled_from([1, [], {}, "text", [["text"]]]))
    valid = jsonschema.Draft202012Validator(schema).is_valid(value)
    # one difference, on purpose: 1.0 is no whole number
    assert fields.fits(value, schema) == (valid and not (schema.get("type") == "integer" and isinstance(value, float)))


def test_a_temperature_near_0_is_0(client: httpx2.Client, engine: FakeEngine) -> None:
    assert client.post(CHAT, json=body(temperature=1e-320)).status_code == 200
    assert engine.seen[-1][1]["temperature"] == 0


# --- an engine that misbehaves ----------------------------------------------------------------------------------------


def test_an_engine_that_refuses_fails_or_breaks_off_is_told_in_openais_form(
    client: httpx2.Client, engine: FakeEngine
) -> None:
    def cut(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [')
        handler.close_connection = True

    faults = {
        "refuses": (lambda handler: handler.json(422, {"detail": "no"}), 400),
        "fails": (lambda handler: handler.json(500, {"detail": "no"}), 502),
        "says nonsense": (lambda handler: handler.raw(200, b"<html>", "text/html"), 502),
        "breaks off": (cut, 502),
    }
    for fault, status in faults.values():
        engine.faults[CHAT] = fault
        answer = client.post(CHAT, json=body())
        assert answer.status_code == status
        assert error_of(answer)["message"]
    engine.faults.clear()
    assert client.post(CHAT, json=body()).status_code == 200


def test_a_stream_that_breaks_ends_with_an_error_that_openais_client_raises(engine: FakeEngine) -> None:
    faults = (
        lambda handler: handler.stream([handler.chunk("好")], whole=False),
        lambda handler: handler.stream([handler.chunk("好"), b'data: {"error": "Invalid prefix"}\n\n']),
        lambda handler: handler.stream([handler.chunk("好"), b"data: {nonsense\n\n"]),
    )
    with listening_front(engine) as client:
        asked = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
        for fault in faults:
            engine.faults[CHAT] = fault
            chunks = iter(asked.chat.completions.create(**body(stream=True)))
            assert next(chunks).choices[0].delta.content == "好"
            with pytest.raises(openai.APIError, match="broke off"):
                next(chunks)
        text = client.get("/metrics").text
    assert f'zhllama_requests_total{{path="{CHAT}",status="502"}} 3.0' in text


def test_a_client_that_leaves_ends_its_stream_at_the_engine(client: httpx2.Client, engine: FakeEngine) -> None:
    ended = threading.Event()

    def forever(handler: Any) -> None:
        try:
            handler.stream([handler.chunk("好")] * 3, whole=False)
            while not engine.released.wait(0.01):
                event = handler.chunk("好" * 1000)
                handler.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
        except OSError:
            ended.set()

    engine.faults[CHAT] = forever
    with client.stream("POST", CHAT, json=body(stream=True)) as answer:
        next(answer.iter_bytes())
    assert ended.wait(60)
    assert client.get("/v1/models").status_code == 200


def being_answered(client: httpx2.Client) -> float:
    """The gauge of requests that are being answered."""
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("zhllama_requests_running ")).split()[1])


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("usage", [{"completion_tokens": None}, {"completion_tokens": [3]}, "three"])
def test_a_count_that_is_none_is_the_engines_fault_and_the_request_ends(
    client: httpx2.Client, engine: FakeEngine, usage: Any
) -> None:
    engine.faults[CHAT] = lambda handler: handler.json(200, {"choices": [], "usage": usage})
    answer = client.post(CHAT, json=body())
    assert (answer.status_code, error_of(answer)["message"]) == (502, "the engine broke off its answer")
    event = f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode()
    engine.faults[CHAT] = lambda handler: handler.stream([event])
    assert "the engine broke off its answer" in client.post(CHAT, json=body(stream=True)).text
    assert being_answered(client) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_engine_answers_is_no_longer_counted(
    client: httpx2.Client, engine: FakeEngine, stream: bool
) -> None:
    goes_on = threading.Event()

    def late(handler: Any) -> None:
        goes_on.wait(60)
        handler.stream([handler.chunk("好")] * 3) if stream else handler.json(200, {"choices": []})

    engine.faults[CHAT] = late
    content = json.dumps(body(stream=stream)).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as leaving:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {client.base_url.host}\r\nContent-Type: application/json\r\n"
        leaving.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_for(lambda: any(path == CHAT for path, _ in engine.seen))
        assert being_answered(client) == 1
    goes_on.set()
    wait_for(lambda: being_answered(client) == 0)


@pytest.mark.parametrize("begun", [False, True])
def test_what_is_cancelled_while_the_engine_works_is_no_longer_counted(engine: FakeEngine, begun: bool) -> None:
    """As a server that stops, and a chat page that is closed, cancel it: before the engine's head, and after."""

    def waits(handler: Any) -> None:
        if begun:
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
        engine.released.wait(60)

    async def cancelled(gateway: Gateway, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        asked = len(engine.seen)
        while len(engine.seen) == asked:
            await asyncio.sleep(0.01)
        assert prometheus_client.generate_latest(gateway.metrics.registry).count(b"zhllama_requests_running 1.0") == 1
        # the head, where there is one, is read by then or read when it is cancelled: either way it must end
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert prometheus_client.generate_latest(gateway.metrics.registry).count(b"zhllama_requests_running 0.0") == 1

    async def both() -> None:
        fake = Engine("fake", Path(), [], "/health")
        gateway = Gateway(Limits("zhllama", Chat(engine.encoder), 256), fake,
                      engine.address, lambda: True)  # fmt: skip
        transport = httpx2.ASGITransport(gateway.app())
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await cancelled(gateway, client.post(CHAT, json=body()))
            await cancelled(gateway, client.post(CHAT, json=body(stream=True)))

    engine.faults[CHAT] = waits
    asyncio.run(both())


def test_health_says_when_the_engine_is_gone(engine: FakeEngine) -> None:
    with listening_front(engine) as client:
        assert client.get("/health").json() == {"status": "ok"}
        engine.faults["/health"] = lambda handler: handler.json(503, {})
        assert client.get("/health").status_code == 503
        engine.__exit__()
        assert client.get("/health").json() == {"status": "the engine does not answer"}
        answer = client.post(CHAT, json=body())
        assert (answer.status_code, error_of(answer)["message"]) == (503, "the engine does not answer")


# --- who is let in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_key", [None, "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", KEY, "Bearer 密钥"])
def test_without_the_key_nothing_of_the_model_is_answered(engine: FakeEngine, given_key: str | None) -> None:
    headers = {} if given_key is None else {"Authorization": given_key.encode()}
    with listening_front(engine, KEY, host="0.0.0.0") as client:
        for method, path in (("POST", CHAT), ("POST", "/v1/completions"), ("POST", "/tokenize"), ("GET", "/v1/models")):
            answer = client.request(method, path, json=body(prompt="x") if method == "POST" else None, headers=headers)
            assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
            assert KEY not in answer.text
        assert client.get("/health").status_code == 200
        assert not [path for path, _ in engine.seen if path != "/health"]


def test_what_is_open_without_a_key_is_in_one_list(engine: FakeEngine) -> None:
    opened = {*OPEN, *PATHS}
    tried = {
        "/v1", "/v1/", "/v1//models", "//v1/models", "/openapi.json", "/docs", "/nothing", "/upload", "/websocket/",
        "/health/", "/session/x/upload/y", "/metrics/x", "/V1/models", "/page.css%00", "/health%2f..%2fv1%2fmodels",
    }  # fmt: skip
    with listening_front(engine, KEY, host="0.0.0.0", page=True) as client:
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"):
            for path in opened | tried:
                status = client.request(method, path).status_code
                assert (status == 401) == (path not in opened or method not in ("GET", "HEAD")), (method, path, status)
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
                   "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}  # fmt: skip
        for path in ("/", "/websocket/", "/v1/chat/completions"):
            assert client.get(path, headers=upgrade).status_code == (200 if path == "/" else 401)
        twice = [("Authorization", "Bearer x"), ("Authorization", f"Bearer {KEY}")]
        assert client.get("/v1/models", headers=twice).status_code == 400


def test_with_the_key_it_is(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with listening_front(engine, KEY, host="0.0.0.0") as client:
        answer = client.post(CHAT, json=body(), headers={"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200
        # any name of this machine: it listens on all of its addresses
        named = {"Authorization": f"Bearer {KEY}", "Host": "models.example.com"}
        assert client.post(CHAT, json=body(), headers=named).status_code == 200
    assert CHAT in caplog.text
    assert KEY not in caplog.text


def test_a_page_of_another_site_is_not_answered(client: httpx2.Client, engine: FakeEngine) -> None:
    there = {"Origin": "https://evil.example.com"}
    assert client.post(CHAT, json=body(), headers=there).status_code == 403
    assert client.post(CHAT, json=body(), headers={"Host": "evil.example.com"}).status_code == 403
    # what a form of such a page can send, without asking first
    assert client.post(CHAT, content=json.dumps(body()), headers={"Content-Type": "text/plain"}).status_code == 415
    assert not engine.seen
    for origin in ("null", "", "http://[", "file://", "http://127.0.0.1", f"{client.base_url}x".replace("/x", ".evil")):
        assert client.post(CHAT, json=body(), headers={"Origin": origin}).status_code == 403, origin
    for host in ("", "[", "127.0.0.1.evil", "127.0.0.1@evil", "0.0.0.0"):
        assert client.post(CHAT, json=body(), headers={"Host": host}).status_code in (400, 403), host
    assert not engine.seen
    here = {"Origin": str(client.base_url).rstrip("/")}
    assert client.post(CHAT, json=body(), headers=here).status_code == 200


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.5", False), ("example.org", False)],
)  # fmt: skip
def test_what_counts_as_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
