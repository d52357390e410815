"""A conversation has the ids that engines make of the model's own chat template."""

import pytest

from zhllama.errors import InputError
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.fast_tokenizer import tokenizer_files
from zhllama.tokenizer.prompt import CHAT_TEMPLATE, chat_ids
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


@pytest.fixture(scope="module")
def encoder(llama_tokenizer: bytes) -> Encoder:
    """800 pieces and ChatML's two."""
    proto = parse_model(llama_tokenizer)
    for text in ("<|im_start|>", "<|im_end|>"):
        proto.pieces.add(piece=text, score=0.0, type=CONTROL)
    return Encoder(proto.SerializeToString())


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML, "{{ messages[0]['content'] + eos_token }}"])
def test_the_ids_are_those_of_transformers(encoder, tmp_path, template):
    from transformers import AutoTokenizer

    for name, content in tokenizer_files(encoder.model, chat_template=template).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    wanted = tokenizer.apply_chat_template(TURNS, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert Chat(encoder, template).ids(TURNS) == list(wanted)


def test_chatml_begins_and_ends_a_turn_with_its_own_pieces(encoder):
    ids = Chat(encoder, CHATML).ids(TURNS[:1])
    assert ids == [
        800, *encoder.encode("user\n你好, hello"), 801, *encoder.encode("\n"), 800, *encoder.encode("assistant\n"),
    ]  # fmt: skip


def test_the_trainings_template_has_the_ids_of_training(encoder):
    assert Chat(encoder).ids(TURNS) == chat_ids(encoder, TURNS)
    # and rendered as any other is, the same
    assert Chat(encoder, CHAT_TEMPLATE + "{# of a model's own #}").ids(TURNS) == chat_ids(encoder, TURNS)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{% for %}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ x.y.z }}"],
)
def test_a_template_that_refuses_is_an_input_error(encoder, template):
    with pytest.raises(InputError, match=r"the model's chat template refuses this conversation: .+"):
        Chat(encoder, template).ids(TURNS)
