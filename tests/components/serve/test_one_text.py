"""A model that was taught gives the same text in every engine: no space in front, in a stream and in a history too."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytest.importorskip("llama_cpp", reason="NOT CHECKED: llama-cpp-python is not here (make gguf), so no GGUF is served")

from components.export_model.exporter import export_model
from components.export_model.options import ExportModel
from components.serve.local import served
from components.serve.options import Serve
from tests.loaded_model import load_model
from zhllama.artifacts.open import open_artifact
from zhllama.inference.generate import answer
from zhllama.inference.sampling import Sampling
from zhllama.stage.run import run_stage
from zhllama.tokenizer.chat import Chat, asked
from zhllama.tokenizer.fast_tokenizer import load_fast
from zhllama.tokenizer.prompt import DEFAULT
from zhllama.tokenizer.vocabulary import Encoder

pytestmark = [pytest.mark.gguf, pytest.mark.slow]

CONVERSATION = [
    *asked("这条评论怎么样？很好"),
    {"role": "assistant", "content": "正面"},
    *asked("How does it end?"),
    {"role": "assistant", "content": "The end of it."},
    *asked("再见"),
    {"role": "assistant", "content": "123，再见！"},
]
ENGINES = ("transformers", "llama.cpp")


@pytest.fixture(scope="module")
def encoder(extended_model: str) -> Encoder:
    return load_model(extended_model).encoder


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, extended_model: str, encoder: Encoder) -> Path:
    """The extended model after it has learnt the conversation by heart, each answer alone and behind the others, in
    the ids that prepare_dataset gives."""
    import torch

    torch.manual_seed(1)
    trained, chat = load_model(extended_model), Chat(encoder, DEFAULT.template)
    trained.model.requires_grad_(True)
    rows = []
    for begin in (0, 2, 4):
        for turns in {(CONVERSATION[begin]["content"],), tuple(turn["content"] for turn in CONVERSATION[: begin + 1])}:
            before = chat.ids(CONVERSATION[begin + 1 - len(turns) : begin + 1], trained=True)
            text = CONVERSATION[begin + 1]["content"]
            rows.append((before, chat.answered(turns[-1], [text])[1][0]))
    width = max(len(before) + len(said) for before, said in rows)
    ids = torch.full((len(rows), width), trained.padding)
    labels = torch.full_like(ids, -100)
    for row, (before, said) in enumerate(rows):
        ids[row, : len(before + said)] = torch.tensor(before + said)
        labels[row, len(before) : len(before + said)] = torch.tensor(said)
    optimizer = torch.optim.AdamW(trained.model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss = trained.model(ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    folder = tmp_path_factory.mktemp("taught")
    trained.model.save_pretrained(folder)
    for name, content in encoder.files(template=DEFAULT.template).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def file(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = str(tmp_path_factory.mktemp("exported"))
    config = ExportModel(store=store, model=str(taught), format="gguf", quantization="f32")
    made = open_artifact(run_stage(config, export_model).reference)
    return Path(shutil.copy(Path(made.root) / "model-f32.gguf", tmp_path_factory.mktemp("file")))


@pytest.fixture(scope="module")
def clients(taught: Path, file: Path) -> Iterator[dict[str, httpx2.Client]]:
    """One behind each engine."""
    with (
        served(Serve(model=str(taught), port=0)) as (one, _),
        served(Serve(model=str(file), port=0)) as (two, _),
        httpx2.Client(base_url=one, timeout=60) as first,
        httpx2.Client(base_url=two, timeout=60) as second,
    ):
        yield dict(zip(ENGINES, (first, second), strict=True))


def body(messages: Any, **more: Any) -> dict[str, Any]:
    return {"model": "zhllama", "messages": messages, "temperature": 0, "repetition_penalty": 1.0, **more}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("turn", [0, 2, 4], ids=["Chinese", "English", "figures"])
@pytest.mark.parametrize("history", [False, True], ids=["alone", "in a conversation"])
def test_the_answer_is_the_taught_text_and_no_space(clients, engine, turn, history):
    messages, wanted = CONVERSATION[0 if history else turn : turn + 1], CONVERSATION[turn + 1]["content"]
    client = clients[engine]
    said = client.post("/v1/chat/completions", json=body(messages, max_tokens=30)).json()
    assert said["choices"][0]["message"]["content"] == wanted
    assert said["choices"][0]["finish_reason"] == "stop"
    with client.stream("POST", "/v1/chat/completions", json=body(messages, max_tokens=30, stream=True)) as answered:
        lines = [line for line in answered.read().decode().split("\n\n") if line and not line.endswith("[DONE]")]
    deltas = [choice["delta"] for line in lines for choice in json.loads(line.removeprefix("data: "))["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == wanted


def test_without_a_server_too(taught):
    loaded = load_model(str(taught))
    for turn in (0, 2, 4):
        prompt = loaded.chat.ids(CONVERSATION[: turn + 1], trained=True)
        (ids,) = answer(loaded, [prompt], Sampling(do_sample=False, repetition_penalty=1.0))
        assert loaded.encoder.decode(ids) == CONVERSATION[turn + 1]["content"]


@pytest.mark.parametrize("length", range(1, 6, 2))
def test_every_engine_reads_a_conversation_as_the_ids_of_training(clients, taught, file, encoder, length):
    import llama_cpp
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter
    from transformers import AutoTokenizer

    messages = CONVERSATION[:length]
    wanted = [encoder.bos]
    for one, two in zip(CONVERSATION[0 : length - 1 : 2], CONVERSATION[1:length:2], strict=True):
        wanted += [*encoder.encode(DEFAULT.wrap(one["content"]) + two["content"]), encoder.eos]
    wanted += encoder.encode(DEFAULT.wrap(messages[-1]["content"]))

    auto = AutoTokenizer.from_pretrained(taught)
    text = auto.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    found = {
        "transformers": list(auto.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)),
        "vLLM's way": auto(text, add_special_tokens=False)["input_ids"],
        "tokenizers": load_fast(encoder.files()).encode(text, add_special_tokens=False).ids,
    }
    model = llama_cpp.Llama(model_path=str(file), vocab_only=True, verbose=False)
    template = model.metadata["tokenizer.chat_template"]
    rendered = Jinja2ChatFormatter(template, eos_token="</s>", bos_token="<s>")(messages=messages).prompt
    found["llama.cpp"] = model.tokenize(rendered.encode(), add_bos=False, special=True)
    model.close()
    asked_for = {"model": "zhllama", "messages": messages}
    for engine, client in clients.items():
        found[f"gateway, {engine}"] = client.post("/tokenize", json=asked_for).json()["tokens"]
        used = client.post("/v1/chat/completions", json=body(messages, max_tokens=1)).json()["usage"]
        assert used["prompt_tokens"] == len(wanted)
    assert found == dict.fromkeys(found, wanted)


# --- one client for all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_every_sampling_name_is_taken_by_every_engine(clients, engine):
    names = {
        "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 1,
        "seed": 1, "presence_penalty": 0, "frequency_penalty": 0, "stop": ["x"], "logit_bias": {"5": 1.0},
    }  # fmt: skip
    for asked_for in ({"messages": CONVERSATION[:1]}, {"prompt": "从前"}):
        path = "/v1/chat/completions" if "messages" in asked_for else "/v1/completions"
        given = {"model": "zhllama", "max_tokens": 4, **asked_for}
        made = clients[engine].post(path, json=given | names)
        assert made.status_code == 200, made.text
        for name, value in names.items():
            made = clients[engine].post(path, json=given | {name: value})
            assert made.status_code == 200, made.text
        made = clients[engine].post(path, json=given | {"repeat_penalty": 1.2})
        assert made.status_code == 200, made.text
        made = clients[engine].post(path, json=given | {"top_n_sigma": 1})
        assert made.status_code == 400
        assert made.json()["error"]["message"] == "top_n_sigma is nothing that this server knows; leave it out"


@pytest.mark.parametrize("engine", ENGINES)
def test_top_k_and_the_repetition_penalty_have_their_meaning(clients, engine):
    def said(**more: Any) -> str:
        asked_for = body(CONVERSATION[:1], max_tokens=12) | {"temperature": 2.0} | more
        answered = clients[engine].post("/v1/chat/completions", json=asked_for).json()
        return str(answered["choices"][0]["message"]["content"])

    assert {said(seed=seed, top_k=1) for seed in range(3)} == {"正面"}
    assert {said(seed=seed, min_p=1) for seed in range(3)} == {"正面"}
    # what stands in the prompt is likelier by far below 1
    assert said(temperature=0, repetition_penalty=0.05) != "正面"
    assert said(temperature=0, repeat_penalty=0.05, repetition_penalty=None) != "正面"
    assert said(temperature=0, logit_bias={str(2): 1000.0}) == ""
    assert said(temperature=0, min_tokens=6) != "正面"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_text_ends_before_what_was_to_stop_it(clients, engine):
    asked_for = body(CONVERSATION[2:3], max_tokens=30, stop=["of", "zzz"])
    said = clients[engine].post("/v1/chat/completions", json=asked_for).json()["choices"][0]
    assert (said["message"]["content"], said["finish_reason"]) == ("The end ", "stop")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_special_token_in_a_text_is_one_id_as_completions_read_it(clients, engine, encoder):
    client, text = clients[engine], "好</s>好"
    found = client.post("/tokenize", json={"model": "zhllama", "prompt": text}).json()
    assert found["tokens"] == [encoder.bos, *encoder.encode("好"), encoder.eos, *encoder.encode("好")]
    asked_for = {"model": "zhllama", "prompt": text, "max_tokens": 1}
    used = client.post("/v1/completions", json=asked_for).json()["usage"]["prompt_tokens"]
    assert used == found["count"]
    bare = {"model": "zhllama", "prompt": "</s>", "add_special_tokens": False}
    assert client.post("/tokenize", json=bare).json()["tokens"] == [encoder.eos]
    back = client.post("/detokenize", json={"model": "zhllama", "tokens": [encoder.eos]}).json()
    assert back == {"prompt": "</s>"}
