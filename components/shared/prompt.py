"""The prompt, in one place: training, evaluation, generation and the served chat template all use this text.

Stanford Alpaca's two sentences, then the instruction; the response starts after `### Response: ` with its space, as
the recipe trains it. A non-empty input follows the instruction after a newline.
"""

from collections.abc import Mapping

_BEFORE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
_AFTER = "\n\n### Response: "


def wrap(instruction: str, extra: str = "") -> str:
    """The training prompt of one instruction (and its input, if any)."""
    return f"{_BEFORE}{instruction}\n{extra}{_AFTER}" if extra else f"{_BEFORE}{instruction}{_AFTER}"


def wrap_item(item: Mapping[str, str]) -> str:
    """The training prompt of an Alpaca item."""
    return wrap(item["instruction"], item.get("input", ""))


CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set found = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set found.system = message['content'] + '\\n' %}"
    "{% elif message['role'] == 'user' %}"
    "{{ " + repr(_BEFORE) + " + found.system + message['content'] + " + repr(_AFTER) + " }}{% set found.system = '' %}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
"""Jinja, for tokenizer_config.json: prompt + answer + EOS, repeated. It ends where an answer has to begin. A system
message, which the recipe has not, goes before the instruction it stands in front of."""
