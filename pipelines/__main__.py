"""zhllama: the pipeline's command line. `python -m pipelines` is the same.

Nothing heavy is imported before a command needs it: `--help` takes a tenth of a second.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from components.shared.cli import guarded
from components.shared.errors import InputError

WORK = Path(".zhllama")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and ends the process: 0 done, 2 wrong input (one line), 143 cancelled, else a fault."""
    given = parser().parse_args(arguments)
    guarded(lambda: given.command(given))


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="zhllama", description="Adapt a LLaMA model to Chinese, here or on Kubeflow.")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")

    add = commands.add_parser("run", help="run the pipeline on this machine; going on where an earlier run stopped")
    _size(add, "tiny")
    add.add_argument("--package", type=Path, metavar="FILE", help="a compiled pipeline, instead of a size")
    _set(add)
    add.add_argument("--until", default="", metavar="STAGE", help="stop after this stage")
    add.add_argument(
        "--from", dest="start_from", default="", metavar="STAGE", help="run this stage and what follows again"
    )
    _work(add)
    add.add_argument("--parallel", type=int, default=2, metavar="N", help="stages side by side (default: 2)")
    add.set_defaults(command=run)

    add = commands.add_parser("demo", help="see the whole adaptation on this machine, on real Chinese text")
    add.add_argument(
        "--text", default="", metavar="REF", help="your own text: a folder or prefix of .txt or .jsonl files"
    )
    add.add_argument("--instructions", default="", metavar="REF", help="your own Alpaca items: a .json or .jsonl file")
    _work(add)
    add.set_defaults(command=demo)

    add = commands.add_parser("chat", help="talk to the model of the last run")
    add.add_argument("--model", default="", metavar="REF", help="another model")
    _work(add)
    add.set_defaults(command=chat)

    add = commands.add_parser("compile", help="write the pipeline as a YAML file for Kubeflow Pipelines")
    _size(add, None)
    _images(add)
    add.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    add.set_defaults(command=compile_)

    add = commands.add_parser("parameters", help="the pipeline's parameters, with their defaults at a size")
    _size(add, "tiny")
    add.set_defaults(command=parameters)

    render = commands.add_parser("render", help="write manifests for kubectl apply")
    kinds = render.add_subparsers(required=True, metavar="WHAT")
    add = kinds.add_parser("pytorchjob", help="one training as a PyTorchJob, to standard output")
    _size(add, None)
    add.add_argument("--stage", required=True, help="embeddings, lora or sft")
    for name, note in (
        ("model", "reference to the model that is trained"),
        ("dataset", "reference to the packed dataset"),
        ("store", "where the result is put: s3://bucket/prefix"),
    ):
        add.add_argument(f"--{name}", required=True, metavar="REF" if name != "store" else "URI", help=note)
    add.add_argument("--adapter", default="", metavar="REF", help="an adapter to go on from")
    add.add_argument("--name", default="", help="of the job (default: llama-<size>-<stage>)")
    add.add_argument("--namespace", default="")
    add.add_argument("--queue", default="", help="Kueue's local queue")
    add.add_argument("--arguments", default="", metavar="TEXT", help="more options of the training, as one text")
    _images(add)
    add.set_defaults(command=render_pytorchjob)
    add = kinds.add_parser("all", help="k8s/pytorchjob again, from pipelines/sizes")
    add.set_defaults(command=render_all)

    add = commands.add_parser("submit", help="compile the pipeline and start a run on Kubeflow Pipelines")
    _size(add, None)
    _images(add)
    _set(add)
    add.add_argument("--host", required=True, metavar="URL", help="of Kubeflow Pipelines; its token: ZHLLAMA_KFP_TOKEN")
    add.add_argument("--namespace", default=None, help="the profile's namespace, where there are profiles")
    add.add_argument("--experiment", default="zhllama")
    add.add_argument("--run-name", default=None)
    add.set_defaults(command=submit)
    return whole


def _size(add: argparse.ArgumentParser, default: str | None) -> None:
    from pipelines import sizes

    choices = ", ".join(sizes.names())
    note = f"{choices} (default: {default})" if default else choices
    add.add_argument("--size", default=default, required=default is None, help=note)


def _images(add: argparse.ArgumentParser) -> None:
    add.add_argument("--registry", default="", help="where the images are: registry.example.com/team")
    add.add_argument("--tag", default="", help="of the images (default: this version)")


