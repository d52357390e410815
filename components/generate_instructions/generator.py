"""From options to an artifact: instructions.json, card.json and its page, report.html.

The artifact's place depends on all that decides its items; the answers' place (journal.py) only on what decides the
requests. So `--items 1000`, a look at the card, and `--items 50000` pay for 50,000 items once.
"""

import asyncio
import logging
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from components.generate_instructions import card
from components.generate_instructions.budget import Budget, Tokens, bought, estimated
from components.generate_instructions.catalogue import Catalogue, load_catalogue
from components.generate_instructions.ledger import Ledger, replayed
from components.generate_instructions.request import SCHEMA, Requests
from zhllama import storage
from zhllama.artifacts.manifest import Manifest, digest_of
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.instructions import read_instructions
from zhllama.errors import InputError
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import NotKeyed, Ref, Refs, StageOptions, split_references
from zhllama.stage.run import REPORT

log = logging.getLogger("generate_instructions")

INSTRUCTIONS = "instructions.json"
CARD = "card.json"
STRUCTURES = ("auto", "schema", "json", "none")


@dataclass(frozen=True, kw_only=True)
class GenerateInstructions(StageOptions):
    """Have an OpenAI-compatible model write instruction data, or import a public data set (--import-from).

    The model's key is read from OPENAI_API_KEY or from the file of --api-key-file. Killed at any moment, the same
    command goes on with the answers that were paid for.
    """

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
    """Answers in a row without a new item, after which it ends."""
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
            ("--per-request", 1 <= self.per_request <= 100, "between 1 and 100"),
            ("--answer-tokens", self.answer_tokens >= 1, "1 or more"),
            ("--fruitless", self.fruitless >= 1, "1 or more"),
            ("--concurrency", 1 <= self.concurrency <= 1000, "between 1 and 1000"),
            (
                "--requests-per-minute",
                self.requests_per_minute == 0 or self.requests_per_minute >= 1,
                "0 or 1 and more",
            ),
            ("--tokens-per-minute", self.tokens_per_minute >= 0, "0 or more"),
            ("--timeout", self.timeout > 0, "above 0"),
            ("--temperature", 0 <= self.temperature <= 2, "between 0 and 2"),
            ("--batch-poll-seconds", self.batch_poll_seconds > 0, "above 0"),
            ("--structured", self.structured in STRUCTURES, f"one of {', '.join(STRUCTURES)}"),
        ):
            if not right:
                value = getattr(self, option[2:].replace("-", "_"))
                raise InputError(f"generate_instructions: {option} is {value}; it must be {rule}")
        if self.import_from:
            if self.base_url or self.model:
                raise InputError(
                    "generate_instructions: --import-from asks no model; leave out --base-url and --model, or import "
                    "first and give the result as --against"
                )
            return
        self._check_asking()

    def _check_asking(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            # reading the port is what finds one that is no number, or none that there can be
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            whole = False
        if not whole:
            raise InputError(
                f"generate_instructions: --base-url {self.base_url} is no address; write http(s)://host/v1, or give "
                "--import-from"
            )
        if parts.username or parts.password or parts.query:
            raise InputError(
                "generate_instructions: --base-url holds a user, a password or a query; put the key into "
                "OPENAI_API_KEY or a file"
            )
        if not self.model:
            raise InputError("generate_instructions: --model is missing; name the model as the server does")
        if not (self.items or self.max_cost or self.max_tokens):
            raise InputError(
                "generate_instructions: nothing says when to stop; give --items, --max-cost or --max-tokens"
            )
        # it refuses a cost limit without prices
        _ = self.budget

    @property
    def budget(self) -> Budget:
        return Budget(self.price_prompt, self.price_answer, self.max_cost, self.max_tokens)


def generate_instructions(config: GenerateInstructions, inputs: Inputs, out: ArtifactWriter) -> Manifest:
    """Asks the model, or reads the data sets, and publishes the items, the card and its page."""
    from components.generate_instructions.dedup import Seen, question
    from components.generate_instructions.harvest import Harvest

    catalogue = _catalogue(config)
    seeds = list(read_instructions(open_artifact(config.seeds, "--seeds"))) if config.seeds else []
    seen = Seen()
    for item in (*seeds, *_items_of(config.against, "--against")):
        seen.add(question(item))
    harvest = Harvest(catalogue, seen, config.items)
    made: Mapping[str, Any]
    if config.import_from:
        made = _import(config, harvest)
    else:
        made = _ask(config, catalogue, seeds, harvest, out)
    content = card.card(config, catalogue, harvest, made)
    out.add_json(INSTRUCTIONS, harvest.items)
    out.add_json(CARD, content)
    out.add_bytes(REPORT, card.page(content).encode())
    out.facts["summary"] = card.summary(content)
    out.metrics = card.metrics(content)
    return out.publish("instructions")


def _catalogue(config: GenerateInstructions) -> Catalogue:
    if not config.catalogue:
        return load_catalogue()
    artifact = open_artifact(config.catalogue, "--catalogue")
    names = [name for name in artifact.names if name.endswith((".yaml", ".yml"))]
    if len(names) != 1:
        raise InputError(f"--catalogue {config.catalogue}: {len(names)} YAML files there; give one")
    return load_catalogue(artifact.read(names[0]), f"--catalogue {config.catalogue}")


def _items_of(references: str, option: str) -> Iterator[Mapping[str, str]]:
    for reference in split_references(references):
        yield from read_instructions(open_artifact(reference, option))


def _import(config: GenerateInstructions, harvest: Any) -> Mapping[str, Any]:
    from components.generate_instructions.importer import import_items

    forms: dict[str, int] = {}
    sources: list[Artifact] = [open_artifact(given, "--import-from") for given in split_references(config.import_from)]
    for source in sources:
        for form, count in import_items(source, harvest).items():
            forms[form] = forms.get(form, 0) + count
    if not harvest.items:
        fell = (
            ", ".join(f"{count:,} {rule}" for rule, count in harvest.fallen.items() if count) or "there are no records"
        )
        raise InputError(f"generate_instructions: --import-from {config.import_from}: no item is left ({fell})")
    return {"source": "import", "records": forms, "ended": "items" if harvest.full else "all records"}


def _ask(
    config: GenerateInstructions, catalogue: Catalogue, seeds: list[dict[str, str]], harvest: Any, out: ArtifactWriter
) -> Mapping[str, Any]:
    from components.generate_instructions.asking import Stopped
    from components.generate_instructions.journal import Journal

    requests = Requests(catalogue, config.per_request, seeds, config.seed)
    place = storage.join(
        storage.normalise(config.store), f"generate_instructions/answers/{_requests_key(config, requests)}"
    )
    most = Tokens(requests[0].most_prompt_tokens, config.answer_tokens)
    if limit := config.budget.stops(Tokens(), most):
        raise InputError(
            f"generate_instructions: --{limit} holds no request: one may take {config.budget.said(most)}; raise it, or "
            "lower --answer-tokens and --per-request"
        )
    with Journal(place) as journal:
        ledger = replayed(journal.records)
        _announce(config, requests, ledger)
        try:
            asking = asyncio.run(_run(config, requests, journal, ledger, harvest))
        except Stopped as stopped:
            # now that what was on its way has been kept, the signal does what it always does
            signal.raise_signal(stopped.signum)
            raise
        finally:
            log.info("the answers are in %s: %s so far", place, config.budget.said(ledger.charged))
    if not harvest.items:
        samples = "; ".join(f"{rule}: {texts[0]!r}" for rule, texts in harvest.samples.items() if texts)
        raise InputError(
            f"generate_instructions: {config.model} gave no usable item in {asking.taken} requests; its last answer "
            f"begins {asking.last_answer[:120]!r}{'; ' + samples if samples else ''}; choose another --model, or, if "
            f"the server has been mended, another --seed: these answers are kept in {place}"
        )
    if asking.ended != "items" and config.items:
        log.warning(
            "only %d of %d items: %s", len(harvest.items), config.items,
            f"{config.fruitless} answers in a row gave nothing new" if asking.ended == "fruitless"
            else f"--{asking.ended} holds no further request",
        )  # fmt: skip
    return {
        "source": "model",
        "ended": asking.ended,
        "answers": len(ledger.settled),
        "attempts": sum(ledger.attempts.values()),
        "failures": dict(sorted(ledger.failures.items())),
        "billed": ledger.billed,
        "charged": ledger.charged,
        "models": sorted(ledger.models),
        "dialect": dict(ledger.dialect or {}),
        "first": ledger.first,
        "last": ledger.last,
    }


async def _run(config: GenerateInstructions, requests: Requests, journal: Any, ledger: Ledger, harvest: Any) -> Any:
    from components.generate_instructions.asking import Asking, Pace
    from components.generate_instructions.batch_api import Batches
    from components.generate_instructions.client import Api, Dialect, key_of

    pace = Pace(config.concurrency, config.requests_per_minute, config.tokens_per_minute, config.fruitless)
    dialect = Dialect(structure="schema" if config.structured == "auto" else config.structured, stream=config.stream)
    if ledger.dialect is not None:
        dialect = Dialect(**ledger.dialect)
    api = Api(
        config.base_url, config.model, key_of(config.api_key_file), config.timeout, config.temperature,
        config.answer_tokens,
    )  # fmt: skip
    async with api:
        batches = Batches(config.batch, config.batch_poll_seconds)
        asking = Asking(api, requests, journal, ledger, config.budget, harvest, pace, dialect, batches)
        await asking.run()
    return asking


def _requests_key(config: GenerateInstructions, requests: Requests) -> str:
    """The name of the answers: the digest of all that decides what is asked."""
    value = {
        "base_url": config.base_url.rstrip("/"),
        "model": config.model,
        "temperature": config.temperature,
        "answer_tokens": config.answer_tokens,
        "per_request": config.per_request,
        "seed": config.seed,
        "schema": SCHEMA,
        "request": requests.catalogue.request,
        "language": requests.catalogue.language,
        "asked": dict(requests.catalogue.asked),
        "topics": list(requests.catalogue.topics),
        "task_types": list(requests.catalogue.task_types),
        "seeds": [dict(item) for item in requests.seeds],
        "first": requests[0].messages,
    }
    return digest_of(value)[:32]


def _announce(config: GenerateInstructions, requests: Requests, ledger: Ledger) -> None:
    """What it will cost, about, before anything is sent."""
    budget = config.budget
    if ledger.settled:
        log.info(
            "%d answers are here already (%s); they are not asked for again",
            len(ledger.settled), budget.said(ledger.charged),
        )  # fmt: skip
    size = sum(len(message["content"].encode()) for message in requests[0].messages)
    shape = config.per_request, size, config.answer_tokens
    if config.items:
        count, tokens = estimated(config.items, *shape)
        priced = "" if budget.priced else " (give --price-prompt and --price-answer for a cost)"
        log.info(
            "estimate for %s items: %s requests, %s%s", f"{config.items:,}", f"{count:,}", budget.said(tokens), priced
        )
    elif items := bought(budget, *shape):
        log.info("estimate: the limits buy about %s items", f"{items:,}")
    limits = []
    if config.max_cost:
        limits.append(f"cost {config.max_cost:g}")
    if config.max_tokens:
        limits.append(f"{config.max_tokens:,} tokens")
    if limits:
        log.info("never more than %s", " or ".join(limits))
