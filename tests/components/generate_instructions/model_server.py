"""A chat completions server that does what it is told: answers, streams, fails, throttles, truncates and lies.

What it writes depends on the request's text alone, so that runs can be compared; it counts what it bills, a character a
token, when the model has done the work, whether or not the answer arrives. It has files and batches, too.
"""

import hashlib
import json
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NoReturn

CHARACTERS = [chr(0x4E00 + number) for number in range(2000)]


@dataclass(frozen=True)
class Do:
    """What happens to one request. All of them are worked on and billed, but those with a status.

    status: an error in place of an answer. drop: the connection is closed without a word. cut: a stream breaks after
    so many characters. hang: nothing comes until the client leaves. html: a page. usage: what is said to be billed, in
    place of the truth (None: nothing is said). finish: "length" for an answer that its limit cut (see `cut`).
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    error: Mapping[str, Any] = field(default_factory=dict)
    drop: bool = False
    cut: int = 0
    hang: bool = False
    html: bool = False
    inside: Any = None
    """A body of status 200 in place of an answer's."""
    events: bool = False
    """That body is sent as an event of a stream."""
    endless: tuple[str, bytes, bytes] | None = None
    """A body without end in place of an answer: its content type, its beginning, and what is repeated."""
    parts: bool = False
    """The content is a list of parts, thoughts first."""
    usage: Any = "the truth"
    finish: str = "stop"
    text: str | None = None
    before: Callable[[], None] | None = None
    after: Callable[[], None] | None = None


@dataclass
class Asked:
    """One request as it came."""

    path: str
    body: dict[str, Any]
    key: str
    time: float

    @property
    def text(self) -> str:
        return str(self.body["messages"][0]["content"])


def written(text: str, count: int) -> list[dict[str, Any]]:
    """Items that belong to a request's text: one of them is another request's too, one is none."""
    chance = random.Random(hashlib.sha256(text.encode()).hexdigest())
    items: list[dict[str, Any]] = [
        {
            "topic": chance.randint(1, 10),
            "task_type": chance.randint(1, 10),
            "instruction": "请" + "".join(chance.choices(CHARACTERS, k=18)) + "？",
            "input": "",
            "output": "答：" + "".join(chance.choices(CHARACTERS, k=30)) + "。",
        }
        for _ in range(count)
    ]
    if count > 2:
        common = random.Random(chance.randint(0, 3))
        items[1]["instruction"] = "把" + "".join(common.choices(CHARACTERS, k=18)) + "写完整"
        items[2]["output"] = ""
    return items


def count_in(text: str) -> int:
    found = re.search(r"请编写 (\d+) 条", text)
    assert found is not None
    return int(found[1])


class ModelServer:
    """`do` says what happens to a request (None: it is answered). `takes`: the optional fields that it understands."""

    def __init__(self) -> None:
        self.do: Callable[[Asked], Do | None] = lambda asked: None
        self.takes = {"json_schema", "json_object", "temperature", "stream", "stream_options", "max_tokens"}
        self.script: list[Any] = []
        """Texts or Dos for the next requests; its last entry goes on for ever."""
        self.asked: list[Asked] = []
        self.billed_prompt = 0
        self.billed_answer = 0
        self.answers = 0
        """Requests that the model worked on."""
        self.sent = 0
        """Bytes of bodies without end."""
        self.worked: list[str] = []
        """Their texts."""
        self.out = self.most_out = 0
        """Requests being worked on, now and at most."""
        self.latency: Callable[[Asked], float] = lambda asked: 0.0
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.batch_do: Callable[[str, dict[str, Any]], None] = lambda what, batch: None
        """Called with "create", "retrieve" or "list" and the batch; may change it or raise Dropped."""
        self.has_batches = True
        self.lock = threading.Lock()
        self._closing = threading.Event()
        server = self

        class Handler(_Handler):
            model = server

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def billed(self) -> int:
        return self.billed_prompt + self.billed_answer

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def told(self, asked: Asked) -> Do:
        """What to do with a request; under the lock, so that a script's entries go out one by one."""
        if self.script:
            entry = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            return entry if isinstance(entry, Do) else Do(text=entry)
        return self.do(asked) or Do()

    def refusal(self, body: Mapping[str, Any]) -> str:
        """Why a field of the request is not taken, or nothing."""
        form = (body.get("response_format") or {}).get("type")
        if form in ("json_schema", "json_object") and form not in self.takes:
            return f"response_format of type {form} is not supported"
        for name in ("temperature", "stream_options", "stream", "max_tokens"):
            if name in body and name not in self.takes:
                hint = ", use 'max_completion_tokens' instead" if name == "max_tokens" else ""
                return f"Unsupported parameter: '{name}'{hint}"
        return ""

    def completion(self, asked: Asked, do: Do) -> tuple[str, dict[str, Any] | None]:
        """The content and the usage as the server says it; counts the bill."""
        count = count_in(asked.text)
        content = do.text
        if content is None:
            content = json.dumps({"items": written(asked.text, count)}, ensure_ascii=False)
        limit = asked.body.get("max_tokens") or asked.body.get("max_completion_tokens")
        assert limit is not None, "every request bounds its answer"
        content = content[:limit]
        if do.finish == "length":
            content = content[: do.cut]
        prompt = len(asked.text)
        with self.lock:
            self.answers += 1
            self.worked.append(asked.text)
            self.billed_prompt += prompt
            self.billed_answer += len(content)
        truth = {"prompt_tokens": prompt, "completion_tokens": len(content), "total_tokens": prompt + len(content)}
        return content, truth if do.usage == "the truth" else do.usage

    def wait_for_the_end(self) -> None:
        self._closing.wait(60)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # sixteen connect at once: with socketserver's 5, a busy machine resets some, which are no faults of a test's making
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Dropped(Exception):
    """The connection is closed without an answer."""


