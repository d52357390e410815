"""Runs on Kubeflow Pipelines: `zhllama submit`, `status`, `cancel` and `reap`."""

import argparse
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pipelines.cli import options
from pipelines.kubeflow.answers import Deleted
from pipelines.kubeflow.runs import CANCELLED, DONE, FAILED, NOT_RUN, PENDING, UNKNOWN, Run, Step, word
from zhllama import terminal
from zhllama.errors import EXIT_CANCELLED, EXIT_DONE, EXIT_FAULT, EXIT_INPUT
from zhllama.storage.private import temporary_folder
from zhllama.terminal import say

if TYPE_CHECKING:
    from pipelines.kubeflow.client import Kubeflow

COLOURS = {
    "SUCCEEDED": "green", "FAILED": "bold red", "RUNNING": "cyan", "CANCELED": "yellow", "CANCELING": "yellow",
    "NOT_RUN": "dim", "UNKNOWN": "dim",
}  # fmt: skip
_SERVICE = (
    "of Kubeflow Pipelines; its token: ZHLLAMA_KFP_TOKEN or ZHLLAMA_KFP_TOKEN_FILE. Without: the service itself inside "
    "a cluster, kubectl port-forward elsewhere"
)
_HOST: tuple[options.Row, ...] = (
    ("--host URL", _SERVICE),
    ("--ui URL", "of its pages, where that is another address"),
    ("--kfp-namespace", "where Kubeflow Pipelines runs (without --host)", "kubeflow"),
    ("--namespace", "the profile's namespace, where there are profiles", str),
)
_RUN = ("run RUN", "the run's id")
_WAIT = ("--wait", "follow the run, and end as it ends", False)


def add_to(commands: options.Commands) -> None:
    note = "compile the pipeline and start a run on Kubeflow Pipelines"
    add = options.command(commands, "submit", submit, note)
    options.take_compilation(add)
    options.take(
        add,
        *_HOST,
        ("--experiment", None, "zhllama"),
        ("--pipeline NAME", "uploaded as this (default: adapt-llama-<size>)"),
        ("--run-name", "default: the pipeline's name"),
        _WAIT,
    )
    options.take(options.command(commands, "status", status, "a run's steps, as they stand"), _RUN, _WAIT, *_HOST)
    add = options.command(commands, "cancel", cancel, "end a run; its training jobs are deleted with it")
    options.take(add, _RUN, *_HOST)
    options.take(
        options.command(commands, "reap", reap, "delete training jobs whose run has ended or is gone"),
        ("--older-than TIME", "jobs older than 90s, 10m, 2h, 1d (default: 1h)", "1h"),
        ("--dry-run", "say what would be deleted", False),
        ("--namespace", "default: the current one"),
    )


def _connected(given: argparse.Namespace) -> AbstractContextManager["Kubeflow"]:
    from pipelines.kubeflow.client import connected

    return connected(given.host, given.kfp_namespace, given.namespace)


def submit(given: argparse.Namespace) -> None:
    told = options.configured(given, write=False)
    from pipelines.adapt_llama import compile_pipeline
    from pipelines.configuration import check_for_cluster
    from pipelines.local.ir import read_package
    from pipelines.local.plan import checked_arguments
    from pipelines.machines import check_generation

    name = given.pipeline or f"adapt-llama-{given.size}"
    with temporary_folder() as folder:
        package = Path(folder) / "pipeline.yaml"
        compile_pipeline(told, package)
        # before anybody is called
        checked = checked_arguments(read_package(package), told.arguments)
        arguments = {name: checked[name] for name in told.arguments}
        check_for_cluster(told)
        check_generation(told)
        with _connected(given) as kubeflow:
            run = kubeflow.start(
                package, arguments, pipeline=name, run_name=given.run_name or name, experiment=given.experiment
            )
            print(f"{given.ui.rstrip('/') or kubeflow.address}/#/runs/details/{run}")
            if given.wait:
                _follow(kubeflow, run, goes_on=True)


def status(given: argparse.Namespace) -> None:
    with _connected(given) as kubeflow:
        if given.wait:
            _follow(kubeflow, given.run)
        run = kubeflow.whole(kubeflow.run(given.run))
    _show(run, sys.stdout)
    if not run.known:
        sys.exit(EXIT_FAULT)


