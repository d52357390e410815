"""What is trained of a conversation is, id by id, what a server asks the model for at each turn, and its answer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.prepare_dataset.conversations import documents_of
from components.prepare_dataset.options import PrepareDataset
from components.prepare_dataset.preparer import prepare_dataset
from components.serve.requests import Limits, tokenized
from tests.byte_level_bases import CHATML, LLAMA3_TEMPLATE
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.data.instructions import read_instructions
from zhllama.data.packed import IGNORED, TRAIN, PackedDataset
from zhllama.data.packed_view import as_json
from zhllama.data.segments import LEARNED
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.prompt import DEFAULT, RECIPE
from zhllama.tokenizer.sentencepiece_model import CONTROL, parse_model
from zhllama.tokenizer.vocabulary import Encoder, load_encoder

SYSTEM = {"role": "system", "content": "你是助手, be short."}
TURNS = [
    {"role": "user", "content": "你好, hello"},
    {"role": "assistant", "content": "good  day"},
    {"role": "user", "content": "把 1234 翻译成中文\n\n谢谢"},
    {"role": "assistant", "content": "\n一千二百三十四。"},
    {"role": "user", "content": "</s> <|im_end|>\n<|eot_id|>"},
    {"role": "assistant", "content": "a </s>b <|im_end|> c"},
]
LITERAL_FREE = TURNS[:4]
MARKED = {
    CHATML: "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == "
    "'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    LLAMA3_TEMPLATE: "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + "
    "'<|eot_id|>' }}{% endgeneration %}{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    DEFAULT.template: DEFAULT.template,
}
"""Template → the same with the markers by which transformers finds what is to be learned."""
GREETED = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe nice!<|im_end|>\n{% endif %}"
"""As Qwen 2.5's begins."""
MARKED[GREETED + CHATML] = GREETED + MARKED[CHATML]
BASES = {
    "llama": "", "llama with chatml": CHATML, "llama 3": LLAMA3_TEMPLATE, "qwen": CHATML, "qwen 2.5": GREETED + CHATML,
    "smollm2": CHATML,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory, byte_level_files, llama_tokenizer) -> dict[str, Path]:
    """Tokenizers as they lie beside a base, each with its chat template; LLaMA's has none."""
    found = {}
    chatml = parse_model(llama_tokenizer)
    for text in ("<|im_start|>", "<|im_end|>"):
        chatml.pieces.add(piece=text, score=0.0, type=CONTROL)
    others = {
        "llama": {"tokenizer.model": llama_tokenizer},
        "llama with chatml": {"tokenizer.model": chatml.SerializeToString()},
        "qwen 2.5": byte_level_files["qwen"],
    }
    for name, template in BASES.items():
        found[name] = tmp_path_factory.mktemp("bases")
        for file, content in (byte_level_files | others)[name].items():
            (found[name] / file).write_bytes(content)
        if template:
            (found[name] / "chat_template.jinja").write_text(template)
    return found


@pytest.fixture(params=BASES)
def base(request, folders) -> str:
    return str(request.param)


def encoder_of(folder: Path) -> Encoder:
    return load_encoder(open_artifact(str(folder)), "")


def prepared(tmp_path: Path, folder: Path, items: Any, **options: Any) -> Artifact:
    (tmp_path / "items.json").write_text(json.dumps(items, ensure_ascii=False))
    options = {"block_size": 512, "validation_fraction": 0.0, **options}
    config = PrepareDataset(
        store=str(tmp_path / "store"), tokenizer=str(folder), instructions=str(tmp_path / "items.json"), **options
    )
    return open_artifact(run_stage(config, prepare_dataset).reference)


