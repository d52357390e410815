"""The prompt: exactly the recipe's, and the chat template renders to the same text."""

import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhllama.tokenizer.prompt import CHAT_TEMPLATE, wrap, wrap_item

RECIPE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
    "\n"
    "### Instruction:\n"
    "讲个笑话\n"
    "\n"
    "### Response: "
)


def render(*messages: tuple[str, str]) -> str:
    """As transformers renders it: a sandbox, blocks trimmed."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(CHAT_TEMPLATE)
    listed = [{"role": role, "content": content} for role, content in messages]
    return template.render(messages=listed, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)


def test_the_prompt_is_the_recipes_to_the_byte():
    assert wrap("讲个笑话") == RECIPE


def test_an_input_follows_the_instruction_after_a_newline():
    assert wrap("翻译", "hello") == wrap("翻译\nhello")
    assert wrap_item({"instruction": "翻译", "input": "hello", "output": "x"}) == wrap("翻译\nhello")
    assert wrap_item({"instruction": "翻译", "input": ""}) == wrap_item({"instruction": "翻译"}) == wrap("翻译")


@given(st.text())
def test_the_chat_template_renders_one_turn_to_the_training_prompt(text):
    assert render(("user", text)) == "<s>" + wrap(text)


@given(st.text(), st.text(), st.text())
def test_turns_are_prompt_answer_and_eos_repeated(first, answer, second):
    rendered = render(("user", first), ("assistant", answer), ("user", second))
    assert rendered == f"<s>{wrap(first)}{answer}</s>{wrap(second)}"


def test_a_system_message_goes_before_the_instruction_it_stands_in_front_of():
    rendered = render(("system", "简短"), ("user", "一"), ("assistant", "二"), ("user", "三"))
    assert rendered == f"<s>{wrap('简短' + chr(10) + '一')}二</s>{wrap('三')}"


@pytest.mark.parametrize("text", ["{{ bos_token }}", "{% for %}", "'\"\\n"])
def test_a_users_text_is_never_read_as_a_template(text):
    assert render(("user", text)) == "<s>" + wrap(text)
