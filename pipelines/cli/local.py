"""On this machine: `zhllama run`, `demo` and `chat`."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from pipelines.cli import options
from zhllama.errors import InputError

PARALLEL = 2
RENAMED = {"extend_by_given": "extend_tokenizer", "generate_one": "generate"}
"""Steps that had another name in the first release."""


def add_to(commands: options.Commands) -> None:
    note = "run the pipeline on this machine; going on where an earlier run stopped"
    add = options.command(commands, "run", run, note)
    options.take(add, options.size("tiny"), ("--package FILE", "a compiled pipeline, instead of a size", Path))
    options.take_settings(add)
    options.take(add, ("--until STAGE", "stop after this stage"))
    note = "run this stage and what follows again"
    add.add_argument("--from", dest="start_from", default="", metavar="STAGE", help=note)
    options.take(add, options.WORK, ("--parallel N", f"stages side by side (default: {PARALLEL})", PARALLEL))
    options.take(
        options.command(commands, "demo", demo, "see the whole adaptation on this machine, on real Chinese text"),
        ("--text REF", "your own text: a folder or prefix of .txt or .jsonl files"),
        ("--instructions REF", "your own items: a .json or .jsonl file"),
        ("--toy", "a tiny model, made here in a minute, in the place of SmolLM2", False),
        options.WORK,
    )
    add = options.command(commands, "chat", chat, "talk to the model of the last run")
    options.take(add, ("--model REF", "another model"), options.WORK)


def run(given: argparse.Namespace) -> None:
    from pipelines.local.ir import read_package
    from pipelines.local.runner import run_pipeline

    package = given.package
    again = f"zhllama run --size {given.size}"
    if package is None:
        told = options.configured(given, write=False, defaults={"backend": "local"})
        arguments = dict(told.arguments)
        from pipelines.adapt_llama import compile_pipeline

        package = given.work / "pipeline.yaml"
        compile_pipeline(told, package)
        if given.until:
            # what only later steps read may be missing; a step that is reached without says so
            needed = (setting.name for setting, _, required in told.parameters() if required and setting.address)
            arguments = dict.fromkeys(needed, "") | arguments
    else:
        from pipelines.configuration import refuse_compiled

        arguments = options.settings(given.settings)
        if given.config:
            wrong = f"{package} is compiled, and has its configuration; leave it out"
            raise InputError(f"--config {given.config[0]}: {wrong}")
        refuse_compiled(list(arguments), list(read_package(package).root.parameters), str(package))
        again = f"zhllama run --package {shlex.quote(str(package))}"
    more = [("config", one) for one in given.config] + [("set", one) for one in given.settings]
    more += [("until", given.until)] if given.until else []
    more += [("parallel", given.parallel)] if given.parallel != PARALLEL else []
    more += [("work", given.work)] if given.work != options.WORK_FOLDER else []
    again += "".join(f" --{option} {shlex.quote(str(value))}" for option, value in more)
    if "backend" in read_package(package).root.parameters:
        arguments.setdefault("backend", "local")
    result = run_pipeline(
        package,
        arguments,
        given.work,
        until=RENAMED.get(given.until, given.until),
        start_from=RENAMED.get(given.start_from, given.start_from),
        parallel=given.parallel,
        again=again,
    )
    sys.exit(result.exit_code)


def demo(given: argparse.Namespace) -> None:
    from pipelines.demo.run import demo as run_demo

    sys.exit(run_demo(given.work, given.text, given.instructions, given.toy))


def chat(given: argparse.Namespace) -> None:
    from pipelines.local.runner import last_model, s3_for

    model = given.model or last_model(given.work)
    with s3_for(given.work.absolute(), model, attach=True):
        environment = {"ZHLLAMA_CACHE": str(given.work.absolute() / "cache"), **os.environ}
        command = [sys.executable, "-m", "components.generate", "--model", model, "--interactive"]
        sys.exit(subprocess.run(command, env=environment).returncode)
