"""Where every request to Kubeflow Pipelines goes out, and every answer comes in: its status, kind and ids are looked at
here, and nowhere else.

kfp's client takes whatever answers: a login page with status 200 (Dex, oauth2-proxy, IAP), or one that it was sent on
to, becomes an object without an id, and a cancel "succeeds". So an answer is JSON with ids as ids are written, or it is
none. What may pass (nobody listens while a port-forward restarts; 429, 502, 503, 504) is asked again for a while, with
a line about it; but a run that may have been started is not started twice.
"""

import io
import logging
import re
import time
from typing import Any
from urllib.parse import urljoin, urlsplit

from urllib3 import HTTPResponse, Timeout, exceptions

from pipelines.kubeflow.answers import NoAnswer, Server
from zhllama.artifacts.json_file import value_of
from zhllama.errors import StorageFault
from zhllama.retries import with_retries

log = logging.getLogger("kubeflow")

PATIENCE = 15.0
"""Seconds for which one request is made again: a port-forward or a gateway that restarts is there by then."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 4.0
SAY_AFTER = 2
"""Tries after which it is said that a request is repeated."""
TIMEOUT = Timeout(connect=10.0, read=60.0)
"""Of a request: to connect, and between two bytes. kfp's client has none."""
MOST_BYTES = 64 * 2**20
"""Of an answer; a run's is 2 MB at most."""
MOST_SECONDS = 120.0
"""For which one answer may go on coming."""
_PASSES = (429, 502, 503, 504)
_ID = re.compile(r"[A-Za-z0-9][\w.:-]*", re.ASCII)


class Passing(StorageFault):
    """It may well be answered when it is asked again. The server may have got it or not."""


class Connection:
    """kfp's pool of connections, with every answer looked at."""

    def __init__(self, pool: Any, server: Server) -> None:
        self._pool, self._server = pool, server

    def request(self, method: str, url: str, **options: Any) -> Any:
        starts_run = method == "POST" and urlsplit(url).path.endswith("/runs")

        def worth(error: BaseException) -> bool:
            if isinstance(error, NoAnswer):
                return error.passes
            return isinstance(error, Passing) and not starts_run

        def say(error: BaseException, failures: int, spent: float) -> None:
            if failures == SAY_AFTER:
                log.warning("%s; asking again for %.0f s", str(error).partition("; ")[0], PATIENCE)

        try:
            return with_retries(
                lambda: self._asked(method, url, options), worth,
                seconds=PATIENCE, first=FIRST_WAIT, longest=LONGEST_WAIT, say=say,
            )  # fmt: skip
        except Passing as error:
            if starts_run:
                mend = f"the run may have been started: look at {self._server.address}/#/runs before you try again"
                raise StorageFault(f"{str(error).removesuffix('; try again')}; {mend}") from error
            raise

    def _asked(self, method: str, url: str, options: dict[str, Any], sent_on: bool = False) -> Any:
        server = self._server
        # its own repeats are silent, and what it is sent on to may be anybody's login page
        more = {**options, "timeout": options.get("timeout") or TIMEOUT, "redirect": False, "retries": False,
                "preload_content": False}  # fmt: skip
        try:
            answer = self._whole(method, url, self._pool.request(method, url, **more))
        except exceptions.SSLError as error:
            raise server.no_tls(error) from error
        except exceptions.ProxyError as error:
            raise server.no_way(error.original_error) from error
        except (exceptions.LocationValueError, OSError) as error:
            raise server.nobody(error, passes=False) from error
        except (exceptions.NewConnectionError, exceptions.ConnectTimeoutError) as error:
            raise server.nobody(error, passes=not isinstance(error, exceptions.NameResolutionError)) from error
        except exceptions.HTTPError as error:
            # it was sent
            raise Passing(
                f"{server.address}: {method} {_path(url)} got no whole answer ({error}); try again"
            ) from error
        if answer.status in (301, 302, 307, 308) and not sent_on:
            there = urljoin(url, answer.headers.get("Location", ""))
            if _same_but_encrypted(url, there):
                return self._asked(method, there, options, sent_on=True)
        if not 200 <= answer.status < 300:
            refusal = server.refused(answer.status, answer.reason, answer.data, answer.headers.get("Location", ""))
            if answer.status in _PASSES and isinstance(refusal, StorageFault):
                raise Passing(str(refusal))
            raise refusal
        self._check(f"{method} {_path(url)}", answer)
        return answer

    def _whole(self, method: str, url: str, answer: HTTPResponse) -> HTTPResponse:
        """The answer with its body, which may not go on for ever."""
        body, end = io.BytesIO(), time.monotonic() + MOST_SECONDS
        while piece := answer.read1(2**16, decode_content=True):
            body.write(piece)
            if body.tell() > MOST_BYTES or time.monotonic() > end:
                answer.close()
                most = f"{MOST_BYTES // 2**20} MiB" if body.tell() > MOST_BYTES else f"{MOST_SECONDS:.0f} s"
                raise self._server.not_the_api(f"{method} {_path(url)}", answer.status, f"no end within {most}", "")
        answer.release_conn()
        body.seek(0)
        return HTTPResponse(body, answer.headers, answer.status, reason=answer.reason, decode_content=False)

    def _check(self, asked: str, answer: Any) -> None:
        """Raises where a success is none: a page, a text, JSON of another shape, or only the beginning of an answer."""
        kind = str(answer.headers.get("Content-Type", "")).partition(";")[0].strip().lower()
        text = answer.data.decode(errors="replace")
        if text.strip() and (not kind.endswith("json") or text.lstrip().startswith("<")):
            raise self._server.not_the_api(asked, answer.status, kind, text)
        try:
            found = value_of(text)
        except ValueError as error:
            raise Passing(f"{self._server.address}: the answer to {asked} is empty or cut off; try again") from error
        if wrong := _wrong(found):
            raise self._server.not_the_api(asked, answer.status, wrong, "")


def _wrong(found: Any) -> str:
    """What is wrong with an answer's shape: it is an object, what it lists are objects, and ids are ids. kfp's client
    makes an object of anything."""
    if not isinstance(found, dict):
        return f"JSON with {found!r:.40} where an object belongs"
    for name, value in found.items():
        if name in _IDS and not (isinstance(value, str) and _ID.fullmatch(value)):
            return f"JSON with {name} {value!r:.40}"
        if name in _TEXTS and not isinstance(value, str | None):
            return f"JSON with {name} {value!r:.40}"
        if name in _LISTS and not isinstance(value, list | None):
            return f"JSON with {value!r:.40} where a list belongs"
        for one in (value or ()) if name in _LISTS else [value or {}] if name == "run_details" else ():
            if wrong := _wrong(one):
                return wrong
    return ""


_LISTS = ("pipelines", "pipeline_versions", "experiments", "task_details", "state_history", "child_tasks")
_IDS = ("pipeline_id", "pipeline_version_id", "experiment_id", "run_id")
_TEXTS = ("state", "display_name")


def _path(url: str) -> str:
    return urlsplit(url).path


def _same_but_encrypted(url: str, there: str) -> bool:
    """Whether http was sent on to https, and nothing else changed."""
    old, new = urlsplit(url), urlsplit(there)
    return (old.scheme, new.scheme) == ("http", "https") and old[2:4] == new[2:4] and old.hostname == new.hostname
