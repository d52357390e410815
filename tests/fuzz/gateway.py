"""The gateway's requests: schemathesis makes right and wrong ones of its OpenAPI and holds the answers against it.

The engine is one of the tests' own that answers whatever it is asked, and refuses a JSON that no engine should see.
"""

import json
import logging
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2

from components.serve.engines import Engine
from components.serve.fields import OF_LLAMA_CPP, OF_VLLM
from components.serve.gateway import Gateway
from components.serve.local import listening, running
from components.serve.requests import Limits
from tests.fake_engine import FakeEngine
from tests.texts import chinese_sentences, llama_shaped
from zhllama.stage.child_processes import die_with_parent
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "negative_data_rejection", "ignored_auth",
)  # fmt: skip
PER_EXAMPLE = 4
"""Requests: of each of the four operations with a body, rightly or wrongly asked. Those at their bounds come before."""
KEY = "a-key-for-the-fuzzer-only"


class Errors(logging.Handler):
    """What the server says of itself as an error: a fault, though it was answered."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(logging.Formatter().format(record))


def run(tries: int, scratch: Path) -> dict[str, Any]:
    encoder = SentencePieceEncoder(llama_shaped(islice(chinese_sentences(), 3000), 800))
    made = Engine("fake", Path(), [], "/health", takes={**OF_LLAMA_CPP, **OF_VLLM})
    errors = Errors()
    logging.getLogger().addHandler(errors)
    with FakeEngine(encoder) as engine:
        limits = Limits("zhllama", Chat(encoder), 256, made.refuses, made.takes)
        gateway = Gateway(limits, made, engine.address, lambda: True, KEY)
        with listening("127.0.0.1", 0) as listener, running(gateway.app(page=True), listener):
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            header = {"Authorization": f"Bearer {KEY}"}
            file = scratch / "openapi.json"
            file.write_bytes(httpx2.get(f"{address}/openapi.json", headers=header).content)
            # its own list of refusals lacks 413: a body may be too long before it is anything else
            refusals = ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429", "5xx"]
            settings = f"[checks.negative_data_rejection]\nexpected-statuses = {json.dumps(refusals)}\n"
            (scratch / "schemathesis.toml").write_text(settings)
            command = [sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", address]
            command += ["--header", f"Authorization: Bearer {KEY}", "--max-examples", str(-(-tries // PER_EXAMPLE))]
            command += ["--phases", "coverage,fuzzing", "--checks", ",".join(CHECKS), "--request-timeout", "20"]
            command += ["--suppress-health-check", "all", "--generation-database", "none", "--no-color"]
            done = subprocess.run(command, cwd=scratch, check=False, preexec_fn=die_with_parent)
            # it lives on
            assert httpx2.get(f"{address}/health").json() == {"status": "ok"}
    logging.getLogger().removeHandler(errors)
    if done.returncode or errors.said:
        sys.exit("\n".join(["the gateway did not hold; what it said:", *errors.said]))
    asked = [body for path, body in engine.seen if path.startswith("/v1/")]
    return {"requests the engine saw": len(asked), "errors": 0}