def _set(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the pipeline"
    )


def _work(add: argparse.ArgumentParser) -> None:
    add.add_argument("--work", type=Path, default=WORK, metavar="DIR", help=f"logs, records and data (default: {WORK})")


def settings(pairs: Sequence[str]) -> dict[str, str]:
    """`--set` options as a mapping. InputError for one without `=` or given twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair}: write NAME=VALUE")
        if name in found:
            raise InputError(f"--set {name}: given twice; keep one")
        found[name] = value
    return found


# --- commands ---------------------------------------------------------------------------------------------------------


def compile_(given: argparse.Namespace) -> None:
    _use_images(given)
    from pipelines.adapt_llama import compile_pipeline

    compile_pipeline(given.size, given.output)
    print(f"{given.output}: the pipeline at size {given.size}")


def _use_images(given: argparse.Namespace) -> None:
    # before the components are imported: their signatures name their images
    for name, value in (("ZHLLAMA_REGISTRY", given.registry), ("ZHLLAMA_TAG", given.tag)):
        if value:
            os.environ[name] = value


def parameters(given: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from pipelines import sizes
    from pipelines.adapt_llama import adapt_llama
    from pipelines.placeholders import text_of

    table = Table("parameter", "type", "default", box=None, padding=(0, 2, 0, 0))
    for name, found in (adapt_llama(sizes.load(given.size)).component_spec.inputs or {}).items():
        table.add_row(name, found.type.lower(), "(required)" if not found.optional else text_of(found.default))
    Console().print(table)


def render_pytorchjob(given: argparse.Namespace) -> None:
    _use_images(given)
    from pipelines import render, sizes

    job = render.training_job(
        sizes.load(given.size),
        given.stage,
        model=given.model,
        dataset=given.dataset,
        store=given.store,
        adapter=given.adapter,
        name=given.name,
        namespace=given.namespace,
        queue=given.queue,
        arguments=given.arguments,
    )
    print(render.as_yaml(job), end="")


def render_all(given: argparse.Namespace) -> None:
    from pipelines import render

    for path in render.write_examples():
        print(path)


def run(given: argparse.Namespace) -> None:
    from pipelines.ir import read_package
    from pipelines.local_runner import run_pipeline

    arguments = settings(given.settings)
    package = given.package
    again = f"zhllama run --size {given.size}"
    if package is None:
        from pipelines.adapt_llama import compile_pipeline

        package = given.work / "pipeline.yaml"
        compile_pipeline(given.size, package)
    else:
        again = f"zhllama run --package {shlex.quote(str(package))}"
    again += "".join(f" --set {shlex.quote(pair)}" for pair in given.settings)
    again += f" --work {shlex.quote(str(given.work))}" if given.work != WORK else ""
    if "backend" in read_package(package).root.parameters:
        arguments.setdefault("backend", "local")
    result = run_pipeline(
        package,
        arguments,
        given.work,
        until=given.until,
        start_from=given.start_from,
        parallel=given.parallel,
        again=again,
    )
    sys.exit(result.exit_code)


def demo(given: argparse.Namespace) -> None:
    from pipelines.demo.run import demo as run_demo

    sys.exit(run_demo(given.work, given.text, given.instructions))


def chat(given: argparse.Namespace) -> None:
    from pipelines.local_runner import last_model, s3_for

    model = given.model or last_model(given.work)
    with s3_for(given.work.absolute(), model):
        environment = {"ZHLLAMA_CACHE": str(given.work.absolute() / "cache"), **os.environ}
        command = [sys.executable, "-m", "components.generate", "--model", model, "--interactive"]
        sys.exit(subprocess.run(command, env=environment).returncode)


def submit(given: argparse.Namespace) -> None:
    _use_images(given)
    from pipelines.adapt_llama import compile_pipeline
    from pipelines.submit import submit_run

    with tempfile.TemporaryDirectory(prefix="zhllama-") as folder:
        package = Path(folder) / "pipeline.yaml"
        compile_pipeline(given.size, package)
        address = submit_run(
            package,
            settings(given.settings),
            host=given.host,
            run_name=given.run_name or f"adapt-llama-{given.size}",
            namespace=given.namespace,
            experiment=given.experiment,
            token=os.environ.get("ZHLLAMA_KFP_TOKEN", ""),
        )
    print(address)


if __name__ == "__main__":
    main()
