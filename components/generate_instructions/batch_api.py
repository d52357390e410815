"""The Batch API: many requests as one file, answered within a day, usually at half the price.

The first answers are asked for one by one: they show what the server takes and that the model writes items. A batch's
plan is in the journal before its file is sent, and the server keeps our name of it: killed at any moment, a later run
finds the batch, and never makes it twice. It is left running when we are stopped: it is paid for.
"""

import asyncio
import json
import logging
import tempfile
import uuid
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import IO, TYPE_CHECKING, Any

from components.generate_instructions.client import LONGEST_ANSWER, Failed, Refused, UnexpectedResponse, completed
from components.generate_instructions.ledger import Batch, Tokens
from components.generate_instructions.limits import ATTEMPTS, LONGEST_PAUSE, backoff
from components.generate_instructions.server_errors import error_in
from zhllama.errors import InputError, StorageFault

if TYPE_CHECKING:
    from components.generate_instructions.scheduler import RequestScheduler

log = logging.getLogger("generate_instructions")

MOST_REQUESTS = 20_000
"""In a batch: OpenAI takes 50,000 and 200 MB, and one of ours has some 4 kB, twice that with long seeds."""
ENDPOINT = "/v1/chat/completions"
NAME = "zhllama_batch"
"""The field of a batch's metadata that holds our name of it."""
ENDED = ("completed", "failed", "expired", "cancelled")


async def finish(scheduler: "RequestScheduler") -> None:
    """Waits for the batches that are out (an earlier run's too), and keeps what they bring."""
    for name, batch in list(scheduler.ledger.batches.items()):
        await _settle(scheduler, name, batch)
    scheduler.harvest_what_came()


async def plan(scheduler: "RequestScheduler") -> None:
    """Makes the next batch, or sets `scheduler.ended` when the budget holds no more."""
    chosen: dict[int, Tokens] = {}
    charged, limit = scheduler.ledger.charged, ""
    highest = max(scheduler.ledger.settled, default=-1)
    for number in islice(scheduler.unsettled(), MOST_REQUESTS):
        if number > highest and not scheduler.wants_more(len(chosen)):
            break
        most = scheduler.most(number)
        limit = scheduler.budget.stops(charged, most)
        if limit:
            break
        charged += most
        chosen[number] = most
    if not chosen:
        scheduler.ended = limit
        return
    name = uuid.uuid4().hex
    made = scheduler.ledger.attempts
    if (most_attempts := max(made[number] for number in chosen)) >= ATTEMPTS:
        raise StorageFault(
            f"{scheduler.where} did not answer a request in {most_attempts} batches; what came is kept, run this again "
            "without --batch"
        )
    planned = [[number, made[number] + 1, most.prompt, most.answer] for number, most in chosen.items()]
    await scheduler.record("batch planned", batch=name, requests=planned)
    client, content = scheduler.api.client, bytearray()
    for number in chosen:
        body = scheduler.api.body(scheduler.requests[number], scheduler.dialect, stream=False)
        line = {"custom_id": str(number), "method": "POST", "url": ENDPOINT, "body": body}
        content += json.dumps(line, ensure_ascii=False).encode() + b"\n"
    try:
        file = await _call(scheduler, client.files.create, file=(f"{name}.jsonl", bytes(content)), purpose="batch")
        what = {"input_file_id": file.id, "endpoint": ENDPOINT, "completion_window": "24h", "metadata": {NAME: name}}
        # once and no more: whether a call without an answer made the batch is looked up, not tried again
        begun = await client.batches.create(**what)
    except Exception as error:
        failure = _told_apart(scheduler, error)
        if isinstance(failure, Failed):
            log.info("whether the batch was made is not known (%s): asking the server", failure)
            return
        if isinstance(failure, NoBatches):
            await _undone(scheduler, name, "the batch was refused")
        raise failure from error
    await scheduler.record("batch created", batch=name, id=begun.id)
    log.info("batch %s: %d requests", begun.id, len(chosen))