def cancel(given: argparse.Namespace) -> None:
    with _connected(given) as kubeflow:
        run = kubeflow.cancel(given.run)
    say(f"run {run.id}: {word(run.state)}" + ("" if run.over else "; `zhllama status --wait` follows it"))


def reap(given: argparse.Namespace) -> None:
    from zhllama.kubernetes.reaper import reap as reap_now

    lines = reap_now(given.namespace, given.older_than, given.dry_run)
    for line in lines:
        say(line)
    print(f"{len(lines)} orphaned training {'job' if len(lines) == 1 else 'jobs'}", file=sys.stderr)


def _follow(kubeflow: "Kubeflow", run_id: str, goes_on: bool = False) -> None:
    """A line for every change, to stderr; then the end of this process is the run's: 0, 1, 2 where the step that failed
    first found its input wrong, or 143 when cancelled. goes_on: whether it is known that there is such a run: whatever
    ends the following (a session that is over, SIGTERM) is not taken for the run's end."""
    shown: dict[str, str] = {}
    noted = False
    try:
        for run in kubeflow.follow(run_id):
            goes_on = True
            if run.note and not run.over and not noted:
                say(f"{datetime.now(UTC):%H:%M:%S} note: {run.note}", sys.stderr)
                noted = True
            for step in run.steps:
                took = f" ({_took(step.ended - step.started)})" if step.started and step.ended else ""
                line = f"{step.name}: {word(step.state)}{took}" + (f"; {step.said}" if step.said else "")
                if step.state != NOT_RUN and shown.get(step.task) != line:
                    say(f"{datetime.now(UTC):%H:%M:%S} {line}", sys.stderr)
                shown[step.task] = line
    except BaseException as error:
        if goes_on and not isinstance(error, Deleted):
            say(f"no longer followed; the run goes on: zhllama status {run_id}, zhllama cancel {run_id}", sys.stderr)
        raise
    _show(run, sys.stderr)
    first = run.failed_first
    failed = EXIT_INPUT if first and first.said.startswith("error:") else EXIT_FAULT
    sys.exit({DONE: EXIT_DONE, CANCELLED: EXIT_CANCELLED}.get(run.state, failed))


def _last_words(run: Run) -> list[str]:
    """How a run ended badly, in a line, and what could not be read; for one that goes on, what its steps wait for."""
    lines = [f"{step.name} waits: {step.said}" for step in run.steps if step.state == PENDING and step.said]
    if not run.known:
        said = f"the server's word for its state is {run.state!r}" if run.state else "the server says no state of it"
        lines.append(f"fault: {said}; look at its page, or update zhllama")
    if run.note:
        lines.append(f"note: {run.note}")
    first = run.failed_first
    if run.state == CANCELLED:
        lines.append("cancelled: the run was cancelled")
    elif first and first.said.startswith("error: "):
        lines.append(f"error: {first.name}: {first.said.removeprefix('error: ')}")
    elif first:
        lines.append(f"fault: {first.name}: {first.said.removeprefix('fault: ') or 'failed'}")
    elif run.state == FAILED:
        lines.append(f"fault: the run failed{': ' if run.said else ''}{run.said}")
    return lines


def _show(run: Run, last_words: TextIO) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    say(f"{run.name} ({run.id})")
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("step", "state", "began (UTC)", "took"):
        table.add_column(heading, justify="right" if heading == "took" else "left", no_wrap=True)
    rows: list[Step | Run] = [*run.steps, replace(run, name="the run")]
    for one in rows:
        began, state = one.started, Text(word(one.state), COLOURS.get(one.state, ""))
        took = "" if one.state == UNKNOWN or began is None else _took((one.ended or datetime.now(UTC)) - began)
        table.add_row(one.name, state, f"{began:%Y-%m-%d %H:%M:%S}" if began else "", took)
    terminal.console().print(table)
    for line in _last_words(run):
        say(line, last_words)


def _took(time: timedelta) -> str:
    seconds = int(time.total_seconds())
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
