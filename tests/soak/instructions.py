"""Generation of instructions under faults and kill -9, on one disk and from machine to machine: the bill and the data.

Each seed is a run against a server that fails, throttles, drops connections and answers late, and that kills the
stage at requests of its choosing, until the stage has ended well. The store is a folder, or S3 with a fresh machine
(another cache) after each kill. Held for every seed:

- an answer that has a line in the journal is never asked for again;
- what was worked on twice was in flight when the process was killed, or its connection was broken by a fault: sent
  (a line in the journal) with no line of its outcome, at most `CONCURRENCY` a kill;
- what the server billed is never more than what the journal charges, nor, where there is a limit, than the limit;
- without a limit the items are, byte for byte, those of a run without faults.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from components.generate_instructions.catalogue import Requests, load_catalogue
from components.generate_instructions.journal import Journal
from components.generate_instructions.ledger import Ledger
from pipelines.local.s3_server import LocalS3
from tests.components.generate_instructions.model_server import Asked, Do, ModelServer
from zhllama import storage
from zhllama.artifacts.open import open_artifact

CONCURRENCY = 6
ITEMS = 60
PER_REQUEST = 5
ANSWER_TOKENS = 600
MOST_RUNS = 12
PATIENT = (
    "from components.generate_instructions import limits; limits.FIRST_WAIT = 0.01; limits.LONGEST_WAIT = 0.05; "
    "import runpy; runpy.run_module('components.generate_instructions', run_name='__main__')"
)
"""The stage's own command, with waits of a few hundredths of a second."""
FAULTS = (
    Do(status=429),
    Do(status=429, headers={"Retry-After": "0.02"}),
    Do(status=500),
    Do(status=503, headers={"Retry-After": "0.01"}),
    Do(drop=True),
    Do(cut=10),
)
REQUESTS = Requests(load_catalogue(), PER_REQUEST, [], 42)
NUMBERS = {REQUESTS[number].messages[0]["content"]: number for number in range(400)}


def run(seeds: Iterable[int], scratch: Path) -> dict[str, int]:
    """Every seed in turn; AssertionError with the seed in it where something does not hold."""
    counted: Counter[str] = Counter()
    with ExitStack() as stack:
        server = ModelServer()
        stack.callback(server.close)
        s3 = stack.enter_context(LocalS3(scratch / "s3", bucket="soak"))
        plain = _plainly(server, scratch / "plain")
        for seed in seeds:
            one = _Seed(seed, scratch / str(seed), server, s3)
            try:
                counted += one.run(plain)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}") from error
            storage.delete_all(str(scratch / str(seed)))
    return dict(counted)


def _plainly(server: ModelServer, folder: Path) -> bytes:
    """The items of a run without faults."""
    ended = _started(server, str(folder), folder / "cache", {}).wait(120)
    assert ended == 0, "the run without faults failed"
    (found,) = folder.rglob("instructions.json")
    return found.read_bytes()


def _started(
    server: ModelServer, store: str, cache: Path, environment: dict[str, str], limit: int = 0
) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", PATIENT, "--store", store, "--items", str(0 if limit else ITEMS)]
    words += ["--base-url", server.url, "--model", "writer", "--per-request", str(PER_REQUEST)]
    words += ["--answer-tokens", str(ANSWER_TOKENS), "--concurrency", str(CONCURRENCY), "--max-tokens", str(limit)]
    cache.mkdir(parents=True, exist_ok=True)
    log = open(cache.parent / "log.txt", "ab")
    there = {**os.environ, "OPENAI_API_KEY": "sk-of-the-soak", "ZHLLAMA_CACHE": str(cache), **environment}
    with log:
        return subprocess.Popen(words, env=there, stdout=log, stderr=log)