async def _settle(scheduler: "RequestScheduler", name: str, batch: Batch) -> None:
    """Waits for a batch and keeps what it brought."""
    client = scheduler.api.client
    if not batch.identity:
        found = await _call(scheduler, _found, client, name)
        if found is None:
            await _undone(scheduler, name, "the batch was never made")
            return
        await scheduler.record("batch created", batch=name, id=found)
    while (state := await _call(scheduler, client.batches.retrieve, batch.identity)).status not in ENDED:
        if counts := state.request_counts:
            log.info("batch %s: %s, %d of %d answered", batch.identity, state.status, counts.completed, counts.total)
        await asyncio.sleep(scheduler.config.batch_poll_seconds)
    for file in filter(None, (state.output_file_id, state.error_file_id)):
        # of bytes, since a text's lines end at signs too that may stand in an answer; what is too long is none
        with await _call(scheduler, _content, client, file) as content:
            while line := content.readline(2 * LONGEST_ANSWER):
                if line.strip():
                    await _keep(scheduler, batch, line)
    missing = "missing from the batch" if state.status == "completed" else f"the batch {state.status}"
    await _undone(scheduler, name, missing)
    if state.status == "failed":
        said = "; ".join(str(error.message) for error in (state.errors.data or [])[:3]) if state.errors else ""
        raise InputError(
            f"{scheduler.where} refuses the batch ({said or 'no reason given'}); mend that, or run this without --batch"
        )


async def _keep(scheduler: "RequestScheduler", batch: Batch, line: bytes) -> None:
    """One line of a batch's output. What is no answer of ours is passed over: `_undone` sees what is missing."""
    try:
        value = json.loads(line)
        number = int(value["custom_id"])
        attempt = batch.attempts[number]
    except (ValueError, KeyError, TypeError, RecursionError):
        log.warning("a line of a batch that is no answer: %s", line[:80])
        return
    if (number, attempt) not in scheduler.ledger.open:
        return
    response = response if isinstance(response := value.get("response"), dict) else {}
    code, body = response.get("status_code") or 0, response.get("body") or {}
    # a line without an answer holds the error itself
    error = error_in(body) or error_in({"error": value.get("error")})
    if code == 200 and not error:
        try:
            answer = completed(body)
        except (UnexpectedResponse, KeyError, ValueError, TypeError, AttributeError):
            await scheduler.failed(number, attempt, "no chat completion", True)
        else:
            await scheduler.answered(number, attempt, answer)
        return
    # in a body of status 200, an error without a code or words that tell is the request's
    code = error.status or 400 if error and code == 200 else code
    await scheduler.failed(number, attempt, f"status {code} in the batch", False)
    if code in (400, 413, 422):
        said = error.said[:200] if error else ""
        await scheduler.record("given up", request=number, attempt=attempt, reason=said)


async def _undone(scheduler: "RequestScheduler", name: str, reason: str) -> None:
    """Frees what a batch did not answer, and ends it."""
    for number, attempt in scheduler.ledger.batches[name].attempts.items():
        if (number, attempt) in scheduler.ledger.open:
            await scheduler.failed(number, attempt, reason, False)
    await scheduler.record("batch ended", batch=name)


async def _found(client: Any, name: str) -> str | None:
    """The server's name for the batch that we call `name`, or None."""
    async for batch in client.batches.list(limit=100):
        if (batch.metadata or {}).get(NAME) == name:
            return str(batch.id)
    return None


async def _content(client: Any, file: str) -> IO[bytes]:
    """A file of the server's, on disk: twenty thousand answers are some hundred megabytes."""
    kept = tempfile.TemporaryFile()
    try:
        async with client.files.with_streaming_response.content(file) as response:
            async for piece in response.iter_bytes():
                kept.write(piece)
    except BaseException:
        kept.close()
        raise
    kept.seek(0)
    return kept


async def _call(scheduler: "RequestScheduler", call: Callable[..., Awaitable[Any]], *given: Any, **named: Any) -> Any:
    """A call that may be made again without a second bill: files and looks at a batch. InputError, StorageFault."""
    failures = 0
    while True:
        try:
            return await call(*given, **named)
        except Exception as error:
            failure = _told_apart(scheduler, error)
            if not isinstance(failure, Failed):
                raise failure from error
        failures += 1
        wait = backoff(failures) if failure.wait is None else failure.wait
        if failures == ATTEMPTS or wait > LONGEST_PAUSE:
            raise StorageFault(
                f"{scheduler.where} failed {failures} times, the last time with: {failure}; the batch goes on, "
                "run this again to go on with it"
            )
        log.info("%s: next attempt in %.1f s", failure, wait)
        await asyncio.sleep(wait)


class NoBatches(InputError):
    """The server has no Batch API, or takes no batch of ours."""


def _told_apart(scheduler: "RequestScheduler", error: Exception) -> Exception:
    """As the client tells errors apart, but a page that is not there is the Batch API's."""
    failure = scheduler.api.told_apart(error)
    if getattr(error, "status_code", 0) in (404, 405, 501):
        failure = Refused(str(error)[:200])
    if isinstance(failure, Refused | UnexpectedResponse):
        return NoBatches(f"{scheduler.where} has no Batch API as OpenAI's ({failure}); run this without --batch")
    return failure
