"""A conversation has the ids that engines make of the model's own chat template; asked as in training, training's."""

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from zhllama.errors import InputError
from zhllama.tokenizer import rendering
from zhllama.tokenizer.chat import Chat, _Renderer, asked
from zhllama.tokenizer.prompt import AS_IS, DEFAULT, PROMPTS, RECIPE, question_of
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import CONTROL, parse_model
from zhllama.tokenizer.vocabulary import Encoder

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "user", "content": "你好, hello"},
    {"role": "assistant", "content": "good  day"},
    {"role": "user", "content": " bye"},
]
LITERAL = [
    {"role": "user", "content": "a </s>b<s> c<unk>"},
    {"role": "assistant", "content": "</s>"},
    {"role": "user", "content": "<|im_end|>\nx"},
]


@pytest.fixture(scope="module")
def encoder(llama_tokenizer: bytes) -> Encoder:
    """800 pieces and ChatML's two."""
    proto = parse_model(llama_tokenizer)
    for text in ("<|im_start|>", "<|im_end|>"):
        proto.pieces.add(piece=text, score=0.0, type=CONTROL)
    return SentencePieceEncoder(proto.SerializeToString())


def auto(encoder: Encoder, folder: Path, template: str) -> Any:
    from transformers import AutoTokenizer

    for name, content in encoder.files(template=template).items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "template",
    [CHATML, "{{ bos_token }}" + CHATML, "{{ messages[0]['content'] + eos_token }}", DEFAULT.template, RECIPE.template],
    ids=["chatml", "bos and chatml", "eos", "taught", "recipe"],
)
@pytest.mark.parametrize("turns", [TURNS[:1], TURNS, LITERAL], ids=["one", "three", "special tokens in texts"])
def test_the_ids_are_those_of_transformers(encoder, tmp_path, template, turns):
    tokenizer = auto(encoder, tmp_path, template)
    wanted = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert Chat(encoder, template).ids(turns) == list(wanted)


def test_chatml_begins_and_ends_a_turn_with_its_own_pieces(encoder):
    ids = Chat(encoder, CHATML).ids(TURNS[:1])
    assert ids == [
        800, *encoder.encode("user\n你好, hello"), 801, *encoder.encode("\n"), 800, *encoder.encode("assistant\n"),
    ]  # fmt: skip


# --- as in training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [TURNS, LITERAL], ids=["plain", "special tokens in texts"])
def test_what_is_taught_has_in_a_history_the_ids_of_training(encoder, turns):
    first, answer, second = (turn["content"] for turn in turns)
    one = [*encoder.encode(DEFAULT.wrap(first) + answer), encoder.eos]
    two = encoder.encode(DEFAULT.wrap(second))
    assert Chat(encoder, DEFAULT.template).ids(turns, trained=True) == [encoder.bos, *one, *two]


@pytest.mark.parametrize("turns", [TURNS, LITERAL], ids=["plain", "special tokens in texts"])
def test_the_recipes_answers_are_encoded_on_their_own(encoder, turns):
    first, answer, second = (turn["content"] for turn in turns)
    one = [*encoder.encode(RECIPE.wrap(first)), *encoder.encode(answer), encoder.eos]
    two = encoder.encode(RECIPE.wrap(second))
    assert Chat(encoder, RECIPE.template).ids(turns, trained=True) == [encoder.bos, *one, *two]
    assert Chat(encoder, RECIPE.plain).ids(turns, trained=True) == [encoder.bos, *one, *two]
    as_it_is = [*encoder.encode(first), *encoder.encode(answer), encoder.eos, *encoder.encode(second)]
    assert Chat(encoder, AS_IS).ids(turns, trained=True) == [encoder.bos, *as_it_is]


@given(text=st.text(), answer=st.text())
def test_without_special_tokens_engines_read_what_is_taught_as_training_does(encoder, text, answer):
    chat = Chat(encoder, DEFAULT.template)
    turns = [*asked(text), {"role": "assistant", "content": answer}, *asked("x")]
    if not any(special in text + answer for special in chat.encoder.special):
        assert chat.ids(turns) == chat.ids(turns, trained=True)


@pytest.mark.parametrize("template", [CHATML, DEFAULT.template], ids=["chatml", "taught"])
def test_an_answer_follows_its_prompt_in_one_text(encoder, template):
    prompt, (one, two) = Chat(encoder, template).answered("你好", ["The end", ""])
    assert encoder.pieces[one[0]].startswith("T")
    # as the template has it: who is asked by ChatML has learnt its end, not EOS
    end = 801 if template == CHATML else encoder.eos
    assert (encoder.decode(one[:-1]), one[-1], two) == ("The end", end, [end])
    whole = Chat(encoder, template).ids([*asked("你好"), {"role": "assistant", "content": "The end"}], trained=True)
    assert whole[: len(prompt + one)] == prompt + one


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ bos_token + m.content }}{% endfor %}",
        "{{ messages | length == 1 and messages[0].content or raise_exception('one question') }}",
    ],
    ids=["no end", "the next one's beginning", "refused"],
)
def test_an_answer_that_the_template_does_not_end_ends_at_eos(encoder, template):
    _, (one,) = Chat(encoder, template).answered("你好", ["The end"])
    assert one[-1] == encoder.eos


