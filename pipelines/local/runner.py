"""Runs a compiled pipeline on this machine: the same YAML, each container step a subprocess with its own command.

What a step did is recorded, so that a run picks up where an earlier one stopped, was killed or failed. Below the work
folder: `steps/<name>/log.txt`, `record.json` and `outputs/`; `run.json`, the last run; `s3/`, the S3 server's data;
`cache/`, copies of artifacts.
"""

import asyncio
import json
import os
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from pipelines.local import plan as planning
from pipelines.local.ir import read_package
from pipelines.local.placeholders import Surroundings, Value
from pipelines.local.plan import Ended, Node, Plan, State, checked_arguments
from pipelines.local.processes import Ledger, alone_in, send
from pipelines.local.records import Record, RunResult, forget, key_of, outputs_written, read_record
from pipelines.local.run_table import Row, RunTable, duration, last_lines
from pipelines.local.s3_server import BUCKET, LocalS3
from zhllama import storage
from zhllama.errors import EXIT_CANCELLED, EXIT_DONE, EXIT_FAULT, EXIT_INPUT, InputError
from zhllama.kubernetes.pods import POD_PLACES
from zhllama.stage.child_processes import die_with_parent
from zhllama.stage.tls import CA_VARIABLE

GRACE = 150.0
"""Seconds between SIGTERM and SIGKILL: more than a training job gives its own processes (120)."""
ALONE = ("launch_training", "pretrain", "finetune")
"""Stages that use every core, so that nothing runs beside them."""
SHOWN = 20
"""Lines of a failed step's log that are shown."""


@contextmanager
def s3_for(work: Path, store: str, attach: bool = False) -> Iterator[str]:
    """The store, reachable: an S3 server on this machine unless an endpoint is set or the store is elsewhere. While it
    is open the environment names the server, for this process and its children. attach: the server of a run, where one
    goes on."""
    store = store or f"s3://{BUCKET}/artifacts"
    endpoint = os.environ.get("ZHLLAMA_S3_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL_S3")
    if endpoint or not f"{store}/".startswith(f"s3://{BUCKET}/"):
        yield store
        return
    before = dict(os.environ)
    with LocalS3(work / "s3", attach=attach) as server:
        try:
            os.environ.update(server.environment())
            for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
                os.environ.pop(name, None)
            storage.forget_client()
            yield store
        finally:
            os.environ.clear()
            os.environ.update(before)
            storage.forget_client()


def run_pipeline(
    package: Path,
    arguments: Mapping[str, Value],
    work: Path,
    *,
    until: str = "",
    start_from: str = "",
    parallel: int = 2,
    again: str = "",
) -> RunResult:
    """Runs a compiled pipeline and returns how it went; InputError for what is wrong before anything runs.

    arguments: the pipeline's parameters, as texts or values; a `store` that is not given is on an S3 server of our own.
    until: the last step to run, with what it needs. start_from: run this step again, and what follows from it. again:
    the command that goes on after a failure, for the message.
    """
    if parallel < 1:
        raise InputError(f"--parallel {parallel}: at least one step has to run")
    work = work.absolute()
    spec = read_package(package)
    with alone_in(work) as ledger, ExitStack() as stack:
        if "store" in spec.root.parameters:
            given = str(arguments.get("store") or "")
            checked_arguments(spec, {**arguments, "store": given or "s3://pending"})
            store = stack.enter_context(s3_for(work, given))
            storage.check_writable(store)
            arguments = {**arguments, "store": storage.normalise(store)}
        if not (work / "id").exists():
            storage.write_bytes(str(work / "id"), str(uuid.uuid4()).encode())
        # it stays the same in a work folder: going on is the same run
        identity = (work / "id").read_text().strip()
        job = {
            "pipeline_job_uuid": identity,
            "pipeline_job_name": f"{spec.name}-local",
            "pipeline_job_resource_name": f"{spec.name}-{identity}",
        }
        plan = Plan(spec, checked_arguments(spec, arguments), job)
        plan.rehearse()
        if until:
            plan.until(plan.named(until, "--until"))
        run = _Run(plan, work, ledger, parallel)
        if start_from:
            named = plan.named(start_from, "--from")
            for path in {node.path for node in named}.union(*(plan.after(node.path) for node in named)):
                forget(run.folder(plan.nodes[path]))
        result = asyncio.run(run.whole())
        run.say(result, f"to go on: {again} (what is done is kept)" if again else "")
        return result


