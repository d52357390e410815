"""The prompts: the recipe's to the byte, the taught one with a newline, and chat templates that render to both."""

import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhllama.tokenizer import rendering
from zhllama.tokenizer.prompt import BY_TEMPLATE, DEFAULT, PROMPTS, RECIPE, Prompt, question_of

TEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
    "\n"
    "### Instruction:\n"
    "讲个笑话\n"
    "\n"
    "### Response:"
)
OF_RELEASE_0_1 = (
    "{{ bos_token }}{% set found = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set found.system = message['content'] + '\\n' %}"
    "{% elif message['role'] == 'user' %}{{ 'Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\\n\\n### Instruction:\\n' + found.system + message['content'] + "
    "'\\n\\n### Response: ' }}{% set found.system = '' %}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)

every_prompt = pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)


def render(prompt: Prompt, *messages: tuple[str, str]) -> str:
    """As an engine with plain jinja2 renders it, which has to be what transformers makes of the marked template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    listed = [{"role": role, "content": content} for role, content in messages]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    text = environment.from_string(prompt.plain).render(messages=listed, **names, add_generation_prompt=True)
    assert text == rendering.render(prompt.template, listed, names)
    return text


def test_the_prompts_are_the_recipes_to_the_byte_and_the_same_with_a_newline():
    assert RECIPE.wrap("讲个笑话") == f"{TEXT} "
    assert DEFAULT.wrap("讲个笑话") == f"{TEXT}\n"


def test_the_recipes_template_is_the_one_of_release_0_1_but_for_markers():
    assert RECIPE.plain == OF_RELEASE_0_1
    assert RECIPE.template.replace("{% generation %}", "").replace("{% endgeneration %}", "") == OF_RELEASE_0_1
    assert [BY_TEMPLATE[one.template] for one in (DEFAULT, RECIPE)] == [
        BY_TEMPLATE[one.plain] for one in (DEFAULT, RECIPE)
    ]


def test_an_input_follows_the_instruction_after_a_newline():
    assert question_of({"instruction": "翻译", "input": "hello", "output": "x"}) == "翻译\nhello"
    assert question_of({"instruction": "翻译", "input": ""}) == question_of({"instruction": "翻译"}) == "翻译"


@every_prompt
@given(text=st.text())
def test_the_chat_template_renders_one_turn_to_the_training_prompt(prompt, text):
    assert render(prompt, ("user", text)) == "<s>" + prompt.wrap(text)


@every_prompt
@given(first=st.text(), answer=st.text(), second=st.text())
def test_turns_are_prompt_answer_and_eos_repeated(prompt, first, answer, second):
    rendered = render(prompt, ("user", first), ("assistant", answer), ("user", second))
    assert rendered == f"<s>{prompt.wrap(first)}{answer}</s>{prompt.wrap(second)}"


@every_prompt
def test_a_system_message_goes_before_the_instruction_it_stands_in_front_of(prompt):
    rendered = render(prompt, ("system", "简短"), ("user", "一"), ("assistant", "二"), ("user", "三"))
    assert rendered == f"<s>{prompt.wrap('简短' + chr(10) + '一')}二</s>{prompt.wrap('三')}"


@every_prompt
@pytest.mark.parametrize("text", ["{{ bos_token }}", "{% for %}", "'\"\\n"])
def test_a_users_text_is_never_read_as_a_template(prompt, text):
    assert render(prompt, ("user", text)) == "<s>" + prompt.wrap(text)