THOUGHT = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
THOUGHT += "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
THOUGHT += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "gap"),
    [
        (CHATML, ""),
        (CHATML.replace("message['content'] +", "' ' + message['content'] +"), " "),
        (THOUGHT, ""),
        (THOUGHT.replace("<think>", "<unk>"), ""),
    ],
    ids=["none", "a space", "a thought", "a thought that begins with a special token"],
)
def test_of_what_a_template_writes_before_an_answer_white_space_is_the_answers(encoder, template, gap):
    prompt, (one,) = Chat(encoder, template).answered("你好", ["The end"])
    text = "assistant\n"
    assert prompt[-len(encoder.encode(text)) :] == encoder.encode(text)
    assert one == [*encoder.encode(f"{text}{gap}The end")[len(encoder.encode(text)) :], 801]


def test_the_recipes_answer_begins_with_a_space_of_its_own(encoder):
    prompt, (one,) = Chat(encoder, RECIPE.template).answered("你好", ["The end"])
    assert prompt == [encoder.bos, *encoder.encode(RECIPE.wrap("你好"))]
    assert one == [*encoder.encode("The end"), encoder.eos]
    assert encoder.pieces[one[0]].startswith("▁")


@pytest.fixture(scope="module")
def vocabularies(english_text, tmp_path_factory) -> dict[str, Encoder]:
    """SentencePiece models of other kinds than LLaMA's."""
    kinds = {
        "no byte fallback": {"byte_fallback": False},
        "newline to space": {
            "byte_fallback": True,
            "normalization_rule_name": "nmt_nfkc",
            "remove_extra_whitespaces": True,
        },
        "newline to a space that stays": {"byte_fallback": True, "normalization_rule_name": "nmt_nfkc"},
        "newline as a piece": {"byte_fallback": True, "user_defined_symbols": ["\n"]},
        "newlines as a piece": {"byte_fallback": True, "user_defined_symbols": ["\n\n"]},
    }
    found = {}
    for number, (kind, options) in enumerate(kinds.items()):
        prefix = tmp_path_factory.mktemp("kinds") / str(number)
        more = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False} | options
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(english_text[:2000]), model_prefix=str(prefix), vocab_size=700, model_type="bpe",
            character_coverage=1.0, minloglevel=2, **more,
        )  # fmt: skip
        found[kind] = SentencePieceEncoder(prefix.with_suffix(".model").read_bytes())
    return found


@pytest.mark.parametrize("kind", ["no byte fallback", "newline to space", "newline as a piece", "newlines as a piece"])
def test_in_other_vocabularies_the_prompt_begins_prompt_and_answer(vocabularies, kind):
    encoder = vocabularies[kind]
    for answer in ("The end", "正面", " x", "<unk>", "龘"):
        before, whole = encoder.encode(DEFAULT.wrap("Hello")), encoder.encode(DEFAULT.wrap("Hello") + answer)
        assert whole[: len(before)] == before
        prompt, (said,) = Chat(encoder, DEFAULT.template).answered("Hello", [answer])
        assert prompt + said == [encoder.bos, *whole, encoder.eos]


def test_where_a_piece_would_span_prompt_and_answer_these_are_encoded_apart(vocabularies):
    from components.prepare_dataset.examples import instruction_examples

    encoder = vocabularies["newline to a space that stays"]
    items = [{"instruction": "Hello", "input": "", "output": answer} for answer in ("", "The end")]
    (batch,) = instruction_examples([*items, *items], encoder, 512, DEFAULT)
    found = np.split(batch.segments.ids, batch.segments.lengths.cumsum()[:-1])
    for ids, prompt, item in zip(found, batch.segments.prompts, [*items, *items], strict=True):
        asked, (said,) = Chat(encoder, DEFAULT.template).answered("Hello", [item["output"]])
        assert ids.tolist() == asked + said
        assert prompt == len(asked)
    _, (said,) = Chat(encoder, DEFAULT.template).answered("Hello", ["The end"])
    assert said == [*encoder.encode("The end"), encoder.eos]


# --- what is learned, as transformers' users find it ------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
def test_the_mask_of_the_answers_covers_them_and_their_eos_in_every_turn(encoder, tmp_path, name):
    prompt = PROMPTS[name]
    turns = [*asked("你好"), {"role": "assistant", "content": "good day"}]
    turns += [*asked("again"), {"role": "assistant", "content": "正面"}]
    made = auto(encoder, tmp_path, prompt.template).apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = np.array(made["input_ids"]), np.array(made["assistant_masks"], bool)
    assert ids.tolist() == Chat(encoder, prompt.template).ids(turns)
    learned = [encoder.decode(part[:-1]) for part in np.split(ids[mask], np.flatnonzero(ids[mask] == encoder.eos) + 1)]
    assert [text.strip() for text in learned] == ["good day", "正面", ""]
    assert (ids[mask] == encoder.eos).sum() == 2


