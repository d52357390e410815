"""A step for the runner's tests: does one small thing, as a container step of a pipeline would.

python small_step.py WHAT --option value …: `echo` writes --value to --reference; `publish` puts it into the store as
an artifact; `meet` waits until a partner has arrived too; `hang` starts a child and waits for ever; `fail` ends with
--code.
Every run appends its --name to the file that JOURNAL names.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

PATIENCE = 30.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["echo", "publish", "meet", "hang", "fail"])
    for name in ("name", "value", "reference", "store", "place", "executor-output"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--code", type=int, default=1)
    given = parser.parse_args()
    if "JOURNAL" in os.environ:
        with open(os.environ["JOURNAL"], "a", encoding="utf-8") as file:
            file.write(f"{given.name}\n")
    print(f"{given.what} {given.value}", flush=True)
    globals()[given.what](given)
    if given.executor_output:
        metadata = {"length": len(given.value)}
        value = {"artifacts": {"metrics": {"artifacts": [{"metadata": metadata}]}}}
        Path(given.executor_output).write_text(json.dumps(value), encoding="utf-8")


def echo(given: argparse.Namespace) -> None:
    Path(given.reference).write_text(given.value, encoding="utf-8")


def publish(given: argparse.Namespace) -> None:
    from zhllama.artifacts.manifest import digest_of
    from zhllama.artifacts.writer import ArtifactWriter

    out = ArtifactWriter(given.store, "small", digest_of(given.value)[:32])
    out.add_bytes("value.txt", given.value.encode())
    out.facts["summary"] = f"{len(given.value)} characters"
    manifest = out.publish("files")
    echo(argparse.Namespace(reference=given.reference, value=manifest.reference))


def meet(given: argparse.Namespace) -> None:
    """Two of these, side by side, find each other; one alone gives up with exit code 1."""
    place = Path(given.place)
    place.mkdir(parents=True, exist_ok=True)
    (place / given.name).touch()
    deadline = time.monotonic() + PATIENCE
    while len(list(place.iterdir())) < 2:
        if time.monotonic() > deadline:
            sys.exit("nobody came")
        time.sleep(0.02)
    echo(given)


def hang(given: argparse.Namespace) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    Path(given.place).mkdir(parents=True, exist_ok=True)
    (Path(given.place) / "pids").write_text(f"{os.getpid()} {child.pid}")
    child.wait()


def fail(given: argparse.Namespace) -> None:
    print(f"error: {given.value}", file=sys.stderr)
    sys.exit(given.code)


if __name__ == "__main__":
    main()
