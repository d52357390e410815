"""The logs of a job's pods, passed on: each line once and none left out, whatever breaks.

The kubelet stamps every line, and answers "since when" in whole seconds. So a stream that broke is asked for again from
a second or two before the last line, and what was passed on since then is left out: as a multiset of whole lines, for
two lines may have one stamp, and stamps may be out of order by microseconds. A line counts once its line break has
come. When a container was started again in its pod, the end of its predecessor's log comes first.
"""

import logging
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from zhllama.kubernetes import api as kubernetes_api
from zhllama.kubernetes.api import plain
from zhllama.kubernetes.job_kinds import JobKind
from zhllama.kubernetes.pod_state import containers, crash
from zhllama.secret_text import mask
from zhllama.terminal import say

log = logging.getLogger("launch")

WINDOW = timedelta(seconds=2)
"""Of the lines that were passed on, those of so long before the last one are remembered."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0
"""Seconds between a stream's end and the next one."""
SILENT = 600.0
"""Seconds after which a stream that says nothing is asked for again."""
LAST_LINES_WITHIN = 15.0
"""Seconds that the last lines get after a job is over."""
MOST_FOLLOWED = 16
"""Pods whose logs are followed: the first ones. All say the same, but for rank 0, which says more."""
KEPT_LINES = 1000
LONGEST_LINE = 2**16
"""Bytes of a line that are passed on; the rest is left out, and that is said."""