def test_the_mask_of_what_is_taught_is_the_labels_that_are_packed(encoder, tmp_path):
    from components.prepare_dataset.examples import instruction_examples

    items = [
        {"instruction": "评价", "input": "很好", "output": "正面"},
        {"instruction": "Say", "input": "", "output": "The end"},
        {"instruction": "Say", "input": "a", "output": "\n x"},
    ]
    (batch,) = instruction_examples(items, encoder, 512, DEFAULT)
    tokenizer = auto(encoder, tmp_path, DEFAULT.template)
    for at, item in enumerate(items):
        example = batch.part(at, at + 1).segments
        turns = [*asked(question_of(item)), {"role": "assistant", "content": item["output"]}]
        made = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        assert made["input_ids"] == example.ids.tolist()
        prompt = int(example.prompts[0])
        assert made["assistant_masks"] == [0] * prompt + [1] * (len(example.ids) - prompt)


# --- text and ids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["</s>", "a</s> b", "<s><unk>", "你好<|im_end|>\n", "", "  x  "])
def test_text_is_encoded_and_decoded_as_transformers_does(encoder, tmp_path, text):
    tokenizer, chat = auto(encoder, tmp_path, CHATML), Chat(encoder, CHATML)
    ids = tokenizer(text)["input_ids"]
    assert [encoder.bos, *chat.encode(text)] == ids
    assert chat.decode(ids) == tokenizer.decode(ids)
    assert chat.decode(ids[1:]) == tokenizer.decode(ids[1:])


@given(ids=st.lists(st.integers(0, 801) | st.integers(3, 258), max_size=12))
def test_any_ids_are_decoded_as_transformers_does(encoder, tmp_path_factory, ids):
    if "tokenizer" not in _MADE:
        _MADE["tokenizer"] = auto(encoder, tmp_path_factory.mktemp("auto"), CHATML)
    assert Chat(encoder, CHATML).decode(ids) == _MADE["tokenizer"].decode(ids)


_MADE: dict[str, Any] = {}


@pytest.mark.parametrize("index", [-1, 802])
def test_what_is_no_id_is_an_input_error(encoder, index):
    with pytest.raises(InputError, match=f"{index} is no id: there are 802 pieces"):
        Chat(encoder).decode([5, index])


# --- templates that refuse, and that never end ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ x.y.z }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 'a' * 20000000 }}",
        "{% if tools %}{{ messages }}{% endif %}",
    ],
)
def test_a_template_that_refuses_is_an_input_error(encoder, template):
    with pytest.raises(InputError, match=r"the model's chat template refuses this conversation: .+"):
        Chat(encoder, template).ids(TURNS)


def test_a_template_that_never_ends_is_an_input_error_and_the_next_conversation_is_answered(encoder, monkeypatch):
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    begin = time.monotonic()
    with pytest.raises(InputError, match="refuses this conversation: it does not end within 5 s"):
        Chat(encoder, endless).ids(TURNS)
    assert time.monotonic() - begin < 60
    assert Chat(encoder, CHATML).text(TURNS[:1]).endswith("<|im_start|>assistant\n")


def test_a_conversation_that_was_interrupted_or_whose_process_was_killed_is_not_the_next_ones_answer():
    renderer, template = _Renderer(), "{% for i in range(messages[0].content | int) %}{% endfor %}{{ messages }}"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def said(count: str) -> str:
        return renderer(template * 30, asked(count), {})

    assert "'1'" in said("1")
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(KeyboardInterrupt):
            said("100000")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "'2'" in said("2")
    assert renderer._process is not None
    renderer._process.kill()
    renderer._process.wait()
    assert "'3'" in said("3")


def test_what_is_taught_is_rendered_without_another_process(encoder, monkeypatch):
    monkeypatch.setattr("zhllama.tokenizer.chat._renderer", None)
    assert Chat(encoder, DEFAULT.template).read("x") == DEFAULT.wrap("x")
    assert rendering.render(DEFAULT.plain, asked("x"), {"bos_token": ""}) == DEFAULT.wrap("x")


# --- what fits --------------------------------------------------------------------------------------------------------


def test_turns_that_do_not_fit_are_forgotten_oldest_first(encoder):
    chat = Chat(encoder, DEFAULT.template)
    turns = [*asked("a" * 30), {"role": "assistant", "content": "b" * 30}] * 3
    whole = [*turns, *asked("再见")]
    kept = chat.fitting(whole, len(chat.ids(whole)) + 40, 50)
    assert kept == whole[2:]
    assert chat.fitting(whole, len(chat.ids(whole)) + 50, 50) == whole


def test_a_message_that_fits_nowhere_forgets_nothing(encoder):
    whole = [*asked("a"), {"role": "assistant", "content": "b"}, *asked("长" * 100)]
    assert Chat(encoder, DEFAULT.template).fitting(whole, 60, 10) == whole
