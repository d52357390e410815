"""What the journal's lines add up to: which requests are settled, what was charged, and what is still open.

One fold, over old lines when a run begins and over new ones as they are written, so that a run that goes on counts
exactly as the one before it. Three kinds of charge: *billed*, as the server counted; *unseen*, requests that were sent
and whose bill never came (a lost connection, a time-out, a process that was killed, a server that counts nothing),
taken at the most they can have cost; *open*, on their way right now, likewise. What the server refused (4xx, 429) or
failed to do (5xx) costs nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from components.generate_instructions.budget import Tokens


@dataclass
class Batch:
    """A batch of the Batch API: the attempts in it, the server's name for it once known."""

    attempts: Mapping[int, int]
    """Request → attempt."""
    identity: str = ""


@dataclass
class Ledger:
    """The state that the lines make. `apply` takes one line."""

    settled: dict[int, str] = field(default_factory=dict)
    """Requests that need asking no more → what came; nothing of one that was refused."""
    attempts: dict[int, int] = field(default_factory=dict)
    """Request → how often it was sent."""
    billed: Tokens = field(default_factory=Tokens)
    unseen: Tokens = field(default_factory=Tokens)
    open: dict[tuple[int, int], Tokens] = field(default_factory=dict)
    """(request, attempt) → the most that it can cost."""
    failures: dict[str, int] = field(default_factory=dict)
    """Why attempts failed → how often."""
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
        event = record["event"]
        if event == "dialect":
            self.dialect = record["dialect"]
        elif event == "batch planned":
            self.batches[record["batch"]] = Batch({number: attempt for number, attempt, *_ in record["requests"]})
            for number, attempt, prompt, answer in record["requests"]:
                self._sent(number, attempt, Tokens(prompt, answer))
        elif event == "batch created":
            self.batches[record["batch"]].identity = record["id"]
        elif event == "batch ended":
            self.batches.pop(record["batch"], None)
        elif event == "sent":
            most = Tokens(record["prompt_tokens"], record["answer_tokens"])
            self._sent(record["request"], record["attempt"], most)
        else:
            self._ended(event, record["request"], record["attempt"], record)

    def _sent(self, number: int, attempt: int, most: Tokens) -> None:
        self.attempts[number] = max(attempt, self.attempts.get(number, 0))
        self.open[number, attempt] = most

    def _ended(self, event: str, number: int, attempt: int, record: Mapping[str, Any]) -> None:
        most = self.open.pop((number, attempt), Tokens())
        if event == "failed":
            self.failures[record["reason"]] = self.failures.get(record["reason"], 0) + 1
            if record["may_be_billed"]:
                self.unseen += most
        elif event == "answered":
            if record["prompt_tokens"] is None:
                self.unseen += most
            else:
                self.billed += Tokens(record["prompt_tokens"], record["answer_tokens"])
            if record.get("model"):
                self.models.add(record["model"])
            self.settled.setdefault(number, record["content"])
        elif event == "given up":
            self.settled.setdefault(number, "")
        else:
            raise ValueError(f"a journal line of an unknown event {event!r}")


def replayed(records: list[dict[str, Any]]) -> Ledger:
    """The ledger of a journal. What was open when its process ended stays open: charged, and never to be seen."""
    ledger = Ledger()
    for record in records:
        ledger.apply(record)
    in_batches = {(number, attempt) for batch in ledger.batches.values() for number, attempt in batch.attempts.items()}
    for key in [key for key in ledger.open if key not in in_batches]:
        ledger.unseen += ledger.open.pop(key)
    return ledger
