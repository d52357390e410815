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
from typing import Any, TypeGuard

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from zhllama.kubernetes import api as kubernetes_api
from zhllama.kubernetes.api import plain, short
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
    """One pod's log. Two streams may be open at once, the one that follows and, at the end, one that looks: what one
    of them passes on the other one leaves out."""

    def __init__(self, pods: Any, namespace: str, name: str, container: str, logs: "JobLogs") -> None:
        self._pods, self._namespace, self._name, self._container = pods, namespace, name, container
        self._logs, self._passed, self._restarts = logs, Passed(), 0
        self._lock = threading.Lock()
        self._repeated: list[Counter[bytes]] = []
        """What each open stream still brings that was passed on."""
        self._said = 0
        self._asks, self._stopped, self._over = threading.Event(), threading.Event(), False
        self._broke = self.missing = "its pod was gone before it was answered"
        """Why the last stream that followed has no end, and why the log has none; "" where it has."""
        self._following = threading.Thread(target=self._follow, name=f"log of {name}", daemon=True)
        self._following.start()

    def _follow(self) -> None:
        pause = FIRST_WAIT
        while not self._stopped.is_set():
            self._asks.clear()
            try:
                found, self._broke = self._stream(follow=True), ""
            except (ApiException, HTTPError, OSError, ValueError) as error:
                log.debug("log of %s: %s", self._name, error)
                found, self._broke = 0, self._broke if _none(error) else short(error)
            pause = FIRST_WAIT if found else min(pause * 2, LONGEST_WAIT)
            if not self._stopped.is_set():
                self._asks.wait(pause)

    def ask(self) -> None:
        """Something has changed: no pause before the next stream."""
        self._asks.set()

    def stop(self) -> None:
        """Nothing more is passed on."""
        self._stopped.set()
        self._asks.set()
        with self._lock:
            self._over = True

    def finish(self, deadline: float, to_its_end: bool) -> None:
        """Passes on what is left of the log, until `deadline` (monotonic) at most. to_its_end: of a container that
        still runs, an answer without a new line is not the last."""
        self._stopped.set()
        self._asks.set()
        self.missing = "no answer in time"
        pause = FIRST_WAIT / 4
        while (left := deadline - time.monotonic()) > 0:
            said = self._said
            self._following.join(min(pause, left))
            if self._following.is_alive() and self._said > said:
                continue
            try:
                # asked before the log is: what the container wrote until its end is then in the answer
                running = to_its_end and "running" in (self._status().get("state") or {})
                # until nothing new comes: an answer may have been cut short
                found, self.missing = self._stream(follow=False, seconds=left), ""
                if not found and not running:
                    return
            except (ApiException, HTTPError, OSError, ValueError) as error:
                if _none(error):
                    # the pod has gone: what is open is read to its end nevertheless
                    self._following.join(max(0.0, deadline - time.monotonic()))
                    self.missing = self._broke if error.status == 404 else ""
                    return
                log.debug("log of %s: %s", self._name, error)
                self.missing = short(error)
            time.sleep(min(pause, max(0.0, left)))
            pause = min(pause * 2, LONGEST_WAIT, 2.0)

    def _stream(self, follow: bool, seconds: float = SILENT) -> int:
        """Passes on what a new stream brings; the number of lines that were new."""
        with self._lock:
            # the log of the container before may be the very one that is open: what it brings is then left out there
            since, repeated, earlier = self._passed.since(), self._passed.to_skip(), self._passed.to_skip()
            self._repeated += [repeated, earlier]
        try:
            with closing(self._open(since, seconds, follow="true" if follow else "")) as answer:
                # asked after the stream began, so that this is the container it comes from, or a later one. None when
                # the pod has gone: its log, once it is open, is read to its end nevertheless
                restarts, found = self._counted_restarts(), 0
                if restarts > self._restarts:
                    try:
                        with closing(self._open(since, seconds, previous="true")) as before:
                            found = self._pass_on(earlier, before, partial_too=True, old=True)
                    except ApiException as error:
                        if not _none(error):
                            raise
                    self._restarts = max(restarts, self._restarts)
                return found + self._pass_on(repeated, answer, partial_too=not follow)
        finally:
            with self._lock:
                self._repeated = [one for one in self._repeated if one is not repeated and one is not earlier]

    def _counted_restarts(self) -> int:
        """Asked again when that fails: what an open stream brings is lost, perhaps for ever, if it is closed unread."""
        until, pause = time.monotonic() + LAST_LINES_WITHIN, FIRST_WAIT / 4
        while True:
            try:
                return int(self._status().get("restartCount") or 0)
            except (ApiException, HTTPError, OSError, ValueError):
                if self._over or time.monotonic() > until:
                    raise
            time.sleep(pause)
            pause = min(pause * 2, LONGEST_WAIT, 2.0)

    def _pass_on(self, repeated: Counter[bytes], answer: Any, partial_too: bool, old: bool = False) -> int:
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
                if self._over:
                    return found
                if repeated[line]:
                    repeated[line] -= 1
                    continue
                self._passed.add(when, line, old)
                for other in self._repeated:
                    if other is not repeated:
                        other[line] += 1
                self._said += 1
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


def _none(error: Exception) -> TypeGuard[ApiException]:
    """Whether it says that there is no such log, and not that it cannot be had now."""
    return isinstance(error, ApiException) and error.status in (400, 404)


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
        self.followed: dict[str, PodLog] = {}
        self._lock = threading.Lock()
        self.kept: deque[str] = deque(maxlen=KEPT_LINES)
        """The last lines."""

    def follow(self, pods: list[dict[str, Any]]) -> None:
        """Begins with those pods that run, or have run."""
        for pod in sorted(pods, key=lambda pod: not self._kind.is_first(pod)):
            name, phase = pod["metadata"]["name"], pod.get("status", {}).get("phase")
            # the log of a pod that crashed is gone seconds after the job has failed
            wanted = len(self.followed) < MOST_FOLLOWED or any(map(crash, containers(pod, "containerStatuses")))
            if name in self.followed:
                self.followed[name].ask()
            elif phase in ("Running", "Succeeded", "Failed") and wanted:
                self.followed[name] = PodLog(self._pods, self._namespace, name, self._kind.container, self)

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
            for one in self.followed.values()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self.stop()
        if missing := [(name, one.missing) for name, one in self.followed.items() if one.missing]:
            (name, why), more = missing[0], len(missing) - 1
            log.warning("the last lines of %s%s are missing: %s", name, f" and {more} more" if more else "", why)

    def stop(self) -> None:
        for one in self.followed.values():
            one.stop()
