"""A server that speaks what of Kubeflow Pipelines' API runs need: pipelines and versions, experiments, runs. It replays
what the real one answered (tests/recordings/kfp)."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

RECORDINGS = Path(__file__).resolve().parents[2] / "recordings" / "kfp"
BEGAN = "2026-11-25T10:00:00Z"
EXPERIMENT = {"experiment_id": "e1", "display_name": "zhllama", "namespace": "team"}


def recorded(name: str) -> Any:
    return json.loads((RECORDINGS / f"{name}.json").read_text())


def task(name: str, state: str, error: str = "") -> dict[str, Any]:
    made = {"display_name": name, "state": state, "start_time": BEGAN, "end_time": "2026-11-25T10:01:05Z"}
    return {**made, "error": {"code": 1, "message": error}} if error else made


class FakeKfp(ThreadingHTTPServer):
    """Keeps what it was sent. `answers`: statuses that it gives to the next calls instead, in turn (200: none).

    `course`: what a run looks like at each look, the last one for ever: (state, tasks). None at all: it was deleted.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.started: list[dict[str, Any]] = []
        self.tokens: list[str] = []
        self.pipelines: dict[str, list[str]] = {}
        self.owned: dict[str, str] = {}
        """Pipeline → the namespace that it was uploaded to, "" where all share it."""
        self.terminated: list[str] = []
        self.answers: list[int] = []
        self.bodies: list[tuple[int, str, Any]] = []
        """Answers in place of the next ones: (status, content type, body), an empty one for none."""
        self.runs: dict[str, dict[str, Any]] = {}
        """Run id → what the real server answered."""
        self.titles: dict[str, str] = {}
        """Task → the name that each version's specification gives it."""
        self.course: list[tuple[str, list[dict[str, Any]]]] = [("SUCCEEDED", [task("evaluate", "SUCCEEDED")])]

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def look(self) -> dict[str, Any]:
        state, tasks = self.course.pop(0) if len(self.course) > 1 else self.course[0]
        around = [task("root", state), *(task(f"{one['display_name']}-driver", "SUCCEEDED") for one in tasks)]
        return {
            "run_id": "r-42", "display_name": "mine", "state": state, "created_at": BEGAN,
            "finished_at": "2026-11-25T10:02:00Z", "run_details": {"task_details": [*around, *tasks]},
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: FakeKfp

    def do_GET(self) -> None:
        if self._refused():
            return
        path, _, query = self.path.partition("?")
        given = {name: values[0] for name, values in parse_qs(query).items()}
        # what is asked for by name
        wanted = [one["stringValue"] for one in json.loads(given.get("filter", "{}")).get("predicates", ())]
        if path.endswith("/versions"):
            versions = [name for name in self.server.pipelines[path.split("/")[-2]] if name in wanted or not wanted]
            listed = [{"pipeline_version_id": f"v-{name}", "display_name": name} for name in versions[:10]]
            self._say(200, {"pipeline_versions": listed})
        elif path.endswith("/pipelines"):
            owned = self.server.owned
            there = [name for name in owned if name in wanted and owned[name] == given.get("namespace", "")]
            self._say(200, {"pipelines": [{"pipeline_id": name, "display_name": name} for name in there]})
        elif "/versions/" in path:
            tasks = {name: {"taskInfo": {"name": title}} for name, title in self.server.titles.items()}
            spec = {"pipeline_spec": {"root": {"dag": {"tasks": tasks}}}, "platform_spec": {}}
            self._say(200, {"pipeline_version_id": path.split("/")[-1], "pipeline_spec": spec})
        elif path.split("/")[-1] in self.server.runs:
            self._say(200, self.server.runs[path.split("/")[-1]])
        elif "/runs/" in path:
            there = path.endswith("r-42") and self.server.course
            self._say(200, self.server.look()) if there else self._gone(path)
        elif "/experiments" in path:
            self._say(200, {"experiments": [EXPERIMENT]} if "?" in self.path else EXPERIMENT)
        else:
            self._say(200, {"multi_user": False})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._refused():
            return
        path, _, query = self.path.partition("?")
        if path.endswith("/pipelines"):
            given = json.loads(body)
            name = given["display_name"]
            if name in self.server.pipelines:
                self._say(
                    409, {"code": 6, "message": f"Failed to create a new pipeline. The name {name} already exist."}
                )
                return
            self.server.pipelines[name] = []
            self.server.owned[name] = given.get("namespace", "")
            self._say(200, {"pipeline_id": name, "display_name": name})
        elif path.endswith("/upload_version"):
            name, pipeline = (re.search(f"(?:^|&){key}=([^&]+)", query)[1] for key in ("name", "pipelineid"))  # type: ignore[index]
            self.server.pipelines[pipeline].append(name)
            self._say(200, {"pipeline_id": pipeline, "pipeline_version_id": f"v-{name}", "display_name": name})
        elif path.endswith("/runs"):
            self.server.started.append(json.loads(body))
            self._say(200, {**json.loads(body), "run_id": "r-42"})
        elif path.endswith(":terminate"):
            self.server.terminated.append(path.split("/")[-1].partition(":")[0])
            self.server.course = [("CANCELING", [])]
            self._say(200, {})
        else:
            self._say(200, EXPERIMENT)

    def _gone(self, path: str) -> None:
        run = path.split("/")[-1]
        words = f"Failed to get a run: Failed to fetch run {run}: ResourceNotFoundError: Run {run} not found"
        self._say(404, {"code": 5, "message": words, "details": []})

    def _refused(self) -> bool:
        self.server.tokens.append(self.headers.get("Authorization", ""))
        if self.server.bodies:
            said, kind, value = self.server.bodies.pop(0)
            if said:
                self._say(said, value, kind)
                return True
        status = self.server.answers.pop(0) if self.server.answers else 200
        if status != 200:
            self._say(status, {"message": "no such namespace"})
        return status != 200

    def _say(self, status: int, value: Any, kind: str = "application/json") -> None:
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def fake_kfp() -> Iterator[FakeKfp]:
    server = FakeKfp()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
