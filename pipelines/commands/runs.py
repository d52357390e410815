"""Runs on Kubeflow Pipelines: `zhllama submit`, `status`, `cancel` and `reap`."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.commands import options

if TYPE_CHECKING:
    from pipelines.kubeflow import Kubeflow, Run

COLOURS = {"SUCCEEDED": "green", "FAILED": "bold red", "RUNNING": "cyan", "CANCELED": "yellow", "CANCELING": "yellow"}


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    add = commands.add_parser("submit", help="compile the pipeline and start a run on Kubeflow Pipelines")
    options.size_option(add, None)
    options.image_options(add)
    options.pod_options(add)
    options.set_option(add)
    _host(add)
    add.add_argument("--experiment", default="zhllama")
    add.add_argument("--pipeline", default="", metavar="NAME", help="uploaded as this (default: adapt-llama-<size>)")
    add.add_argument("--run-name", default="", help="default: the pipeline's name")
    add.add_argument("--wait", action="store_true", help="follow the run, and end as it ends")
    add.set_defaults(command=submit)

    add = commands.add_parser("status", help="a run's steps, as they stand")
    add.add_argument("run", metavar="RUN", help="the run's id")
    add.add_argument("--wait", action="store_true", help="follow the run, and end as it ends")
    _host(add)
    add.set_defaults(command=status)

    add = commands.add_parser("cancel", help="end a run; its training jobs are deleted with it")
    add.add_argument("run", metavar="RUN", help="the run's id")
    _host(add)
    add.set_defaults(command=cancel)

    add = commands.add_parser("reap", help="delete training jobs whose run has ended or is gone")
    add.add_argument(
        "--older-than", default="1h", metavar="TIME", help="jobs older than 90s, 10m, 2h, 1d (default: 1h)"
    )
    add.add_argument("--dry-run", action="store_true", help="say what would be deleted")
    add.add_argument("--namespace", default="", help="default: the current one")
    add.set_defaults(command=reap)


def _host(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--host", default="", metavar="URL",
        help="of Kubeflow Pipelines; its token: ZHLLAMA_KFP_TOKEN or ZHLLAMA_KFP_TOKEN_FILE. Without: the service "
        "itself inside a cluster, kubectl port-forward elsewhere",
    )  # fmt: skip
    add.add_argument("--ui", default="", metavar="URL", help="of its pages, where that is another address")
    add.add_argument("--kfp-namespace", default="kubeflow", help="where Kubeflow Pipelines runs (without --host)")
    add.add_argument("--namespace", default=None, help="the profile's namespace, where there are profiles")


@contextmanager
def _connected(given: argparse.Namespace) -> Iterator["Kubeflow"]:
    from pipelines.kubeflow import Host, connected

    with connected(Host(given.host, given.kfp_namespace), given.namespace) as kubeflow:
        yield kubeflow


def submit(given: argparse.Namespace) -> None:
    told = options.configured(given, write=False)
    from pipelines.adapt_llama import compile_pipeline
    from pipelines.configuration import check_for_cluster
    from pipelines.ir import read_package
    from pipelines.plan import checked_arguments

    name = given.pipeline or f"adapt-llama-{given.size}"
    arguments = dict(told.arguments)
    with tempfile.TemporaryDirectory(prefix="zhllama-") as folder:
        package = Path(folder) / "pipeline.yaml"
        compile_pipeline(told, package)
        # before anybody is called
        checked_arguments(read_package(package), arguments)
        check_for_cluster(told)
        with _connected(given) as kubeflow:
            run = kubeflow.start(
                package, arguments, pipeline=name, run_name=given.run_name or name, experiment=given.experiment
            )
            print(f"{given.ui.rstrip('/') or kubeflow.address}/#/runs/details/{run}")
            if given.wait:
                _follow(kubeflow, run)


def status(given: argparse.Namespace) -> None:
    with _connected(given) as kubeflow:
        if given.wait:
            _follow(kubeflow, given.run)
        _show(kubeflow.run(given.run))


def cancel(given: argparse.Namespace) -> None:
    with _connected(given) as kubeflow:
        run = kubeflow.cancel(given.run)
    print(f"run {run.id}: {run.state.lower()}" + ("" if run.over else "; `zhllama status --wait` follows it"))


def reap(given: argparse.Namespace) -> None:
    from components.shared.reaper import reap as reap_now

    lines = reap_now(given.namespace, given.older_than, given.dry_run)
    for line in lines:
        print(line)
    print(f"{len(lines)} orphaned training {'job' if len(lines) == 1 else 'jobs'}", file=sys.stderr)


def _follow(kubeflow: "Kubeflow", run_id: str) -> None:
    """A line for every change, to stderr; then the end of this process is the run's: 0, 1, or 143 when cancelled."""
    from components.shared.errors import EXIT_CANCELLED, EXIT_DONE, EXIT_FAULT
    from pipelines.kubeflow import DONE, failures

    states: dict[str, str] = {}
    try:
        for run in kubeflow.follow(run_id):
            for task in run.tasks:
                if states.get(task.name) != task.state:
                    print(
                        f"{datetime.now(UTC):%H:%M:%S} {task.name}: {task.state.lower()}", file=sys.stderr, flush=True
                    )
                states[task.name] = task.state
    except KeyboardInterrupt:
        print(f"no longer followed; the run goes on: zhllama status {run_id}, zhllama cancel {run_id}", file=sys.stderr)
        raise
    _show(run)
    if run.state == DONE:
        sys.exit(EXIT_DONE)
    for line in failures(run):
        print(f"fault: {line}", file=sys.stderr)
    sys.exit(EXIT_CANCELLED if run.state == "CANCELED" else EXIT_FAULT)


def _show(run: "Run") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{run.name} ({run.id})", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("step", "state", "began", "took"):
        table.add_column(heading, justify="right" if heading == "took" else "left")
    for name, state, began, ended in [
        *((task.name, task.state, task.started, task.ended) for task in run.tasks),
        ("the run", run.state, run.started, run.ended),
    ]:
        shown = Text(state.lower(), COLOURS.get(state, ""))
        table.add_row(name, shown, f"{began:%Y-%m-%d %H:%M:%S}" if began else "", _took(began, ended))
    Console().print(table)


def _took(began: datetime | None, ended: datetime | None) -> str:
    if began is None:
        return ""
    seconds = int(((ended or datetime.now(UTC)) - began).total_seconds())
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