class Passed:
    """The lines of one log that were passed on lately."""

    def __init__(self) -> None:
        self._recent: deque[tuple[datetime, bytes]] = deque()
        self._last: datetime | None = None

    def since(self) -> str:
        """From when to ask for lines again, in whole seconds; "" before the first."""
        return (self._last - timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ") if self._last else ""

    def to_skip(self) -> Counter[bytes]:
        """Lines that a stream from `since` repeats, and how often each."""
        return Counter(line for _, line in self._recent)

    def add(self, stamp: datetime, line: bytes, old: bool = False) -> None:
        """A line is passed on. old: one of a container that has ended, so nothing is forgotten on its account."""
        self._recent.append((stamp, line))
        self._last = max(self._last or stamp, stamp)
        while not old and self._recent[0][0] < stamp - WINDOW:
            self._recent.popleft()


class PodLog:
    """One pod's log."""

    def __init__(self, pods: Any, namespace: str, name: str, container: str, logs: "JobLogs") -> None:
        self._pods, self._namespace, self._name, self._container = pods, namespace, name, container
        self._logs, self._passed, self._restarts = logs, Passed(), 0
        self._lock = threading.Lock()
        # only the stream whose turn it is passes lines on
        self._turn = 0
        self._stopped = threading.Event()
        threading.Thread(target=self._follow, name=f"log of {name}", daemon=True).start()

    def _follow(self) -> None:
        pause = FIRST_WAIT
        while not self._stopped.is_set():
            try:
                found = self._stream(0, follow=True)
            except (ApiException, HTTPError, OSError, ValueError) as error:
                log.debug("log of %s: %s", self._name, error)
                found = 0
            pause = FIRST_WAIT if found else min(pause * 2, LONGEST_WAIT)
            self._stopped.wait(pause)

    def stop(self, turn: int = -1) -> None:
        """Nothing more is passed on, but by the stream whose turn it is."""
        self._stopped.set()
        with self._lock:
            self._turn = turn

    def finish(self, deadline: float, to_its_end: bool) -> None:
        """Passes on what is left of the log, until `deadline` (monotonic) at most. to_its_end: of a container that
        still runs, an answer without a new line is not the last."""
        self.stop(turn=1)
        pause = FIRST_WAIT / 4
        while (left := deadline - time.monotonic()) > 0:
            try:
                # asked before the log is: what the container wrote until its end is then in the answer
                running = to_its_end and "running" in (self._status().get("state") or {})
                # until nothing new comes: an answer may have been cut short
                if not self._stream(1, follow=False, seconds=left) and not running:
                    return
            except (ApiException, HTTPError, OSError, ValueError) as error:
                if isinstance(error, ApiException) and error.status in (400, 404):
                    return
                log.debug("log of %s: %s", self._name, error)
            time.sleep(min(pause, max(0.0, left)))
            pause = min(pause * 2, LONGEST_WAIT, 2.0)

    def _stream(self, turn: int, follow: bool, seconds: float = SILENT) -> int:
        """Passes on what a new stream brings; the number of lines that were new."""
        with self._lock:
            since = self._passed.since()
        with closing(self._open(since, seconds, follow="true" if follow else "")) as answer:
            # asked after the stream began, so that this is the container it comes from, or a later one. None when the
            # pod has gone: its log, once it is open, is read to its end nevertheless
            restarts, found = int(self._status().get("restartCount") or 0), 0
            if restarts > self._restarts:
                try:
                    with closing(self._open(since, seconds, previous="true")) as before:
                        found = self._pass_on(turn, before, partial_too=True, old=True)
                except ApiException as error:
                    if error.status not in (400, 404):
                        raise
                with self._lock:
                    if self._turn != turn:
                        return found
                    self._restarts = restarts
            return found + self._pass_on(turn, answer, partial_too=not follow)

    def _pass_on(self, turn: int, answer: Any, partial_too: bool, old: bool = False) -> int:
        with self._lock:
            skip = self._passed.to_skip()
        found = 0
        for line in _lines(answer):
            if not (line.endswith(b"\n") or partial_too):
                break
            line = line.removesuffix(b"\n")
            stamp, _, text = line.partition(b" ")
            try:
                when = datetime.fromisoformat(stamp.decode())
            except ValueError:
                # the kubelet's own, about the log: `unable to retrieve container logs for …`
                log.debug("log of %s: %s", self._name, line)
                continue
            with self._lock:
                if self._turn != turn:
                    return found
                if skip[line]:
                    skip[line] -= 1
                    continue
                self._passed.add(when, line, old)
                self._logs.say(f"{self._name} | {mask(text.decode(errors='replace'))}")
            found += 1
        return found

    def _open(self, since: str, seconds: float, **more: str) -> Any:
        # CoreV1Api knows sinceSeconds alone, which would depend on two machines' clocks
        query = {"container": self._container, "timestamps": "true", "sinceTime": since, **more}
        return self._pods.api_client.call_api(
            f"/api/v1/namespaces/{self._namespace}/pods/{self._name}/log",
            "GET",
            query_params=[(name, value) for name, value in query.items() if value],
            auth_settings=["BearerToken"],
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=(kubernetes_api.TIMEOUT[0], seconds),
        )

    def _status(self) -> dict[str, Any]:
        """The container's; {} when there is none, or no pod."""
        read, where = self._pods.read_namespaced_pod, {"name": self._name, "namespace": self._namespace}
        try:
            pod = plain(read, **where, _request_timeout=kubernetes_api.TIMEOUT)
        except ApiException as error:
            if error.status == 404:
                return {}
            raise
        return next((dict(one) for one in containers(pod, "containerStatuses") if one["name"] == self._container), {})


def _lines(answer: Any) -> Iterator[bytes]:
    """The lines of a log, each with its line break, which the last may lack. Of one longer than LONGEST_LINE the start:
    a program that never ends its line takes no memory here."""
    held, left_out = bytearray(), 0
    for chunk in answer.stream(decode_content=True):
        for number, part in enumerate(chunk.split(b"\n")):
            if number:
                yield _line(held, left_out) + b"\n"
                held, left_out = bytearray(), 0
            taken = part[: LONGEST_LINE - len(held)]
            held += taken
            left_out += len(part) - len(taken)
    if held:
        yield _line(held, left_out)


def _line(held: bytearray, left_out: int) -> bytes:
    return bytes(held) + (f" … ({left_out:,} more bytes of this line are left out)".encode() if left_out else b"")


class JobLogs:
    """The logs of one job's pods, to standard error with the pod's name before each line."""

    def __init__(self, api: client.ApiClient, kind: JobKind, namespace: str) -> None:
        self._pods = client.CoreV1Api(api)
        self._kind, self._namespace = kind, namespace
        self._followed: dict[str, PodLog] = {}
        self._lock = threading.Lock()
        self.kept: deque[str] = deque(maxlen=KEPT_LINES)
        """The last lines."""

    def follow(self, pods: list[dict[str, Any]]) -> None:
        """Begins with those pods that run, or have run."""
        for pod in sorted(pods, key=lambda pod: not self._kind.is_first(pod)):
            name, phase = pod["metadata"]["name"], pod.get("status", {}).get("phase")
            # the log of a pod that crashed is gone seconds after the job has failed
            wanted = len(self._followed) < MOST_FOLLOWED or any(map(crash, containers(pod, "containerStatuses")))
            if phase in ("Running", "Succeeded", "Failed") and name not in self._followed and wanted:
                self._followed[name] = PodLog(self._pods, self._namespace, name, self._kind.container, self)

    def say(self, line: str) -> None:
        with self._lock:
            self.kept.append(line)
            say(line, sys.stderr)

    def finish(self, job_over: bool = True) -> None:
        """Waits for what the logs still have, some seconds at most. A job may be over before its containers are: they
        are heard to their ends, unless it is the launcher alone that has seen enough of the job."""
        deadline = time.monotonic() + LAST_LINES_WITHIN
        threads = [
            threading.Thread(target=one.finish, args=(deadline, job_over), daemon=True)
            for one in self._followed.values()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self.stop()

    def stop(self) -> None:
        for one in self._followed.values():
            one.stop()
