"""The prompt, in one place: training, evaluation, generation and the served chat template all use this text.

Stanford Alpaca's two sentences and the instruction, a non-empty input after a newline; the response starts after
`### Response: ` with its space, as the recipe trains it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zhllama.tokenizer.vocabulary import Encoder

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


def chat_ids(encoder: "Encoder", messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of a conversation as the chat template has it, ending where an answer has to begin. A text is encoded up
    to the next EOS in one piece, a prompt together with its answer, as serving engines encode the rendered template. In
    training the answer was encoded apart: parity is claimed for prompts and for generated ids."""
    ids = [encoder.bos]
    text = system = ""
    for message in messages:
        if message["role"] == "system":
            system = f"{message['content']}\n"
        elif message["role"] == "user":
            text += wrap(system + message["content"])
            system = ""
        else:
            ids += [*encoder.encode(text + message["content"]), encoder.eos]
            text = ""
    return [*ids, *encoder.encode(text)]
