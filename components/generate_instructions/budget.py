"""What it costs: prices, the limits of a run, and the estimate before it starts.

A limit holds for the data set as a whole, earlier runs included, and is never passed: a request is only sent when the
most that it can cost (its bytes as tokens, and the longest answer) fits beside what was charged and what is on its
way. When its bill comes, the rest is free again.
"""

import math
from dataclasses import dataclass

from zhllama.errors import InputError

YIELD = 0.8
"""Of the items that are asked for, how many are usually kept; the estimate's guess until answers have come."""
TOKENS_PER_BYTE = 0.3
"""Chinese and English prompts with today's tokenizers; the estimate's guess, never the limit's."""
TOKENS_PER_ITEM = 220
"""Of an answer, likewise."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of prompts and of answers."""

    prompt: int = 0
    answer: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt + other.prompt, self.answer + other.answer)

    def __sub__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt - other.prompt, self.answer - other.answer)

    def __mul__(self, times: float) -> "Tokens":
        return Tokens(math.ceil(self.prompt * times), math.ceil(self.answer * times))

    @property
    def total(self) -> int:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Budget:
    """Prices per million tokens, in any currency, negative when unknown; limits, 0 for none."""

    price_prompt: float = -1
    price_answer: float = -1
    max_cost: float = 0
    max_tokens: int = 0

    def __post_init__(self) -> None:
        if self.max_cost and not self.priced:
            raise InputError(
                "generate_instructions: --max-cost needs prices; give --price-prompt and --price-answer, per million "
                "tokens, in the currency of --max-cost"
            )

    @property
    def priced(self) -> bool:
        return self.price_prompt >= 0 and self.price_answer >= 0

    def cost(self, tokens: Tokens) -> float:
        """In the prices' currency; 0 where there are none."""
        if not self.priced:
            return 0.0
        return (tokens.prompt * self.price_prompt + tokens.answer * self.price_answer) / 1e6

    def stops(self, charged: Tokens, more: Tokens) -> str:
        """Which limit `more` would pass on top of what is charged: "max-cost", "max-tokens", or "" for neither."""
        after = charged + more
        if self.max_cost and self.cost(after) > self.max_cost:
            return "max-cost"
        if self.max_tokens and after.total > self.max_tokens:
            return "max-tokens"
        return ""

    def said(self, tokens: Tokens) -> str:
        """`12,345 + 67,890 tokens, cost 0.1234`."""
        text = f"{tokens.prompt:,} + {tokens.answer:,} tokens"
        return f"{text}, cost {self.cost(tokens):.4f}" if self.priced else text


def estimated(items: int, per_request: int, prompt_bytes: int, most_answer: int) -> tuple[int, Tokens]:
    """Requests and tokens that so many items will take, about."""
    requests = math.ceil(items / (per_request * YIELD))
    return requests, _usual(per_request, prompt_bytes, most_answer) * requests


def bought(budget: Budget, per_request: int, prompt_bytes: int, most_answer: int) -> int:
    """Items that the budget's limits will buy, about; 0 where there is none."""
    one = _usual(per_request, prompt_bytes, most_answer)
    requests = []
    if budget.max_tokens:
        requests.append(budget.max_tokens / one.total)
    if budget.max_cost and budget.cost(one):
        requests.append(budget.max_cost / budget.cost(one))
    return int(min(requests, default=0) * per_request * YIELD)


def _usual(per_request: int, prompt_bytes: int, most_answer: int) -> Tokens:
    """What one request takes, about."""
    return Tokens(math.ceil(prompt_bytes * TOKENS_PER_BYTE), min(most_answer, per_request * TOKENS_PER_ITEM))