class _Seed:
    def __init__(self, seed: int, folder: Path, server: ModelServer, s3: LocalS3) -> None:
        self.seed, self.folder, self.server = seed, folder, server
        self.chance = random.Random(seed)
        self.in_s3 = seed % 2 == 1
        self.store = f"s3://soak/{seed}" if self.in_s3 else str(folder / "store")
        self.environment = s3.environment() if self.in_s3 else {}
        self.limit = self.chance.choice((0, 0, 25_000))
        self.fault_rate = self.chance.choice((0.0, 0.1, 0.3))
        self.kills = self.chance.randint(1, 4)
        self.counted: Counter[str] = Counter()

    def run(self, plain: bytes) -> "Counter[str]":
        server, self.child = self.server, None
        code: int | None = None
        server.asked, server.worked, server.billed_prompt, server.billed_answer = [], [], 0, 0
        server.do, server.latency = self._told, lambda asked: self._late
        self.settled: set[int] = set()
        self.may_be_twice: set[int] = set()
        self.open: set[tuple[int, int]] = set()
        for attempt in range(MOST_RUNS):
            self._plan_a_kill(attempt)
            seen = len(server.asked)
            cache = self.folder / (f"machine-{attempt}" if self.in_s3 else "machine")
            self.child = _started(server, self.store, cache, self.environment, self.limit)
            code = self.child.wait(180)
            self._check_what_was_asked(server.asked[seen:])
            if code == 0:
                break
            assert code == -signal.SIGKILL, f"the stage ended with {code}: {self._last_words()}"
            self.counted["kills"] += 1
        assert code == 0, f"not done after {MOST_RUNS} runs: {self._last_words()}"
        self._check_the_end(plain)
        self.counted["seeds"] += 1
        self.counted["requests"] += len(server.asked)
        return self.counted

    def _plan_a_kill(self, attempt: int) -> None:
        self._kill_at = self.chance.randint(1, 14) if attempt < self.kills else 0
        self._kill_after = self.chance.choice((0.0, 0.0, 0.001, 0.01, 0.05))
        self._late = self.chance.choice((0.0, 0.01, 0.03))
        self._count = 0

    def _told(self, asked: Asked) -> Do | None:
        """Under the server's lock."""
        self._count += 1
        if self._count == self._kill_at:
            child = self.child
            assert child is not None
            threading.Timer(self._kill_after, lambda: child.poll() is None and child.kill()).start()
        if self.chance.random() >= self.fault_rate:
            return None
        self.counted["faults"] += 1
        fault = self.chance.choice(FAULTS)
        if fault.drop or fault.cut:
            self.may_be_twice.add(NUMBERS[asked.text])
        return fault

    def _ledger(self) -> Ledger:
        """The journal's lines, added up, what was open left open."""
        places = storage.listing(f"{self.store}/generate_instructions/answers")
        keys = {item.name.split("/")[0] for item in places}
        ledger = Ledger()
        for key in keys:
            with Journal(f"{self.store}/generate_instructions/answers/{key}") as journal:
                for record in journal.records:
                    ledger.apply(record)
        return ledger

    def _check_what_was_asked(self, asked: list[Asked]) -> None:
        """After a run: nothing settled before it was asked in it; what was sent and has no outcome may come twice."""
        again = {NUMBERS[one.text] for one in asked} & self.settled
        assert not again, f"requests {sorted(again)} were answered, and asked for again"
        before = dict(os.environ)
        os.environ.update(self.environment | {"ZHLLAMA_CACHE": str(self.folder / "reader")})
        try:
            ledger = self._ledger()
        finally:
            os.environ.clear()
            os.environ.update(before)
        in_flight = set(ledger.open) - self.open
        assert len(in_flight) <= CONCURRENCY, f"{len(in_flight)} requests were in flight at once"
        self.may_be_twice |= {number for number, _ in in_flight}
        self.open = set(ledger.open)
        self.settled = set(ledger.settled)
        charged = ledger.charged.total
        assert self.server.billed <= charged, f"billed {self.server.billed}, charged {charged}"
        if self.limit:
            assert self.server.billed <= self.limit, f"billed {self.server.billed} of {self.limit}"

    def _check_the_end(self, plain: bytes) -> None:
        twice = {NUMBERS[text] for text, times in Counter(self.server.worked).items() if times > 1}
        assert twice <= self.may_be_twice, f"paid twice: {sorted(twice - self.may_be_twice)}"
        self.counted["paid twice, in flight at a kill or broken by a fault"] += len(twice)
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            manifests = [
                item.name
                for item in storage.listing(f"{self.store}/generate_instructions")
                if item.name.endswith("/manifest.json")
            ]
            assert len(manifests) == 1
            artifact = open_artifact(f"{self.store}/generate_instructions/{manifests[0]}")
            items, card = artifact.read("instructions.json"), json.loads(artifact.read("card.json"))
        finally:
            os.environ.clear()
            os.environ.update(before)
        if self.limit:
            assert sum(card["cost"]["at_most"].values()) <= self.limit
        else:
            assert items == plain, "the items are not those of a run without faults"

    def _last_words(self) -> Any:
        return (self.folder / "log.txt").read_text()[-1500:]
