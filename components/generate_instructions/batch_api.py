"""The Batch API: many requests as one file, answered within a day, usually at half the price.

The first answers are asked for one by one (asking.py): they show what the server takes and that the model writes
items. Then a batch holds as many requests as are wanted at the yield seen so far and as the budget certainly holds.
Its plan is in the journal before the file is sent, and the server keeps our name of it as metadata: killed at any
moment, a later run finds the batch by the journal, or by asking the server for it, and never makes it twice. A batch
is left running when we are stopped: it is paid for.
"""

import asyncio
import json
import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from components.generate_instructions.asking import ATTEMPTS, Asking
from components.generate_instructions.budget import Tokens
from components.generate_instructions.client import (
    LONGEST_ANSWER,
    Answer,
    Failed,
    Foreign,
    Refused,
    usage_of,
    whole_text,
)
from components.generate_instructions.ledger import Batch
from components.generate_instructions.limits import LONGEST_PAUSE, backoff
from components.generate_instructions.request import Request
from zhllama.errors import InputError, StorageFault

log = logging.getLogger("generate_instructions")

MOST_REQUESTS = 20_000
"""In a batch: OpenAI takes 50,000 and 200 MB, and one of ours has some 4 kB, twice that with long seeds."""
ENDPOINT: Final = "/v1/chat/completions"
NAME = "zhllama_batch"
"""The field of a batch's metadata that holds our name of it."""
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True)
class Batches:
    """Asking in batches. wanted: whether new ones are made; those of an earlier run are finished either way."""

    wanted: bool
    poll_seconds: float

    async def finish(self, asking: Asking) -> None:
        """Waits for the batches that are out, and keeps what they bring."""
        for name, batch in list(asking.ledger.batches.items()):
            await _settle(asking, name, batch, self.poll_seconds)
        asking.harvest_what_came()

    async def ask(self, asking: Asking) -> None:
        """Batch after batch until `asking.ended`."""
        while not asking.ended:
            await _plan(asking)
            await self.finish(asking)


async def _plan(asking: Asking) -> None:
    """Makes the next batch, or sets `asking.ended` when the budget holds no more."""
    chosen: list[tuple[Request, Tokens]] = []
    charged, limit = asking.ledger.charged, ""
    highest = max(asking.ledger.settled, default=-1)
    for number in asking.unsettled(MOST_REQUESTS):
        if number > highest and not asking.wants_more(len(chosen)):
            break
        request = asking.requests[number]
        most = asking.most(request)
        limit = asking.budget.stops(charged, most)
        if limit:
            break
        charged += most
        chosen.append((request, most))
    if not chosen:
        asking.ended = limit
        return
    name = uuid.uuid4().hex
    attempts = {request.number: asking.ledger.attempts.get(request.number, 0) + 1 for request, _ in chosen}
    if (most_attempts := max(attempts.values())) > ATTEMPTS:
        raise StorageFault(
            f"generate_instructions: {asking.api.base_url} did not answer a request in {most_attempts - 1} batches; "
            "what came is kept, run this again without --batch"
        )
    planned = [[request.number, attempts[request.number], most.prompt, most.answer] for request, most in chosen]
    await asking.record("batch planned", batch=name, requests=planned)
    lines = [
        json.dumps(
            {
                "custom_id": str(request.number),
                "method": "POST",
                "url": ENDPOINT,
                "body": asking.api.body(request, asking.dialect, stream=False),
            },
            ensure_ascii=False,
        )
        for request, _ in chosen
    ]
    content = "\n".join(lines).encode() + b"\n"
    client = asking.api.client
    file = await _call(asking, lambda: client.files.create(file=(f"{name}.jsonl", content), purpose="batch"))
    # once and no more: whether a call without an answer made the batch is looked up, not tried again
    try:
        made = await client.batches.create(
            input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", metadata={NAME: name}
        )
    except Exception as error:
        failure = _told_apart(asking, error)
        if isinstance(failure, Failed):
            log.info("whether the batch was made is not known (%s): asking the server", failure.reason)
            return
        if isinstance(failure, Refused | Foreign):
            await _undone(asking, name, "the batch was refused")
            raise _no_batches(asking, failure) from error
        raise failure from error
    await asking.record("batch created", batch=name, id=made.id)
    log.info("batch %s: %d requests", made.id, len(chosen))


