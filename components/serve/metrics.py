"""What is counted of requests, and the line that each leaves in the log: counts and times, never texts."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import prometheus_client

from components.serve.requests import ApiError

log = logging.getLogger("serve")

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What Prometheus reads. Of requests it holds counts and times, never texts."""

    def __init__(self, name: str) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        counter: Any = partial(prometheus_client.Counter, registry=self.registry)
        gauge: Any = partial(prometheus_client.Gauge, registry=self.registry)
        histogram: Any = partial(prometheus_client.Histogram, registry=self.registry, buckets=SECONDS)
        self.requests = counter("zhllama_requests", "Requests answered, by path and status.", ("path", "status"))
        self.running = gauge("zhllama_requests_running", "Requests being answered.")
        self.seconds = histogram("zhllama_request_seconds", "From request to last byte.", ("path",))
        self.first = histogram("zhllama_first_token_seconds", "From request to first text of a stream.")
        self.prompt_tokens = counter("zhllama_prompt_tokens", "Tokens of prompts.")
        self.answer_tokens = counter("zhllama_answer_tokens", "Tokens of answers.")
        self.engine = gauge("zhllama_engine_up", "1 while the engine runs.", ("model",)).labels(name)


class Record:
    """One request, from its beginning to its end: a line in the log, and the metrics."""

    def __init__(self, metrics: Metrics, path: str) -> None:
        self._metrics = metrics
        self._path = path
        self.begin = time.monotonic()
        self.prompt_tokens = 0
        self.answer_tokens = 0
        self._ended = False
        metrics.running.inc()

    @contextmanager
    def of_failures(self) -> Iterator[None]:
        """Ends the record with what is raised inside."""
        try:
            yield
        except BaseException as error:
            self.end(error.status if isinstance(error, ApiError) else 499)
            raise

    def end(self, status: int) -> None:
        """499: the client went away."""
        if self._ended:
            return
        self._ended = True
        seconds = time.monotonic() - self.begin
        self._metrics.running.dec()
        self._metrics.requests.labels(self._path, str(status)).inc()
        self._metrics.seconds.labels(self._path).observe(seconds)
        if status == 200:
            self._metrics.prompt_tokens.inc(self.prompt_tokens)
            self._metrics.answer_tokens.inc(self.answer_tokens)
        said = "%s %d: %d tokens asked, %d answered, %.2f s"
        log.info(said, self._path, status, self.prompt_tokens, self.answer_tokens, seconds)
