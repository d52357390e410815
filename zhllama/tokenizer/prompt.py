"""The prompt, in one place: training, evaluation, generation and the served chat template all use this text.

Stanford Alpaca's two sentences and the instruction, a non-empty input after a newline; then `### Response:` and what
separates it from the answer. The recipe has a space there and encodes the answer on its own: the prompt's last piece
and the answer's first are both ▁. No engine makes that of the text, so in a history the ids are not those of training,
and the answer begins with a space on vLLM and llama.cpp, on transformers not. What is taught by default has a newline,
and prompt and answer are encoded as one text: SentencePiece puts a ▁ before a text only where it begins, and no piece
of a LLaMA-shaped vocabulary spans a newline, so the answer's pieces follow the prompt's with no ▁ of their own. Of
4,000 answers, Chinese, English and code, with a question before and behind them, the ids of the rendered text were
those of training for none with the recipe's prompt, and for all with a newline.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_BEFORE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
_AFTER = "\n\n### Response:"


def question_of(item: Mapping[str, str]) -> str:
    """What a user says who asks an Alpaca item: the instruction, and its input after a newline."""
    return f"{item['instruction']}\n{extra}" if (extra := item.get("input", "")) else item["instruction"]


@dataclass(frozen=True)
class Prompt:
    """What stands around an instruction."""

    name: str
    """In manifests (zhllama/weights/chat_template.py)."""
    title: str
    separator: str
    """Between `### Response:` and the answer."""

    def wrap(self, text: str) -> str:
        """What a model reads that is asked `text`, but for BOS."""
        return f"{_BEFORE}{text}{_AFTER}{self.separator}"

    @property
    def template(self) -> str:
        """Jinja, for tokenizer_config.json: prompt + answer + EOS, repeated. It ends where an answer has to begin. A
        system message, which the recipe has not, goes before the instruction it stands in front of. Answers and their
        EOS stand between markers, by which transformers' users (trl) find what is to be learned."""
        return self._template("{% generation %}", "{% endgeneration %}")

    @property
    def plain(self) -> str:
        """The template without markers, which not every engine's jinja knows."""
        return self._template("", "")

    def _template(self, begin: str, end: str) -> str:
        return (
            "{{ bos_token }}"
            "{% set found = namespace(system='') %}"
            "{% for message in messages %}"
            "{% if message['role'] == 'system' %}{% set found.system = message['content'] + '\\n' %}"
            "{% elif message['role'] == 'user' %}"
            f"{{{{ {_BEFORE!r} + found.system + message['content'] + {_AFTER + self.separator!r} }}}}"
            "{% set found.system = '' %}"
            f"{{% elif message['role'] == 'assistant' %}}{begin}{{{{ message['content'] + eos_token }}}}{end}"
            "{% endif %}{% endfor %}"
        )


DEFAULT = Prompt("alpaca-newline", "Alpaca's with a newline before the answer", "\n")
RECIPE = Prompt("alpaca", "Alpaca's", " ")
"""Of `prepare_dataset --packing faithful`, of whatever says nothing else, and of models without a template."""
PROMPTS = {prompt.name: prompt for prompt in (DEFAULT, RECIPE)}
BY_TEMPLATE = {template: prompt for prompt in PROMPTS.values() for template in (prompt.template, prompt.plain)}
AS_IS = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""The template of a model that reads what it is asked as it is."""
