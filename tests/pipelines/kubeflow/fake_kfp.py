"""A server that speaks what of Kubeflow Pipelines' API runs need: pipelines and versions, experiments, runs. It replays
what the real one answered (tests/recordings/kfp)."""

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs, urlsplit

RECORDINGS = Path(__file__).resolve().parents[2] / "recordings" / "kfp"
BEGAN = "2026-11-25T10:00:00Z"
EXPERIMENT = {
    "experiment_id": "e1", "display_name": "zhllama", "namespace": "team", "created_at": BEGAN,
    "storage_state": "AVAILABLE", "last_run_created_at": BEGAN,
}  # fmt: skip


def recorded(name: str) -> Any:
    return json.loads((RECORDINGS / f"{name}.json").read_text())


def exchange(method: str, path: str, body: Any = None) -> dict[str, Any]:
    """A recorded exchange: status, content_type, body."""
    asked = {"method": method, "path": path, "body": body}
    found: dict[str, Any] = next(one for one in recorded("exchanges") if one["request"] == asked)
    return found


API = "/apis/v2beta1"
NO_RUN = "00000000-0000-0000-0000-000000000000"
OVER = "06dfae75-f586-4748-a03e-a93d0e747c02"
"""A recorded run that was over when it was told to end."""
STATES = ("PENDING", "RUNNING", "CANCELING", "SUCCEEDED", "FAILED")
"""Of a run, as the real server says them; one that was cancelled ends FAILED."""


def task(name: str, state: str) -> dict[str, Any]:
    return {"display_name": name, "state": state, "start_time": BEGAN, "end_time": "2026-11-25T10:01:05Z"}


