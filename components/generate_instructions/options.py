"""The options of generate_instructions."""

from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import urlsplit

from components.generate_instructions.ledger import Budget
from zhllama.errors import InputError
from zhllama.stage.options import NotKeyed, Ref, Refs, StageOptions

STRUCTURES = ("auto", "schema", "json", "none")


@dataclass(frozen=True, kw_only=True)
class GenerateInstructions(StageOptions):
    """Have an OpenAI-compatible model write instruction data, or import a public data set (--import-from).

    The model's key is read from OPENAI_API_KEY or from the file of --api-key-file. Killed at any moment, the same
    command goes on with the answers that were paid for.
    """

    cache_version: ClassVar[int] = 3
    libraries: ClassVar[tuple[str, ...]] = ("openai", "json-repair", "rapidfuzz")

    items: int = 0
    """Items wanted; 0: as many as --max-cost or --max-tokens buys, or as the data set has."""
    base_url: str = ""
    """The API's address, up to /v1: https://api.openai.com/v1, http://127.0.0.1:8000/v1."""
    model: str = ""
    """The model's name there."""
    import_from: Refs = ""
    """Data sets to import instead of asking a model: Alpaca JSON or JSONL, ShareGPT, Parquet, hf://datasets/…"""
    seeds: Ref = ""
    """Alpaca items that requests show as examples (self-instruct)."""
    against: Refs = ""
    """Alpaca items that count as seen: what is nearly the same is left out."""
    catalogue: Ref = ""
    """A YAML file in place of the project's own: topics, task types, language, lengths, the request's text."""
    max_cost: float = 0
    """What the answers may cost at most, earlier runs included, in the currency of the prices; 0: no limit."""
    max_tokens: int = 0
    """Tokens of prompts and answers that may be bought at most, earlier runs included; 0: no limit."""
    price_prompt: float = -1
    """Of a million prompt tokens; needed for --max-cost and for a cost in the card. With --batch, the Batch API's."""
    price_answer: float = -1
    """Of a million answer tokens."""
    per_request: int = 20
    """Items that one request asks for."""
    answer_tokens: int = 8192
    """Tokens that one answer may have: a request counts with so many until its bill is known."""
    temperature: float = 1.0
    """Of the model's sampling."""
    seed: int = 42
    """Of the topics, task types and examples that are drawn."""
    fruitless: int = 5
    """Empty responses in a row (none with a new item), after which it ends."""
    concurrency: NotKeyed[int] = 16
    """Requests on their way at the same time."""
    requests_per_minute: NotKeyed[float] = 0
    """The account's limit; 0: none. Failed attempts count."""
    tokens_per_minute: NotKeyed[float] = 0
    """The account's limit, prompts and answers together; 0: none."""
    timeout: NotKeyed[float] = 300.0
    """Seconds for one answer, from the first byte sent to the last one read."""
    structured: NotKeyed[str] = "auto"
    """Structured output: schema, json or none; auto: the first of them that the server takes."""
    stream: NotKeyed[bool] = True
    """Answers come piece by piece, so that what came before a lost connection is kept."""
    batch: NotKeyed[bool] = False
    """Use the Batch API: within a day, usually at half the price."""
    batch_poll_seconds: NotKeyed[float] = 60.0
    """Seconds between two looks at a batch."""
    api_key_file: NotKeyed[str] = ""
    """A file that holds the key (a mounted secret), in place of OPENAI_API_KEY."""

    def __post_init__(self) -> None:
        for option, right, rule in (
            ("--items", self.items >= 0, "0 or more"),
            ("--max-cost", 0 <= self.max_cost < float("inf"), "0 or more"),
            ("--max-tokens", self.max_tokens >= 0, "0 or more"),
            ("--price-prompt", self.price_prompt >= 0 or self.price_prompt == -1, "0 or more"),
            ("--price-answer", self.price_answer >= 0 or self.price_answer == -1, "0 or more"),
            ("--per-request", 1 <= self.per_request <= 100, "between 1 and 100"),
            ("--answer-tokens", self.answer_tokens >= 1, "1 or more"),
            ("--fruitless", self.fruitless >= 1, "1 or more"),
            ("--concurrency", 1 <= self.concurrency <= 1000, "between 1 and 1000"),
            ("--requests-per-minute", (pace := self.requests_per_minute) == 0 or pace >= 1, "0 or 1 and more"),
            ("--tokens-per-minute", self.tokens_per_minute >= 0, "0 or more"),
            ("--timeout", self.timeout > 0, "above 0"),
            ("--temperature", 0 <= self.temperature <= 2, "between 0 and 2"),
            ("--batch-poll-seconds", self.batch_poll_seconds > 0, "above 0"),
            ("--structured", self.structured in STRUCTURES, f"one of {', '.join(STRUCTURES)}"),
        ):
            if not right:
                value = getattr(self, option[2:].replace("-", "_"))
                raise InputError(f"generate_instructions: {option} is {value}; it must be {rule}")
        if wrong := self._wrong_together():
            raise InputError(f"generate_instructions: {wrong}")

    def _wrong_together(self) -> str:
        if self.import_from:
            wrong = "--import-from asks no model; leave out --base-url and --model, or import first and give --against"
            return wrong if self.base_url or self.model else ""
        try:
            parts = urlsplit(self.base_url)
            # reading the port is what finds one that is no number, or none that there can be
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            whole = False
        if not whole:
            return f"--base-url {self.base_url} is no address; write http(s)://host/v1, or give --import-from"
        if parts.username or parts.password or parts.query:
            return "--base-url holds a user, a password or a query; put the key into OPENAI_API_KEY or a file"
        if not self.model:
            return "--model is missing; name the model as the server does"
        if not (self.items or self.max_cost or self.max_tokens):
            return "nothing says when to stop; give --items, --max-cost or --max-tokens"
        if self.max_cost and not self.budget.priced:
            return "--max-cost needs prices; give --price-prompt and --price-answer, per million tokens"
        return ""

    @property
    def budget(self) -> Budget:
        return Budget(self.price_prompt, self.price_answer, self.max_cost, self.max_tokens)
