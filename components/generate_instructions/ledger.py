"""What is paid for: prices, limits, and what the journal's lines add up to.

A limit holds for the data set as a whole, earlier runs included, and is never passed: a request is only sent when the
most that it can cost (its bytes as tokens, and the longest answer) fits beside what is charged: *billed* by the server,
*unseen* (sent, and the bill never came: a lost connection, a kill, a server that counts nothing), at the most, or
*open*, on its way, likewise. What the server refused (4xx, 429) or failed to do (5xx) costs nothing.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zhllama.errors import InputError

YIELD = 0.8
"""Of the items that are asked for, how many are usually kept; the estimate's guess until answers have come."""
TOKENS_PER_BYTE, TOKENS_PER_ITEM = 0.3, 220
"""Of Chinese and English prompts and answers with today's tokenizers; the estimate's guess, never the limit's."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of prompts and of answers."""

    prompt: int = 0
    answer: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.prompt, int | float) and isinstance(self.answer, int | float)):
            raise TypeError(f"{self.prompt!r:.20}, {self.answer!r:.20}: no numbers of tokens")

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt + other.prompt, self.answer + other.answer)

    def __mul__(self, times: int) -> "Tokens":
        return Tokens(self.prompt * times, self.answer * times)

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

    @property
    def priced(self) -> bool:
        return self.price_prompt >= 0 and self.price_answer >= 0

    def cost(self, tokens: Tokens) -> float:
        """In the prices' currency; 0 where there are none."""
        return (tokens.prompt * self.price_prompt + tokens.answer * self.price_answer) / 1e6 if self.priced else 0.0

    def stops(self, charged: Tokens, more: Tokens) -> str:
        """Which limit `more` would pass on top of what is charged: "max-cost", "max-tokens", or "" for neither."""
        after = charged + more
        if self.max_cost and self.cost(after) > self.max_cost:
            return "max-cost"
        return "max-tokens" if self.max_tokens and after.total > self.max_tokens else ""

    def said(self, tokens: Tokens) -> str:
        """`12,345 + 67,890 tokens, cost 0.1234`."""
        text = f"{tokens.prompt:,} + {tokens.answer:,} tokens"
        return f"{text}, cost {self.cost(tokens):.4f}" if self.priced else text


def usual(per_request: int, prompt_bytes: int, most_answer: int) -> Tokens:
    """What one request takes, about."""
    return Tokens(math.ceil(prompt_bytes * TOKENS_PER_BYTE), min(most_answer, per_request * TOKENS_PER_ITEM))


def bought(budget: Budget, per_request: int, one: Tokens) -> int:
    """Items that the budget's limits will buy at so many tokens a request, about; 0 where there is none."""
    requests = [budget.max_tokens / one.total] if budget.max_tokens else []
    if budget.max_cost and budget.cost(one):
        requests.append(budget.max_cost / budget.cost(one))
    return int(min(requests, default=0) * per_request * YIELD)


@dataclass
class Batch:
    """A batch of the Batch API: request → attempt, and the server's name for it once known."""

    attempts: Mapping[int, int]
    identity: str = ""


@dataclass
class Ledger:
    """The state that the journal's lines make, old ones when a run begins and new ones as they are written."""

    settled: dict[int, str] = field(default_factory=dict)
    """Requests that need asking no more → what came; nothing of one that was refused."""
    attempts: Counter[int] = field(default_factory=Counter)
    """Request → how often it was sent."""
    billed: Tokens = field(default_factory=Tokens)
    unseen: Tokens = field(default_factory=Tokens)
    open: dict[tuple[int, int], Tokens] = field(default_factory=dict)
    """(request, attempt) → the most that it can cost."""
    failures: Counter[str] = field(default_factory=Counter)
    dialect: Mapping[str, Any] | None = None
    batches: dict[str, Batch] = field(default_factory=dict)
    """Those that have not ended."""
    models: set[str] = field(default_factory=set)
    """What the server says that it is."""
    first: str = ""
    last: str = ""
    """When the first and the last line were written, ISO 8601."""

    @property
    def charged(self) -> Tokens:
        """All that may have to be paid: billed, unseen and open."""
        return sum(self.open.values(), self.billed + self.unseen)

    def apply(self, record: Mapping[str, Any]) -> None:
        """One line, as this program writes it."""
        self.first = self.first or str(record.get("time", ""))
        self.last = str(record.get("time", self.last))
        # whatever ends an attempt frees the most that it could cost
        most = self.open.pop((record.get("request", -1), record.get("attempt", -1)), Tokens())
        match record["event"]:
            case "dialect":
                self.dialect = record["dialect"]
            case "batch planned":
                self.batches[record["batch"]] = Batch({number: attempt for number, attempt, *_ in record["requests"]})
                for sent in record["requests"]:
                    self._sent(*sent)
            case "batch created":
                self.batches[record["batch"]].identity = record["id"]
            case "batch ended":
                self.batches.pop(record["batch"], None)
            case "sent":
                self._sent(*(record[name] for name in ("request", "attempt", "prompt_tokens", "answer_tokens")))
            case "failed":
                self.failures[record["reason"]] += 1
                self.unseen += most * bool(record["may_be_billed"])
            case "answered":
                if record["prompt_tokens"] is None:
                    self.unseen += most
                else:
                    self.billed += Tokens(record["prompt_tokens"], record["answer_tokens"])
                self.models.update(filter(None, [record.get("model")]))
                self.settled.setdefault(record["request"], _text(record["content"]))
            case "given up":
                self.settled.setdefault(record["request"], "")
            case event:
                raise ValueError(f"a journal line of an unknown event {event!r}")

    def _sent(self, number: int, attempt: int, prompt: int, answer: int) -> None:
        self.attempts[number] = max(attempt, self.attempts[number])
        self.open[number, attempt] = Tokens(prompt, answer)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.20}: no text")
    return value


def replayed(records: list[dict[str, Any]]) -> Ledger:
    """The ledger of a journal. What was open when its process ended stays charged, and will never be seen."""
    ledger = Ledger()
    for number, record in enumerate(records, start=1):
        try:
            ledger.apply(record)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            # left out, what it stands for would be paid for again
            said = f"the journal's line {number} ({record['event']:.40}: {error!r:.80}) is damaged or a newer release's"
            raise InputError(f"{said}; go on with the release that wrote it, or give another --seed") from error
    in_batches = {sent for batch in ledger.batches.values() for sent in batch.attempts.items()}
    for sent in ledger.open.keys() - in_batches:
        ledger.unseen += ledger.open.pop(sent)
    return ledger