class _Handler(BaseHTTPRequestHandler):
    model: ModelServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def parse_request(self) -> bool:
        """As a proxy, too: it is asked for http://any.host/v1/… then, and answers in that host's place."""
        whole = super().parse_request()
        if whole and self.path.startswith("http://"):
            self.path = "/" + self.path.split("/", 3)[3]
        return whole

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        raw = self.rfile.read(length)
        try:
            if len(raw) < length:
                # the client was killed while it sent it
                raise Dropped
            if self.path == "/v1/chat/completions":
                self._chat(json.loads(raw))
            elif self.path == "/v1/files" and self.model.has_batches:
                self._upload(raw)
            elif self.path == "/v1/batches" and self.model.has_batches:
                self._create(json.loads(raw))
            else:
                self._send(404, {"error": {"message": "no such page"}})
        except (Dropped, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            self.connection.close()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        batches = self.model.batches
        try:
            if path == "/v1/batches" and self.model.has_batches:
                self.model.batch_do("list", {})
                self._send(200, {"object": "list", "data": list(batches.values()), "has_more": False})
            elif path.startswith("/v1/batches/"):
                batch = batches[path.rsplit("/", 1)[1]]
                self._work_on(batch)
                self.model.batch_do("retrieve", batch)
                self._send(200, batch)
            elif path.startswith("/v1/files/"):
                self._bytes(200, self.model.files[path.split("/")[3]], "application/jsonl")
            else:
                self._send(404, {"error": {"message": "no such page"}})
        except (Dropped, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            self.connection.close()

    # --- chat ---------------------------------------------------------------------------------------------------------

    def _chat(self, body: dict[str, Any]) -> None:
        model = self.model
        asked = Asked(self.path, body, self.headers.get("Authorization", ""), time.monotonic())
        with model.lock:
            model.asked.append(asked)
            refusal = model.refusal(body)
            do = Do() if refusal else model.told(asked)
            model.out += 1
            model.most_out = max(model.most_out, model.out)
        try:
            if do.before is not None:
                do.before()
            if refusal:
                self._send(400, {"error": {"message": refusal, "type": "invalid_request_error"}})
                return
            self._answer(asked, do)
        finally:
            with model.lock:
                model.out -= 1
            if do.after is not None:
                do.after()

    def _answer(self, asked: Asked, do: Do) -> None:
        model = self.model
        if do.status and not do.endless:
            self._send(do.status, {"error": {"message": f"status {do.status}", **do.error}}, do.headers)
            return
        if do.endless is not None:
            self._without_end(do)
        if do.inside is not None:
            sent = json.dumps(do.inside, ensure_ascii=False).encode()
            kind = "text/event-stream" if do.events else "application/json"
            self._bytes(200, b"data: " + sent + b"\n\n" if do.events else sent, kind, do.headers)
            return
        if wait := model.latency(asked):
            time.sleep(wait)
        content, usage = model.completion(asked, do)
        if do.html:
            self._bytes(200, b"<html>a page</html>", "text/html")
            return
        if do.hang:
            model.wait_for_the_end()
        if do.drop or do.hang:
            raise Dropped
        if asked.body.get("stream"):
            self._stream(asked, do, content, usage)
            return
        if do.parts:
            thoughts = {"type": "thinking", "thinking": [{"type": "text", "text": content}]}
            content = [thoughts, {"type": "text", "text": content[:9]}, {"type": "text", "text": content[9:]}]  # type: ignore[assignment]
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "finish_reason": do.finish, "message": message}
        made = {"id": "x", "object": "chat.completion", "created": 1, "model": "real-name", "choices": [choice]}
        sent = json.dumps(made | ({"usage": usage} if usage else {}), ensure_ascii=False).encode()
        self._bytes(200, sent, "application/json", break_after=len(sent) // 2 if do.cut and do.finish == "stop" else 0)

    def _without_end(self, do: Do) -> NoReturn:
        assert do.endless is not None
        kind, begin, again = do.endless
        self.send_response(do.status or 200)
        self.send_header("Content-Type", kind)
        for name, value in do.headers.items():
            self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(begin)
        again *= 2**16 // len(again)
        while True:
            self._chunk(again)
            self.model.sent += len(again)

    def _stream(self, asked: Asked, do: Do, content: str, usage: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        broken = do.cut if do.finish == "stop" else 0
        shown = content[:broken] if broken else content
        for at in range(0, len(shown), 400):
            self._event({"delta": {"content": shown[at : at + 400]}, "finish_reason": None})
        if broken:
            raise Dropped
        self._event({"delta": {}, "finish_reason": do.finish})
        if usage and (asked.body.get("stream_options") or {}).get("include_usage"):
            self._event(None, usage)
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, choice: dict[str, Any] | None, usage: Any = None) -> None:
        choices = [] if choice is None else [{"index": 0, **choice}]
        event = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "real-name", "choices": choices}
        self._chunk(f"data: {json.dumps(event | {'usage': usage})}\n\n".encode())

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    # --- files and batches --------------------------------------------------------------------------------------------

    def _upload(self, raw: bytes) -> None:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = BytesParser().parsebytes(head + raw).get_payload()
        assert isinstance(parts, list)
        contents = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in parts
        }
        assert contents["purpose"] == b"batch"
        with self.model.lock:
            name = f"file-{len(self.model.files)}"
            self.model.files[name] = contents["file"]
        self._send(200, self._file(name))

    def _file(self, name: str) -> dict[str, Any]:
        size = len(self.model.files[name])
        known = {"object": "file", "purpose": "batch", "status": "processed", "created_at": 1, "filename": "f"}
        return {"id": name, "bytes": size, **known}

    def _create(self, body: dict[str, Any]) -> None:
        with self.model.lock:
            name = f"batch_{len(self.model.batches)}"
            lines = self.model.files[body["input_file_id"]].decode().splitlines()
            batch = {
                "id": name, "object": "batch", "endpoint": body["endpoint"], "input_file_id": body["input_file_id"],
                "completion_window": "24h", "status": "validating", "created_at": 1, "metadata": body.get("metadata"),
                "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            }  # fmt: skip
            self.model.batches[name] = batch
        self.model.batch_do("create", batch)
        self._send(200, batch)

    def _work_on(self, batch: dict[str, Any]) -> None:
        """Looked at once it is in progress; looked at again it is done."""
        if batch["status"] != "in_progress":
            batch["status"] = "in_progress" if batch["status"] == "validating" else batch["status"]
            return
        good, bad = [], []
        for line in self.model.files[batch["input_file_id"]].decode().splitlines():
            value = json.loads(line)
            asked = Asked("batch", value["body"], "", time.monotonic())
            with self.model.lock:
                self.model.asked.append(asked)
                do = self.model.told(asked)
            if do.drop:
                continue
            if do.inside is not None:
                answer = {"status_code": 200, "body": do.inside}
            elif do.status:
                answer = {"status_code": do.status, "body": {"error": {"message": "status"}}}
            else:
                content, usage = self.model.completion(asked, do)
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
                answer = {"status_code": 200, "body": {"model": "real-name", "choices": [choice], "usage": usage}}
            kept = {"id": "x", "custom_id": value["custom_id"], "response": answer, "error": None}
            (bad if do.status else good).append(json.dumps(kept, ensure_ascii=False))
        # in any order, as OpenAI's
        random.Random(1).shuffle(good)
        for kind, lines in (("output_file_id", good), ("error_file_id", bad)):
            if lines:
                with self.model.lock:
                    name = f"file-{len(self.model.files)}"
                    self.model.files[name] = "\n".join(lines).encode()
                batch[kind] = name
        batch["status"] = "completed"

    # --- plumbing -----------------------------------------------------------------------------------------------------

    def _send(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._bytes(status, json.dumps(value, ensure_ascii=False).encode(), "application/json", headers)

    def _bytes(
        self, status: int, content: bytes, kind: str, headers: Mapping[str, str] | None = None, break_after: int = 0
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if break_after:
            self.wfile.write(content[:break_after])
            raise Dropped
        self.wfile.write(content)