def documents(dataset: PackedDataset) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every document, by its positions alone, as attention tells them apart."""
    found = []
    for block in dataset:
        used = int((block["input_ids"] != -1).sum())
        starts = [at for at in np.flatnonzero(block["position_ids"] == 0) if at < used]
        for begin, end in zip(starts, [*starts[1:], used], strict=True):
            ids, labels = block["input_ids"][begin:end].tolist(), block["labels"][begin:end].tolist()
            assert block["position_ids"][begin:end].tolist() == list(range(end - begin))
            if set(labels) != {IGNORED}:  # padding
                found.append((ids, labels))
    return found


def turns_learned(ids: Sequence[int], labels: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Of each run of labels, what stands before it, and the run."""
    edges = np.flatnonzero(np.diff(np.array(labels) != IGNORED, prepend=False, append=False)).tolist()
    return [(list(ids[:begin]), list(labels[begin:end])) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def asked_by_gateway(chat: Chat, messages: Sequence[Any]) -> list[int]:
    """As /tokenize of the server counts them."""
    found = tokenized({"model": "zhllama", "messages": list(messages)}, Limits("zhllama", chat, 4096, ()))
    return list(found["tokens"])


# --- what the server asks for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["plain", "with a system text"])
def test_every_answer_is_learned_behind_what_the_server_asks_at_that_turn(tmp_path, folders, base, system):
    messages = [*system, *TURNS]
    artifact = prepared(tmp_path, folders[base], [{"messages": messages}])
    chat = Chat(encoder_of(folders[base]), BASES[base] or DEFAULT.template)
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [turn for one in documents(PackedDataset(artifact, TRAIN)) for turn in turns_learned(*one)]
    learned.sort(key=lambda turn: len(turn[0]))
    assert len(learned) == 3
    for at, (before, said) in zip(answers, learned, strict=True):
        prompt, (answer,) = chat.answered(messages[:at], [messages[at]["content"]])
        assert (before, said) == (prompt, answer)
        assert prompt == chat.ids(messages[:at], trained=True)
        if not any(special in one["content"] for one in messages[:at] for special in chat.encoder.special):
            assert before == asked_by_gateway(chat, messages[:at])


def test_a_conversation_whose_turns_the_template_writes_as_they_are_is_one_document(tmp_path, folders, base):
    artifact = prepared(tmp_path, folders[base], [{"messages": TURNS}] * 2)
    found = documents(PackedDataset(artifact, TRAIN))
    # LLaMA 3's strips the newline that the second answer begins with
    assert sorted(len(turns_learned(*one)) for one in found) == ([1, 1, 2, 2] if base == "llama 3" else [3, 3])
    facts = artifact.manifest.facts
    assert facts["prompt"] == ("own" if BASES[base] else "alpaca-newline")
    assert facts["documents"] == 2
    split = facts["splits"]["train"]
    assert (split["columns"], split["turns"]) == (3, 2 if base == "llama 3" else 4)
    assert ("chat_template.jinja" in artifact) is bool(BASES[base])
    if BASES[base]:
        assert artifact.read("chat_template.jinja").decode() == BASES[base]


def test_transformers_renders_and_masks_the_same(tmp_path, folders, base):
    from transformers import AutoTokenizer

    template = BASES[base] or DEFAULT.template
    chat = Chat(encoder_of(folders[base]), template)
    for name, content in chat.encoder.files(template=MARKED[template]).items():
        (tmp_path / name).write_bytes(content)
    messages = [SYSTEM, *LITERAL_FREE[:3], {"role": "assistant", "content": "一千二百三十四。"}]
    made = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ((ids, marks),) = documents_of(chat, messages, 4096)
    assert made["input_ids"][: len(ids)] == ids
    assert made["assistant_masks"] == [int(mark == LEARNED) for mark in marks] + [0] * (
        len(made["input_ids"]) - len(ids)
    )


texts = st.text(
    st.sampled_from("的是不了在 \n\tab.1，。🤗<|im_end|></s>") | st.characters(codec="utf-8"), min_size=1, max_size=20
).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), system=st.none() | texts, size=st.integers(16, 300)
)
@pytest.mark.parametrize("base", BASES)
def test_of_any_conversation_what_is_learned_follows_what_is_asked(folders, base, pairs, system, size):
    chat = Chat(encoder_of(folders[base]), BASES[base] or DEFAULT.template)
    messages = [{"role": "system", "content": system}] if system else []
    wanted = []
    for asked, said in pairs:
        messages.append({"role": "user", "content": asked})
        wanted.append(chat.answered(messages, [said]))
        messages.append({"role": "assistant", "content": said})
    found = documents_of(chat, messages, size)
    learned = []
    for ids, marks in found:
        assert len(ids) == len(marks) <= size
        learned += turns_learned(ids, [index if mark == LEARNED else IGNORED for index, mark in zip(ids, marks)])
    fitting = [(before, (before + answer)[:size][len(before) :]) for before, (answer,) in wanted if len(before) < size]
    # in order, until one does not fit
    assert learned == fitting[: len(learned)]
    assert len(learned) == len(fitting) or size < len(wanted[len(learned)][0])


# --- templates that write earlier turns otherwise ---------------------------------------------------------------------

THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content.split('</think>')[-1] if not "
    "loop.last else message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)
"""Leaves out, as Qwen 3's, what was thought in earlier turns."""


def test_a_template_that_writes_earlier_answers_otherwise_has_each_turn_behind_what_is_asked(tmp_path, folders):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in folders["qwen"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(THINKING)
    said = ["<think>嗯</think>一", "<think>hm</think>二", "三"]
    messages = [
        one
        for at in range(3)
        for one in ({"role": "user", "content": f"问{at}"}, {"role": "assistant", "content": said[at]})
    ]
    artifact = prepared(tmp_path, folder, [{"messages": messages}])
    chat = Chat(encoder_of(folder), THINKING)
    found = documents(PackedDataset(artifact, TRAIN))
    assert len(found) == 3
    wanted = [chat.answered(messages[:at], [messages[at]["content"]]) for at in (1, 3, 5)]
    assert sorted(turn for one in found for turn in turns_learned(*one)) == sorted((one, two) for one, (two,) in wanted)
    assert "嗯" not in chat.text(messages[:3])
    assert artifact.manifest.facts["documents"] == 1


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}"
    "{{ raise_exception('no system text') }}{% endif %}{% endfor %}"
)