class FakeKfp(ThreadingHTTPServer):
    """Keeps what it was sent. `answers`: statuses that it gives to the next calls instead, in turn (200: none).

    `course`: what a run looks like at each look, the last one for ever: (state, tasks). None at all: it was deleted.
    What the recordings do not tell (other filters, other calls) it answers with 501 and says so.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.started: list[dict[str, Any]] = []
        self.tokens: list[str] = []
        self.asked: list[str] = []
        """Method and path of every request."""
        self.pipelines: dict[str, list[str]] = {}
        self.owned: dict[str, str] = {}
        """Pipeline → the namespace that it was uploaded to, "" where all share it."""
        self.experiments = [EXPERIMENT]
        self.terminated: list[str] = []
        self.after_terminate: list[tuple[str, list[dict[str, Any]]]] = [("CANCELING", []), ("FAILED", [])]
        """The course of a run that was told to end."""
        self.answers: list[int] = []
        self.bodies: list[tuple[int, str, Any]] = []
        """Answers in place of the next ones: (status, content type, body), an empty one for none."""
        self.always: dict[str, tuple[int, dict[str, str], str]] = {}
        """Beginning of `METHOD path` → what stands there in front of the API: (status, headers, body)."""
        self.runs: dict[str, dict[str, Any]] = {}
        """Run id → what the real server answered."""
        self.titles: dict[str, str] = {}
        """Task → the name that each version's specification gives it."""
        self.course: list[tuple[str, list[dict[str, Any]]]] = [("SUCCEEDED", [task("evaluate", "SUCCEEDED")])]
        self.history: list[str] = []

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def look(self) -> dict[str, Any]:
        state, tasks = self.course.pop(0) if len(self.course) > 1 else self.course[0]
        assert state in STATES, f"no run has ever been seen in the state {state}"
        if self.history[-1:] != [state]:
            self.history.append(state)
        around = [task("root", state), *(task(f"{one['display_name']}-driver", "SUCCEEDED") for one in tasks)]
        return {
            "run_id": "r-42", "experiment_id": "e1", "display_name": "mine", "state": state, "created_at": BEGAN,
            "finished_at": "2026-11-25T10:02:00Z", "run_details": {"task_details": [*around, *tasks]},
            "state_history": [{"update_time": BEGAN, "state": one} for one in self.history],
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: FakeKfp

    def do_GET(self) -> None:
        if self._refused():
            return None
        path, query = self._path()
        given = {name: values[0] for name, values in parse_qs(query).items()}
        predicates = json.loads(given.get("filter", "{}")).get("predicates", ())
        if any(one.get("operation") not in ("EQUALS", 1) for one in predicates):
            return self._unknown(f"a filter by {predicates}")
        # what is asked for by name
        wanted = [one.get("stringValue", one.get("string_value")) for one in predicates]
        most = int(given.get("page_size", 10))
        if path.endswith("/versions"):
            versions = [name for name in self.server.pipelines[path.split("/")[-2]] if name in wanted or not wanted]
            listed = [{"pipeline_version_id": f"v-{name}", "display_name": name} for name in versions]
            return self._list("pipeline_versions", listed, most)
        if path == f"{API}/pipelines":
            owned = self.server.owned
            there = [name for name in owned if owned[name] == given.get("namespace", "")]
            there = [name for name in there if name in wanted or not wanted]
            return self._list("pipelines", list(map(_pipeline, there)), most)
        if path == f"{API}/experiments":
            there = [one for one in self.server.experiments if one["display_name"] in wanted or not wanted]
            return self._list("experiments", there, most)
        if "/pipelines/names/" in path:
            name = path.split("/")[-1]
            if name in self.server.pipelines:
                return self._say(200, _pipeline(name))
            return self._recorded(exchange("GET", f"{API}/pipelines/names/none-such"), "none-such", name)
        if "/versions/" in path:
            tasks = {name: {"taskInfo": {"name": title}} for name, title in self.server.titles.items()}
            spec = {"pipeline_spec": {"root": {"dag": {"tasks": tasks}}}, "platform_spec": {}}
            return self._say(200, {"pipeline_version_id": path.split("/")[-1], "pipeline_spec": spec})
        if path.startswith(f"{API}/runs/"):
            run = path.split("/")[-1]
            if run in self.server.runs:
                return self._say(200, self.server.runs[run])
            if run == "r-42" and self.server.course:
                return self._say(200, self.server.look())
            return self._recorded(exchange("GET", f"{API}/runs/{NO_RUN}"), NO_RUN, run)
        if path.startswith(f"{API}/experiments/"):
            return self._say(200, EXPERIMENT)
        if path == f"{API}/healthz":
            return self._recorded(exchange("GET", path))
        if path == f"{API}/runs":
            return self._unknown("a list of runs")
        return self._recorded(exchange("GET", f"{API}/nothing" if path.startswith(API) else "/nothing"))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._refused():
            return None
        path, query = self._path()
        if path == f"{API}/pipelines":
            given = json.loads(body)
            name = given["display_name"]
            if name in self.server.pipelines:
                said = f"Failed to create a new pipeline. The name {name} already exist."
                return self._say(409, {"code": 6, "message": said})
            self.server.pipelines[name] = []
            self.server.owned[name] = given.get("namespace", "")
            return self._say(200, _pipeline(name))
        if path.endswith("/upload_version"):
            name, pipeline = (re.search(f"(?:^|&){key}=([^&]+)", query)[1] for key in ("name", "pipelineid"))  # type: ignore[index]
            self.server.pipelines[pipeline].append(name)
            return self._say(200, {"pipeline_id": pipeline, "pipeline_version_id": f"v-{name}", "display_name": name})
        if path == f"{API}/runs":
            given = json.loads(body)
            version = given.get("pipeline_version_reference", {})
            if not given.get("pipeline_spec") and not version:
                return self._recorded(exchange("POST", path, {"display_name": "x"}))
            if version and version["pipeline_id"] not in self.server.pipelines:
                refused = {"display_name": "x", "pipeline_version_reference": {"pipeline_id": NO_RUN}}
                return self._recorded(exchange("POST", path, refused), NO_RUN, version["pipeline_id"])
            self.server.started.append(given)
            return self._say(200, {**given, "run_id": "r-42", "state": "PENDING"})
        if path.endswith(":terminate"):
            run = path.split("/")[-1].partition(":")[0]
            if run not in self.server.runs and run != "r-42":
                return self._recorded(exchange("POST", f"{API}/runs/{NO_RUN}:terminate"), NO_RUN, run)
            if self.server.runs.get(run, {}).get("state") in ("SUCCEEDED", "FAILED"):
                return self._recorded(exchange("POST", f"{API}/runs/{OVER}:terminate"), OVER, run)
            self.server.terminated.append(run)
            self.server.course = list(self.server.after_terminate)
            return self._say(200, {})
        if path == f"{API}/experiments":
            self.server.experiments.append({**EXPERIMENT, **json.loads(body)})
            return self._say(200, self.server.experiments[-1])
        return self._unknown(f"POST {path}")

    def _list(self, name: str, found: list[dict[str, Any]], most: int) -> None:
        more = {"next_page_token": "page 2"} if len(found) > most else {}
        self._say(200, {name: found[:most], "total_size": len(found), **more} if found else {})

    def _recorded(self, one: dict[str, Any], old: str = "", new: str = "") -> None:
        """What was recorded, said of another thing of its kind."""
        body = one["body"] if isinstance(one["body"], str) else json.dumps(one["body"])
        self._say(one["status"], body.replace(old, new) if old else body, one["content_type"])

    def _unknown(self, what: str) -> None:
        self._say(501, {"code": 12, "message": f"this stand-in does not know what the real server answers to {what}"})

    def _path(self) -> tuple[str, str]:
        """Path and query; through a proxy the whole address comes."""
        asked = urlsplit(self.path)
        return asked.path, asked.query

    def _refused(self) -> bool:
        self.server.tokens.append(self.headers.get("Authorization", ""))
        self.server.asked.append(f"{self.command} {self._path()[0]}")
        for beginning, (status, headers, text) in self.server.always.items():
            if self.server.asked[-1].startswith(beginning):
                self._say(status, text, headers=headers)
                return True
        if self.server.bodies:
            said, kind, value = self.server.bodies.pop(0)
            if said:
                self._say(said, value, kind)
                return True
        status = self.server.answers.pop(0) if self.server.answers else 200
        if status != 200:
            self._say(status, {"message": "no such namespace"})
        return status != 200

    def _say(
        self, status: int, value: Any, kind: str = "application/json", headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Type": kind, "Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _pipeline(name: str) -> dict[str, Any]:
    return {"pipeline_id": name, "display_name": name, "name": name, "created_at": BEGAN}


@contextmanager
def fake_kfp() -> Iterator[FakeKfp]:
    server = FakeKfp()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