def last_model(work: Path) -> str:
    """The model that the last run in a work folder ended with: what its last steps were given, or the last it made."""
    try:
        steps = json.loads((work / "run.json").read_text())["steps"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"--work {work}: no run has been here; start one with: zhllama run") from error
    given = [step["inputs"].get("model") for step in steps.values() if step["stage"] in ("generate", "evaluate")]
    made = [step["reference"] for step in steps.values() if step["kind"] == "hf-model"]
    for found in (*reversed(given), *reversed(made)):
        if found:
            return str(found)
    raise InputError(f"--work {work}: the last run made no model; see its steps with: zhllama run")


class _Run:
    """One run: starts what the plan lets start, until nothing is left."""

    def __init__(self, plan: Plan, work: Path, ledger: Ledger, parallel: int) -> None:
        self._plan = plan
        self._work = work
        self._ledger = ledger
        self._parallel = parallel
        self._ended: dict[planning.Path, Ended] = {}
        self._records: dict[planning.Path, Record] = {}
        self._tasks: dict[planning.Path, asyncio.Task[None]] = {}
        self._signals = 0
        self._failures: list[tuple[Node, int, str]] = []
        self._rows = {node.path: Row(node.name, self.folder(node) / "log.txt") for node in plan.steps}
        # a step that tidies up is shown when it fails and not else
        shown = [node.path for node in plan.steps if not node.task.always and node.path in plan.wanted]
        self._table = RunTable([self._rows[path] for path in shown])

    def folder(self, node: Node) -> Path:
        return self._work / "steps" / planning.folder_of(node.name)

    async def whole(self) -> RunResult:
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            loop.add_signal_handler(number, self._told_to_stop)
        try:
            with self._table:
                await self._loop()
        finally:
            self._ledger.send(signal.SIGKILL)
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)
        result = self._result(time.monotonic() - started)
        written = json.dumps(asdict(result), ensure_ascii=False, indent=1)
        storage.write_bytes(str(self._work / "run.json"), written.encode())
        return result

    async def _loop(self) -> None:
        while True:
            snapshot = planning.Snapshot(self._plan, self._ended, self._tasks, self._signals > 0)
            for path, state in snapshot.states.items():
                if state in planning.SETTLED and self._rows[path].state is State.WAITING:
                    self._table.change(self._rows[path], state)
            for node in self._may_start(snapshot.states):
                self._tasks[node.path] = asyncio.create_task(self._step(node, snapshot))
            if not self._tasks:
                return
            finished, _ = await asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_COMPLETED)
            for path in [path for path, task in self._tasks.items() if task in finished]:
                self._tasks.pop(path).result()

    def _may_start(self, states: Mapping[planning.Path, State]) -> list[Node]:
        chosen: list[Node] = []
        alone = any(self._plan.nodes[path].module in ALONE for path in self._tasks)
        for node in (self._plan.nodes[path] for path, state in states.items() if state is State.READY):
            busy = len(self._tasks) + len(chosen)
            if node.module in ALONE:
                # it waits until everything has ended, and nothing new starts before it
                return chosen or ([node] if busy == 0 else [])
            if not alone and busy < self._parallel:
                chosen.append(node)
        return chosen

    async def _step(self, node: Node, snapshot: planning.Snapshot) -> None:
        folder, row = self.folder(node), self._rows[node.path]
        outputs = folder / "outputs"
        try:
            parameters, artifacts = snapshot.inputs(node.path)
            files = {name: str(outputs / name) for name in node.component.output_parameters}
            things = {name: str(outputs / name) for name in node.component.output_artifacts}
            around = Surroundings(parameters, artifacts, files, things, str(outputs / "executor_output.json"))
            words = self._plan.words(node, around)
            # what a task gets beside them is for its pod, or stands in one of them
            given = {
                name: around.launcher(value) if isinstance(value, str) else value
                for name, value in parameters.items()
                if name in node.component.parameters
            }
        except InputError as error:
            storage.write_bytes(str(row.log), f"error: {error}\n".encode())
            return self._fail(node, EXIT_INPUT, str(error).removeprefix(f"{node.name}: "))
        key = await asyncio.to_thread(key_of, [word.replace(str(outputs), "") for word in words], given)
        record = read_record(folder)
        if record is not None and record.key == key and await asyncio.to_thread(record.still_there):
            return self._finish(node, record, State.UNCHANGED)
        self._table.change(row, State.RUNNING)
        shutil.rmtree(outputs, ignore_errors=True)
        outputs.mkdir(parents=True)
        code = await self._process(node, words, row.log)
        if code == 0:
            try:
                values, metrics, manifest = await asyncio.to_thread(outputs_written, node, around)
            except InputError as error:
                return self._fail(node, EXIT_FAULT, str(error))
            texts = [text.decode() for text in ((manifest.to_json(), manifest.provenance_json()) if manifest else ())]
            record = Record(key, given, values, things, metrics, time.monotonic() - row.started, *texts)
            record.write(folder)
            return self._finish(node, record, State.DONE)
        if self._signals and not node.task.always:
            self._ended[node.path] = Ended(False)
            return self._table.change(row, State.FAILED, "stopped")
        return self._fail(node, code, "".join(last_lines(row.log, 1)))

    def _finish(self, node: Node, record: Record, state: State) -> None:
        self._records[node.path] = record
        self._ended[node.path] = Ended(True, record.parameters, record.artifacts)
        figure = str(record.manifest.facts.get("summary", "")) if record.manifest else ""
        self._table.change(self._rows[node.path], state, figure)

    def _fail(self, node: Node, code: int, line: str) -> None:
        line = line.removeprefix("error: ").removeprefix("fault: ")
        self._ended[node.path] = Ended(False)
        self._failures.append((node, code, line))
        self._table.change(self._rows[node.path], State.FAILED, line)

    async def _process(self, node: Node, words: list[str], log: Path) -> int:
        """Runs the command; its exit code, or minus the signal that ended it."""
        if words[0] in ("python", "python3"):
            words = [sys.executable, *words[1:]]
        # idle threads that spin would take the cores from the other step
        around = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUNBUFFERED": "1"}
        # the places in a pod are no places here
        told = node.component.environment.items()
        around |= {name: value for name, value in told if name not in (*POD_PLACES, CA_VARIABLE)}
        around.setdefault("ZHLLAMA_CACHE", str(self._work / "cache"))
        with open(log, "wb") as output:
            try:
                process = await asyncio.create_subprocess_exec(
                    *words,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=asyncio.subprocess.STDOUT,
                    env=around,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            except (OSError, ValueError) as error:
                # a ValueError: an earlier step wrote what no command can be given
                output.write(f"{words[0]}: {getattr(error, 'strerror', error)}\n".encode(errors="replace"))
                return 127
        self._ledger.add(process.pid)
        try:
            if self._signals and not node.task.always:
                send(process.pid, signal.SIGTERM)
            with suppress(TimeoutError):
                return await asyncio.wait_for(process.wait(), GRACE if node.task.always else None)
            send(process.pid, signal.SIGKILL)
            return await process.wait()
        finally:
            # whatever the step started and left behind
            send(process.pid, signal.SIGKILL)
            self._ledger.remove(process.pid)

    def _told_to_stop(self) -> None:
        """First SIGTERM to all, SIGKILL after GRACE; a second Ctrl-C does not wait."""
        self._signals += 1
        self._ledger.send(signal.SIGTERM if self._signals == 1 else signal.SIGKILL)
        if self._signals == 1:
            asyncio.get_running_loop().call_later(GRACE, self._ledger.send, signal.SIGKILL)

    def _result(self, seconds: float) -> RunResult:
        code, error = EXIT_DONE, ""
        if self._signals:
            code, error = EXIT_CANCELLED, "cancelled"
        elif self._failures:
            node, failed, line = self._failures[0]
            code = EXIT_INPUT if failed == EXIT_INPUT else EXIT_FAULT
            error = f"{node.name}: {line or f'it ended with {failed}'}"
        steps = {}
        for node in self._plan.steps:
            row, record = self._rows[node.path], self._records.get(node.path) or Record("", {}, {}, {})
            manifest = record.manifest
            steps[node.name] = {
                "name": node.name,
                "stage": node.module,
                # of the artifact that it published: hf-model, adapter, …
                "kind": manifest.kind if manifest else "",
                "state": row.state,
                "seconds": round(record.seconds or row.seconds, 2),
                "reference": record.reference,
                "inputs": record.inputs,
                "parameters": record.parameters,
                "facts": manifest.facts if manifest else {},
                "metrics": (manifest or record).metrics,
                "log": str(row.log),
            }
        return RunResult(code, error, round(seconds, 2), steps)

    def say(self, result: RunResult, again: str) -> None:
        if result.exit_code == EXIT_CANCELLED:
            print(f"cancelled after {duration(result.seconds)}" + (f"\n{again}" if again else ""), flush=True)
            return
        for node, code, _ in self._failures:
            log = self._rows[node.path].log
            how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
            lines = [f"  {line}" for line in last_lines(log, 1 if code == EXIT_INPUT else SHOWN)]
            print(f"\n{node.name} {how}. Its last lines:", *lines, f"its log: {log}", sep="\n", flush=True)
        if self._failures:
            print(again, flush=True)