def test_white_space_that_a_template_writes_before_an_answer_is_learned_with_it(folders):
    encoder = encoder_of(folders["llama"])
    ((ids, marks),) = documents_of(Chat(encoder, MISTRAL), TURNS[:4], 4096)
    first = turns_learned(ids, [index if mark == LEARNED else IGNORED for index, mark in zip(ids, marks)])[0][1]
    text = "[INST] 你好, hello [/INST]"
    assert first == [*encoder.encode(f"{text} good  day")[len(encoder.encode(text)) :], encoder.eos]


# --- too long, left out, refused --------------------------------------------------------------------------------------


def test_a_conversation_that_is_too_long_is_cut_at_the_block_as_an_item_is(tmp_path, folders, base):
    artifact = prepared(tmp_path, folders[base], [{"messages": TURNS[:2] + TURNS[:2] * 8}], block_size=100)
    (found,) = documents(PackedDataset(artifact, TRAIN))
    chat = Chat(encoder_of(folders[base]), BASES[base] or DEFAULT.template)
    whole = chat.ids([*TURNS[:2] * 9, TURNS[0]], trained=True)
    assert found[0] == whole[: len(found[0])]
    # a question at the end teaches nothing
    assert found[1][-1] == found[0][-1] != IGNORED


def test_a_first_question_that_fills_a_block_leaves_nothing_to_learn(tmp_path, folders, base):
    long = [{"role": "user", "content": "很长" * 600}, *TURNS[1:]]
    artifact = prepared(tmp_path, folders[base], [{"messages": long}, {"messages": TURNS}])
    assert artifact.manifest.facts["left_out"]["fully_masked"] == 1
    assert artifact.manifest.facts["documents"] == 1


def test_what_the_template_refuses_is_named_with_its_place_and_left_out_on_request(tmp_path, folders):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((folders["llama"] / "tokenizer.model").read_bytes())
    (folder / "chat_template.jinja").write_text(MISTRAL)
    items = [{"messages": TURNS}, {"messages": [SYSTEM, *TURNS]}]
    with pytest.raises(InputError, match=r"items.json: item 2: the model's chat template refuses .*no system text"):
        prepared(tmp_path, folder, items)
    facts = prepared(tmp_path, folder, items, skip_bad=True).manifest.facts
    assert (facts["documents"], facts["left_out"]["bad"]) == (1, 1)
    assert "no system text" in facts["first_bad"][0]
    assert prepared(tmp_path, folder, items, template="alpaca").manifest.facts["documents"] == 2


# --- items of one turn, and the recipe --------------------------------------------------------------------------------

ITEM = {"instruction": "翻译", "input": "good day", "output": "你好"}
SAME = [
    ITEM,
    {"messages": [{"role": "user", "content": "翻译\ngood day"}, {"role": "assistant", "content": "你好"}]},
    {"conversations": [{"from": "human", "value": "翻译\ngood day"}, {"from": "gpt", "value": "你好"}]},
]


@pytest.mark.parametrize("template", ["own", "alpaca"])
def test_an_item_of_one_turn_has_the_same_ids_in_every_form(tmp_path, folders, base, template):
    artifact = prepared(tmp_path, folders[base], SAME, template=template)
    own = BASES[base] if template == "own" else ""
    prompt, (answer,) = Chat(encoder_of(folders[base]), own or DEFAULT.template).answered("翻译\ngood day", ["你好"])
    assert documents(PackedDataset(artifact, TRAIN)) == [(prompt + answer, [IGNORED] * len(prompt) + answer)] * 3
    assert artifact.manifest.facts["splits"]["train"]["columns"] == 2


@pytest.mark.parametrize("text", [DEFAULT.template, RECIPE.template, RECIPE.plain], ids=["ours", "recipe", "0.1"])
def test_what_was_tuned_here_goes_on_with_alpacas_prompt(tmp_path, folders, text):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((folders["llama"] / "tokenizer.model").read_bytes())
    (folder / "chat_template.jinja").write_text(text)
    artifact = prepared(tmp_path, folder, [ITEM])
    assert artifact.manifest.facts["prompt"] == "alpaca-newline"
    assert "chat_template.jinja" not in artifact


