"""The loop: ask, read, check, keep what is new, until there are enough items.

One request at a time. What passes (429, 5xx, a lost connection) is tried again after as long as Retry-After says, or
growing waits of up to a minute; what does not pass (401, 403, an unknown model) ends at once. A model that gives
nothing new in `--fruitless` requests in a row ends it too: with what there is, or with exit code 2 where that is none.
"""

import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from components.generate_instructions.answer import items_in
from components.generate_instructions.request import load_catalogue, request
from components.shared.artifact import ArtifactWriter, Manifest, open_artifact
from components.shared.cli import Ref, StageOptions, not_keyed
from components.shared.errors import InputError, StorageFault
from components.shared.instructions import read_instructions
from components.shared.progress import Progress

log = logging.getLogger("generate_instructions")

INSTRUCTIONS = "instructions.json"
ATTEMPTS = 6
"""Of one request, before the server counts as failed."""
LONGEST_WAIT = 60.0
"""Seconds between two attempts, at most."""


@dataclass(frozen=True, kw_only=True)
class GenerateInstructions(StageOptions):
    """Have an OpenAI-compatible model write instruction data. Its key is read from OPENAI_API_KEY."""

    items: int
    """Items to generate."""
    base_url: str
    """The API's address, up to /v1: https://api.openai.com/v1, http://127.0.0.1:8000/v1."""
    model: str
    """The model's name there."""
    seeds: Ref = ""
    """Alpaca items that requests show as examples."""
    per_request: int = 20
    """Items that one request asks for."""
    temperature: float = 1.0
    """Of the model's sampling."""
    seed: int = 42
    """Of the topics and task types that are drawn."""
    timeout: not_keyed(float) = 300.0  # type: ignore[valid-type]
    """Seconds for one request."""
    fruitless: int = 5
    """Requests in a row without a new item, after which it ends."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(
                f"generate_instructions: --base-url {self.base_url} is no address; write http(s)://host/v1"
            )
        if parts.username or parts.password:
            raise InputError(
                "generate_instructions: --base-url holds a user or a password; put the key into OPENAI_API_KEY"
            )
        for option, right, rule in (
            ("--items", self.items >= 1, "1 or more"),
            ("--per-request", 1 <= self.per_request <= 100, "between 1 and 100"),
            ("--fruitless", self.fruitless >= 1, "1 or more"),
            ("--timeout", self.timeout > 0, "above 0"),
            ("--temperature", 0 <= self.temperature <= 2, "between 0 and 2"),
        ):
            if not right:
                value = getattr(self, option[2:].replace("-", "_"))
                raise InputError(f"generate_instructions: {option} is {value}; it must be {rule}")


def generate_instructions(config: GenerateInstructions, out: ArtifactWriter) -> Manifest:
    """Asks until there are `--items` items, and publishes instructions.json."""
    seeds = list(read_instructions(open_artifact(config.seeds, "--seeds"))) if config.seeds else []
    with Api(config) as api:
        harvest = gather(config, seeds, api.complete)
    out.add_json(INSTRUCTIONS, harvest.items)
    out.facts["summary"] = f"{len(harvest.items):,} items from {harvest.requests:,} requests"
    if len(harvest.items) < config.items:
        out.facts["summary"] = f"only {len(harvest.items):,} of {config.items:,} items"
        log.warning(
            "%s gave no new item in %d requests: ending with %s", config.model, config.fruitless, out.facts["summary"]
        )
    out.metrics = {
        "items": len(harvest.items),
        "requests": harvest.requests,
        "duplicates": harvest.duplicates,
        "malformed": harvest.malformed,
    }
    return out.publish("instructions")


@dataclass
class Harvest:
    """What came of it: the items, requests that were answered, items seen before, objects that were no items."""

    items: list[dict[str, str]]
    requests: int = 0
    duplicates: int = 0
    malformed: int = 0


def gather(
    config: GenerateInstructions,
    seeds: Sequence[Mapping[str, str]],
    complete: Callable[[list[dict[str, str]]], str],
) -> Harvest:
    """The loop itself. `complete` sends messages and returns the answer's text. InputError when nothing ever came."""
    catalogue, chance = load_catalogue(), random.Random(config.seed)
    seen = {_identity(item) for item in seeds}
    found = Harvest([])
    fruitless = 0
    with Progress("generating", config.items, "items") as bar:
        while len(found.items) < config.items and fruitless < config.fruitless:
            text = complete(request(catalogue, config.per_request, seeds, chance))
            found.requests += 1
            items, malformed = items_in(text)
            found.malformed += malformed
            before = len(found.items)
            for item in items:
                if _identity(item) in seen:
                    found.duplicates += 1
                elif len(found.items) < config.items:
                    seen.add(_identity(item))
                    found.items.append(item)
            bar.advance(len(found.items) - before)
            fruitless = 0 if len(found.items) > before else fruitless + 1
    if not found.items:
        raise InputError(
            f"generate_instructions: {config.model} gave no usable item in {found.requests} requests; its last answer "
            f"begins {text[:120]!r}; choose another --model"
        )
    return found


def _identity(item: Mapping[str, str]) -> tuple[str, str]:
    """Two items with the same question are the same item."""
    return item["instruction"].strip(), item["input"].strip()


class Api:
    """The openai client on `--base-url`, with waits between attempts and errors told apart."""

    def __init__(self, config: GenerateInstructions) -> None:
        import openai

        self._config = config
        # servers of one's own want no key, but the client insists on one
        self._client = openai.OpenAI(
            base_url=config.base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=config.timeout,
            max_retries=0,
        )

    def __enter__(self) -> "Api":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def complete(self, messages: list[dict[str, str]]) -> str:
        """The answer's text. InputError for what no waiting mends, StorageFault after the last attempt."""
        import openai
        from tenacity import Retrying, before_sleep_log, retry_if_exception_type, stop_after_attempt

        passing = (openai.RateLimitError, openai.InternalServerError, openai.APIConnectionError)
        attempts = Retrying(
            retry=retry_if_exception_type(passing),
            stop=stop_after_attempt(ATTEMPTS),
            wait=_wait,
            before_sleep=before_sleep_log(log, logging.INFO),
            reraise=True,
        )
        where = f"generate_instructions: {self._config.base_url}"
        try:
            return attempts(self._once, messages)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise InputError(
                f"{where} refuses the key ({error.status_code}); set OPENAI_API_KEY to one that may use "
                f"{self._config.model}"
            ) from error
        except passing as error:
            raise StorageFault(f"{where} failed {ATTEMPTS} times, the last time with: {error}; try again") from error
        except openai.APIStatusError as error:
            raise InputError(
                f"{where} refuses the request ({error.status_code}: {error.message[:200]}); check --model and "
                "--base-url"
            ) from error
        except (openai.APIResponseValidationError, ValueError, AttributeError) as error:
            raise InputError(f"{where} does not answer as a chat completions API; check --base-url") from error

    def _once(self, messages: Any) -> str:
        made = self._client.chat.completions.create(
            model=self._config.model, messages=messages, temperature=self._config.temperature
        )
        return (made.choices[0].message.content or "") if made.choices else ""


def _wait(state: Any) -> float:
    """Seconds until the next attempt: the server's Retry-After where it gives one, else random and growing."""
    from tenacity import wait_random_exponential

    error = state.outcome.exception()
    response = getattr(error, "response", None)
    said = response.headers.get("retry-after", "") if response is not None else ""
    if said.replace(".", "", 1).isdigit():
        return min(float(said), LONGEST_WAIT)
    return float(wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT)(state))