async def _settle(asking: Asking, name: str, batch: Batch, poll_seconds: float) -> None:
    """Waits for a batch and keeps what it brought."""
    client = asking.api.client
    if not batch.identity:
        found = await _call(asking, lambda: _found(client, name))
        if found is None:
            await _undone(asking, name, "the batch was never made")
            return
        await asking.record("batch created", batch=name, id=found)
    identity = batch.identity
    while (state := await _call(asking, lambda: client.batches.retrieve(identity))).status not in ENDED:
        counts = state.request_counts
        if counts is not None:
            log.info("batch %s: %s, %d of %d answered", identity, state.status, counts.completed, counts.total)
        await asyncio.sleep(poll_seconds)
    for file in (state.output_file_id, state.error_file_id):
        if file:
            content = await _call(asking, lambda file=file: _content(client, file))  # type: ignore[misc]
            for line in content.splitlines():
                await _keep(asking, batch, line)
    left = f"the batch {state.status}" if state.status != "completed" else "missing from the batch"
    await _undone(asking, name, left)
    if state.status == "failed":
        said = "; ".join(str(error.message) for error in (state.errors.data or [])[:3]) if state.errors else ""
        raise InputError(
            f"generate_instructions: {asking.api.base_url} refuses the batch ({said or 'no reason given'}); mend that, "
            "or run this without --batch"
        )


async def _keep(asking: Asking, batch: Batch, line: str) -> None:
    """One line of a batch's output. What is no answer of ours is passed over: `_undone` sees what is missing."""
    try:
        value = json.loads(line)
        number = int(value["custom_id"])
        attempt = batch.attempts[number]
    except (ValueError, KeyError, TypeError):
        log.warning("a line of a batch that is no answer: %s", line[:80])
        return
    if (number, attempt) not in asking.ledger.open:
        return
    response = value.get("response") or {}
    body = response.get("body") or {}
    if response.get("status_code") == 200:
        try:
            (choice,) = body["choices"][:1]
            content = choice["message"].get("content") or choice["message"].get("refusal") or ""
            answer = Answer(
                whole_text(str(content)[:LONGEST_ANSWER]), choice.get("finish_reason") or "stop",
                *usage_of(body.get("usage"), str(content)), str(body.get("model") or ""),
            )  # fmt: skip
        except (KeyError, ValueError, TypeError, AttributeError):
            await asking.failed(number, attempt, "no chat completion", True)
            return
        await asking.answered(number, attempt, answer)
        return
    code = response.get("status_code") or 0
    said = str((body.get("error") or value.get("error") or {}).get("message", ""))[:200]
    await asking.failed(number, attempt, f"status {code} in the batch", False)
    if code in (400, 413, 422):
        await asking.record("given up", request=number, attempt=attempt, reason=said)


async def _undone(asking: Asking, name: str, reason: str) -> None:
    """Frees what a batch did not answer, and ends it."""
    for number, attempt in asking.ledger.batches[name].attempts.items():
        if (number, attempt) in asking.ledger.open:
            await asking.failed(number, attempt, reason, False)
    await asking.record("batch ended", batch=name)


async def _found(client: Any, name: str) -> str | None:
    """The server's name for the batch that we call `name`, or None."""
    async for batch in client.batches.list(limit=100):
        if (batch.metadata or {}).get(NAME) == name:
            return str(batch.id)
    return None


async def _content(client: Any, file: str) -> str:
    return str((await client.files.content(file)).text)


async def _call(asking: Asking, call: Callable[[], Awaitable[Any]]) -> Any:
    """A call that may be made again without a second bill: files and looks at a batch. InputError, StorageFault."""
    failures = 0
    while True:
        try:
            return await call()
        except Exception as error:
            failure = _told_apart(asking, error)
            if isinstance(failure, Refused | Foreign):
                raise _no_batches(asking, failure) from error
            if not isinstance(failure, Failed):
                raise failure from error
        failures += 1
        wait = backoff(failures) if failure.wait is None else failure.wait
        if failures >= ATTEMPTS or wait > LONGEST_PAUSE:
            raise StorageFault(
                f"generate_instructions: {asking.api.base_url} failed {failures} times, the last time with: "
                f"{failure.reason}; the batch goes on, run this again to go on with it"
            )
        log.info("%s: next attempt in %.1f s", failure.reason, wait)
        await asyncio.sleep(wait)


def _told_apart(asking: Asking, error: Exception) -> Exception:
    """As the client tells errors apart, but a page that is not there is the Batch API's."""
    if getattr(error, "status_code", 0) in (404, 405, 501):
        return Refused(str(error)[:200])
    return asking.api.told_apart(error)


def _no_batches(asking: Asking, reason: Exception) -> InputError:
    return InputError(
        f"generate_instructions: {asking.api.base_url} has no Batch API as OpenAI's ({reason}); run this without "
        "--batch"
    )
