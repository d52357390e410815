"""Requests to the model, many at a time, until a limit is reached; what comes is harvested in order.

The first request goes alone (client.py), and until one has given an item no more are out than may still be fruitless:
a model that writes only rubbish is asked exactly `fruitless` times. After that no answer is bought only to be thrown
away. One that fails ATTEMPTS times while others are answered is given up; when nothing is answered, the server has
failed. On SIGTERM, Ctrl-C or an error nothing more is sent, and what is on its way, and billed, is waited for.
"""

import asyncio
import contextlib
import itertools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from components.generate_instructions import batch_api
from components.generate_instructions.catalogue import Requests
from components.generate_instructions.client import Answer, Api, Dialect, Failed, Refused, UnexpectedResponse
from components.generate_instructions.harvest import Harvest
from components.generate_instructions.journal import Journal
from components.generate_instructions.ledger import YIELD, Ledger, Tokens
from components.generate_instructions.limits import ATTEMPTS, LONGEST_PAUSE, Limits, backoff
from zhllama.errors import InputError, StorageFault
from zhllama.progress import Progress

log = logging.getLogger("generate_instructions")

MOST_ATTEMPTS = 3 * ATTEMPTS
"""Of one request in all runs together, after which it is given up even where nothing else is answered."""
PATIENCE = 1800.0
"""Seconds of nothing but 429, after which the server counts as failed."""
DRAIN = 20.0
"""Seconds that answers on their way are waited for when a run ends early; Kubernetes kills after 30."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C came: this signal."""