def test_the_recipe_has_several_turns_as_its_own_template_has_them(tmp_path, folders):
    artifact = prepared(tmp_path, folders["llama"], [{"messages": TURNS}, ITEM], packing="faithful")
    encoder = encoder_of(folders["llama"])
    chat = Chat(encoder, RECIPE.template)
    first, second = documents(PackedDataset(artifact, TRAIN))
    assert turns_learned(*first) == [
        (chat.ids(TURNS[:at], trained=True), [*encoder.encode(TURNS[at]["content"]), encoder.eos]) for at in (1, 3, 5)
    ]
    prompt = [encoder.bos, *encoder.encode(RECIPE.wrap("翻译\ngood day"))]
    assert second[0] == [*prompt, *encoder.encode("你好"), encoder.eos]
    assert artifact.manifest.facts["prompt"] == "alpaca"


# --- what goes on with it ---------------------------------------------------------------------------------------------


def test_held_out_conversations_are_read_as_they_were(tmp_path, folders, base):
    items = [{"messages": [SYSTEM, {"role": "user", "content": f"问{number}"}, *TURNS[1:]]} for number in range(40)]
    artifact = prepared(tmp_path, folders[base], items, validation_fraction=0.3)
    held = list(read_instructions(artifact))
    assert 0 < len(held) < 40
    assert held[0]["system"] == SYSTEM["content"]
    assert len(held[0]["history"]) == 2
    again = prepared(tmp_path, folders[base], items, validation=artifact.manifest.reference)
    assert again.manifest.facts["left_out"]["in_validation_too"] == len(held)


def test_a_turn_is_shown_as_going_on(tmp_path, folders):
    artifact = prepared(tmp_path, folders["qwen"], [{"messages": TURNS[:4]}])
    ((one, two),) = (block["documents"] for block in as_json(artifact, 1))
    assert (one["begins"], one["goes_on"], one["learned"], one["ends"]) == (True, False, "good  day", True)
    assert (two["begins"], two["goes_on"], two["learned"]) == (False, True, "\n一千二百三十四。")


def test_conversations_of_an_evaluation_are_left_out(tmp_path, folders):
    long = "这是一个很长的问题它里面有十三个以上的汉字"
    items = [{"messages": [{"role": "user", "content": long}, *TURNS[1:2]]}, {"messages": TURNS[:4]}]
    (tmp_path / "exam.json").write_text(json.dumps(items[:1]))
    facts = prepared(tmp_path, folders["qwen"], items, evaluation=str(tmp_path / "exam.json")).manifest.facts
    assert facts["left_out"]["in_evaluation"] == 2 - facts["documents"] == 1


def test_conversations_and_items_are_mixed_by_weight(tmp_path, folders, base):
    single = [{"instruction": f"翻译第{number}句", "output": f"number {number}"} for number in range(200)]
    several = [{"messages": [{"role": "user", "content": f"问{number}"}, *TURNS[1:4]]} for number in range(200)]
    for name, items in (("single", single), ("several", several)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "items.json").write_text(json.dumps(items))
    config = PrepareDataset(
        store=str(tmp_path / "store"), tokenizer=str(folders[base]), block_size=512, validation_fraction=0.1,
        instructions=f"{tmp_path / 'several'}:0.5,{tmp_path / 'single'}:0.5",
    )  # fmt: skip
    artifact = open_artifact(run_stage(config, prepare_dataset).reference)
    first, second = artifact.manifest.facts["sources"]
    assert first["tokens"] / second["tokens"] == pytest.approx(1, abs=0.1)
    chat = Chat(encoder_of(folders[base]), BASES[base] or DEFAULT.template)
    found = [turn for one in documents(PackedDataset(artifact, TRAIN)) for turn in turns_learned(*one)]
    wanted = []
    for item in [*single, *several]:
        messages = item.get("messages") or [
            {"role": "user", "content": item["instruction"]}, {"role": "assistant", "content": item["output"]}
        ]  # fmt: skip
        for at in range(1, len(messages), 2):
            before, (said,) = chat.answered(messages[:at], [messages[at]["content"]])
            wanted.append((before, said))
    assert {str(turn) for turn in found} <= {str(turn) for turn in wanted}
    assert len(found) > 150


def test_a_conversation_that_is_nearly_another_is_left_out_on_request(tmp_path, folders):
    said = [{"role": "user", "content": "请写一首关于春天的长诗，要有花有鸟有风"}, *TURNS[1:4]]
    like = [{"role": "user", "content": "请写一首关于春天的长诗，要有花有鸟有雨"}, *TURNS[1:4]]
    items = [{"messages": said}, {"messages": like}, {"messages": TURNS[2:4]}]
    facts = prepared(tmp_path, folders["qwen"], items, drop_near_duplicates=True).manifest.facts
    assert (facts["documents"], facts["left_out"]["near_duplicates"]) == (2, 1)