class RequestScheduler:
    """One run over a journal: what is settled in it is harvested first, then the model is asked for the rest."""

    def __init__(self, api: Api, requests: Requests, journal: Journal, ledger: Ledger, harvest: Harvest) -> None:
        self.config, self.where, self.api, self.requests = api.config, api.where, api, requests
        self.journal, self.ledger, self.harvest, self.budget = journal, ledger, harvest, api.config.budget
        structure = "schema" if self.config.structured == "auto" else self.config.structured
        self.dialect = Dialect(**(ledger.dialect or {"structure": structure, "stream": self.config.stream}))
        self.limits = Limits(self.config.requests_per_minute, self.config.tokens_per_minute)
        self.ended = ""
        """Why no more is asked: "items", "max-cost", "max-tokens" or "fruitless"; "" while it goes on."""
        self.taken = self.empty_responses = 0
        """Answers that were harvested (requests 0 to taken − 1), and how many of the last gave nothing new."""
        self.last_answer = self._first_refusal = ""
        self._answered_at = 0.0
        self._closing = False
        self._running: dict[int, asyncio.Task[None]] = {}
        self._on_the_wire: set[int] = set()
        self._bar = Progress("generating", harvest.wanted or None, "items")

    @property
    def known(self) -> bool:
        """Whether the server's dialect is."""
        return self.ledger.dialect is not None

    async def run(self) -> None:
        """Asks until `ended`. Stopped, InputError or StorageFault once what was on its way has been kept."""
        with self._bar, self._stopped_by_signals():
            self.harvest_what_came()
            try:
                await self._loop()
            finally:
                await self._drain()
                await self.api.client.close()
            # what waited for an answer that will not come
            waiting = sorted(self.ledger.settled.keys() - range(self.taken))
            for number in waiting if self.ended in ("max-cost", "max-tokens") else ():
                if not self.harvest.full:
                    self._take(number)

    async def _loop(self) -> None:
        await batch_api.finish(self)
        while not self.ended:
            if self.config.batch and self.known and self.harvest.items:
                await batch_api.plan(self)
                await batch_api.finish(self)
                continue
            while (number := self.next_number()) is not None:
                self._running[number] = asyncio.create_task(self._settle(number))
            if not self._running:
                return
            done, _ = await asyncio.wait(self._running.values(), return_when=asyncio.FIRST_COMPLETED)
            # one that failed leaves the others to _drain, which hears them out
            for task in done:
                task.result()
            self._running = {number: task for number, task in self._running.items() if task not in done}
            self.harvest_what_came()

    async def _drain(self) -> None:
        """Ends what was not sent, and waits for what was: it will be billed."""
        self._closing = True
        for number, task in self._running.items():
            if number not in self._on_the_wire:
                task.cancel()
        if out := len(self._on_the_wire - set(self.ledger.settled)):
            log.info("waiting for %d answers on their way, up to %.0f s", out, DRAIN)
        if self._running:
            await asyncio.wait(self._running.values(), timeout=DRAIN)
            for task in self._running.values():
                task.cancel()
            for outcome in await asyncio.gather(*self._running.values(), return_exceptions=True):
                if isinstance(outcome, Exception):
                    log.debug("while ending: %s", outcome)

    @contextlib.contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        """SIGTERM or Ctrl-C cancel this task, in place of what they did before, and become Stopped."""
        loop, came = asyncio.get_running_loop(), list[int]()
        task: Any = asyncio.current_task()
        signums = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        before: dict[int, Any] = {signum: signal.getsignal(signum) for signum in signums}

        def stop(signum: int) -> None:
            # a second Ctrl-C ends at once
            signal.signal(signum, before[signum])
            if not (came or self._closing):
                log.warning("%s: nothing more is sent", signal.Signals(signum).name)
                came.append(signum)
                task.cancel()

        for signum in before:
            loop.add_signal_handler(signum, stop, signum)
        try:
            yield
        except asyncio.CancelledError as error:
            # a second signal cancels too, and is no end of ours
            if came and not task.uncancel():
                raise Stopped(came[0]) from error
            raise
        finally:
            for signum, handler in before.items():
                loop.remove_signal_handler(signum)
                signal.signal(signum, handler)

    def next_number(self) -> int | None:
        """The next request to send; None when none may be sent now. Sets `ended` when none ever may."""
        allowed = self.config.concurrency
        if not self.known or self.config.batch:
            allowed = 1
        elif not self.harvest.items:
            allowed = max(1, min(allowed, self.config.fruitless - self.empty_responses - self._waiting()))
        if self.ended or len(self._running) >= allowed:
            return None
        number = next(self.unsettled())
        # an answer that others wait for is always wanted
        if not self.wants_more(len(self._running)) and number > max(self.ledger.settled, default=-1):
            return None
        not_yet_sent = len(self._running.keys() - self._on_the_wire)
        limit = self.budget.stops(self.ledger.charged, self.most(number) * (1 + not_yet_sent))
        if limit and not self._running:
            self.ended = limit
        return None if limit else number

    def unsettled(self) -> Iterator[int]:
        """The numbers of the requests that are neither settled nor out, the lowest first."""
        out = self.ledger.settled, self._running
        return (number for number in itertools.count(self.taken) if not any(number in some for some in out))

    def _waiting(self) -> int:
        """Answers that came before one with a lower number: requests 0 to taken − 1 are all settled."""
        return len(self.ledger.settled) - self.taken

    def wants_more(self, out: int) -> bool:
        """Whether the answers that are out, and those that wait for one before them, leave something to be wanted."""
        if not self.harvest.wanted:
            return True
        # new items of one answer, as it has been; at first as it usually is
        yielded = (len(self.harvest.items) + YIELD * self.requests.count) / (self.taken + 1)
        return (out + self._waiting()) * yielded < self.harvest.wanted - len(self.harvest.items)

    def most(self, number: int) -> Tokens:
        """The most that a request can cost."""
        return Tokens(self.requests[number].most_prompt_tokens, self.config.answer_tokens)

    async def _settle(self, number: int) -> None:
        """Asks until the request is settled, the budget does not hold another attempt, or the run ends."""
        failures = throttled = 0
        began = halfway = time.monotonic()
        most = self.most(number)
        while number not in self.ledger.settled:
            correct = await self.limits.turn(most.total)
            if self._closing or self.budget.stops(self.ledger.charged, most):
                return
            attempt = self.ledger.attempts[number] + 1
            self._on_the_wire.add(number)
            try:
                failure = await self._attempt(number, attempt, most, correct)
            finally:
                self._on_the_wire.discard(number)
            if failure is None:
                continue
            failures, throttled = failures + (not failure.throttled), throttled + failure.throttled
            if self._closing:
                return
            if failures == ATTEMPTS // 2 and not failure.throttled:
                halfway = time.monotonic()
            # in an outage nothing is answered between a request's fifth failure and its tenth
            alone = self._answered_at >= halfway or attempt >= MOST_ATTEMPTS
            wait = backoff(failures + throttled) if failure.wait is None else failure.wait
            if failures >= ATTEMPTS and alone:
                await self.record("given up", request=number, attempt=attempt, reason=failure.reason)
            elif failures >= ATTEMPTS or (throttled and time.monotonic() - max(began, self._answered_at) > PATIENCE):
                raise StorageFault(
                    f"{self.where} failed {failures + throttled} times, the last time with: {failure}; what "
                    "came is kept, run this again to go on"
                )
            elif wait > LONGEST_PAUSE:
                raise StorageFault(
                    f"{self.where} asks to wait {wait:.0f} s ({failure}); what came is kept, run this again then"
                )
            else:
                log.info("%s: next attempt in %.1f s", failure, wait)
                if failure.wait is None:
                    await asyncio.sleep(wait)
                else:
                    self.limits.pause(wait)

    async def _attempt(
        self, number: int, attempt: int, most: Tokens, correct: Callable[[float], None]
    ) -> Failed | None:
        """Asks once and keeps what came; what may pass is returned, and None after an answer or a refusal."""
        await self.record("sent", request=number, attempt=attempt, prompt_tokens=most.prompt, answer_tokens=most.answer)
        try:
            answer = await self.api.ask(self.requests[number], self.dialect)
        except Failed as failure:
            await self.failed(number, attempt, failure.reason, failure.may_be_billed)
            return failure
        except Refused as refusal:
            await self.failed(number, attempt, f"refused: {str(refusal)[:80]}", False)
            if self.known:
                await self.record("given up", request=number, attempt=attempt, reason=str(refusal))
                return None
            self._first_refusal = self._first_refusal or str(refusal)
            plainer = self.dialect.weaker(str(refusal))
            if plainer is None:
                raise InputError(
                    f"{self.where} refuses the request ({self._first_refusal}); check --model, --base-url and "
                    "--answer-tokens"
                ) from refusal
            log.info("%s: asking again without what it does not take: %s", refusal, plainer)
            self.dialect = plainer
            return None
        except UnexpectedResponse as error:
            await self.failed(number, attempt, "no chat completion", True)
            if self.known:
                return Failed("no chat completion", may_be_billed=True, said=str(error))
            raise InputError(
                f"{self.where} does not answer as a chat completions API ({error}); check --base-url"
            ) from error
        except InputError:
            await self.failed(number, attempt, "the key, the model or the account", False)
            raise
        await self.answered(number, attempt, answer)
        if answer.prompt_tokens is not None and answer.answer_tokens is not None:
            correct(answer.prompt_tokens + answer.answer_tokens)
        return None

    async def failed(self, number: int, attempt: int, reason: str, may_be_billed: bool) -> None:
        await self.record("failed", request=number, attempt=attempt, reason=reason, may_be_billed=may_be_billed)

    async def answered(self, number: int, attempt: int, answer: Answer) -> None:
        """Keeps an answer, and, of the first, what the server understood."""
        self._answered_at = time.monotonic()
        await self.record("answered", request=number, attempt=attempt, **asdict(answer))
        if not self.known:
            await self.record("dialect", dialect=asdict(self.dialect))

    async def record(self, event: str, **more: Any) -> None:
        """A line of the journal: counted at once, durable on return."""
        line = {"event": event, **more, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        self.ledger.apply(line)
        await self.journal.append(line)

    def harvest_what_came(self) -> None:
        """Takes the answers that no earlier one is missing before, and sees whether that is enough."""
        while not self.ended and self.taken in self.ledger.settled:
            self._take(self.taken)
            self.taken += 1

    def _take(self, number: int) -> None:
        request, content = self.requests[number], self.ledger.settled[number]
        new = self.harvest.take_text(content, request.topics, request.task_types)
        self.last_answer = content or self.last_answer
        self.empty_responses = 0 if new else self.empty_responses + 1
        if self.harvest.full:
            self.ended = "items"
        elif self.empty_responses >= self.config.fruitless:
            self.ended = "fruitless"
        self._bar.note = self.budget.said(self.ledger.charged)
        self._bar.advance(new)
