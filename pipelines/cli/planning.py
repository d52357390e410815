"""Before a GPU is rented or a cluster asked: `zhllama plan` (does a training fit?) and `check` (of manifests)."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cli import options
from zhllama import terminal
from zhllama.errors import InputError

if TYPE_CHECKING:
    from pipelines.planner.estimate import PlanRequest
    from pipelines.planner.gpus import Gpu


def add_to(commands: options.Commands) -> None:
    description = "Ends with 2 when it does not fit, and says what would. docs/planning.md has the formulae."
    note = "memory, time and storage of a training, and whether it fits"
    add = options.command(commands, "plan", plan, note, description=description)
    options.take(
        add,
        options.size(),
        ("--gpu KIND", "a100-80gb, h100-80gb …: `--gpu list` shows them"),
        ("--stage", "embeddings, lora, sft or serve (default: the three trainings)"),
        ("--nodes", "default: the size's", 0),
        ("--gpus-per-node", "default: the size's", 0),
        ("--arguments TEXT", "more options of the training, as one text, as `render` takes"),
        ("--pieces", "rows of the vocabulary (default: with the size's Chinese)", 0),
        ("--block", "tokens of a block (default: the size's)", 0),
        ("--steps", "optimizer steps (default: the size's)", 0),
        ("--data-tokens", "of the dataset (default: as many as the steps take)", 0),
        ("--mfu SHARE", "of the GPU's peak that the model gets, as the log says", 0.0),
        ("--gpus-file FILE", "kinds of GPU of your own, as planner/gpus.yaml", Path),
        ("--context", "serve: tokens of prompt and answer (default: the size's)", 0),
        ("--concurrency", "serve: requests at once (default: 16)", 0),
    )
    options.take_settings(add)
    options.take(add, options.JSON)


def add_check_to(commands: options.Commands) -> None:
    description = (
        "Ends with 1 when there is a finding at or above --level, with 0 otherwise. docs/checking-manifests.md"
    )
    note = "check manifests without a cluster"
    add = options.command(commands, "check", check, note, description=description)
    add.add_argument("files", nargs="*", metavar="FILE", help="YAML files, or folders of them (default: - , the input)")
    options.take(
        add,
        ("--level", "what counts: admission (refused), works (or will not work; default), advice (or all)",
         ("works", "admission", "advice")),
        ("--pod-security", "the standard of the namespace (default: restricted)",
         ("restricted", "baseline", "privileged")),
        ("--crds DIR", "CustomResourceDefinition files, as kubectl get crd -o yaml", Path),
        ("--namespace", "as kubectl -n: objects of another namespace are refused"),
        ("--kubernetes", "version whose fields are known (default: 1.34)", "1.34"),
        ("--largest-node TEXT", "cpu=96,memory=1Ti,gpus=8: what a pod may need"),
    )  # fmt: skip


def plan(given: argparse.Namespace) -> None:
    from pipelines.planner.estimate import PlanRequest
    from pipelines.planner.gpus import FILE, gpu_of, gpus
    from pipelines.planner.table import gigabytes
    from pipelines.sizes import STAGES
    from zhllama.stage.command_line import nearest

    kinds = list(gpus(given.gpus_file or FILE).values())
    if given.gpu == "list":
        from rich.table import Table

        found = Table("kind", "device", "memory", "TFLOP/s", "MFU, assumed", box=None, padding=(0, 2, 0, 0))
        for gpu in kinds:
            found.add_row(gpu.name, gpu.device, gigabytes(gpu.memory), f"{gpu.tflops:,.0f}", f"{gpu.mfu:.0%}")
        terminal.console(highlight=False).print(found)
        return
    told = options.configured(given)
    size, shape = told.size, told.shape
    stage, stages = given.stage, (*STAGES, "serve")
    if stage not in ("", *stages):
        raise InputError(f"--stage {stage}: there is no such stage{nearest(stage, stages)}; {', '.join(stages)} are")
    trained = [one for one, runs in (("embeddings", shape.stage1), ("lora", shape.stage2), ("sft", shape.sft)) if runs]
    trains_on_gpus = any(size.training(one).gpu for one in trained)
    if not given.gpu and (trains_on_gpus or stage == "serve"):
        raise InputError(f"--gpu: name the GPUs that are planned with: {', '.join(gpu.name for gpu in kinds)}")
    asked = ("nodes", "gpus_per_node", "pieces", "block", "steps", "data_tokens", "arguments", "mfu")
    request = PlanRequest(
        size=size,
        values=told.values,
        gpu=gpu_of(given.gpu, given.gpus_file or FILE) if given.gpu else None,
        **{name: getattr(given, name) for name in asked},
    )
    if stage == "serve":
        _serve(given, request)
    else:
        _train([stage] if stage else trained, given, request, kinds)


def _train(stages: list[str], given: argparse.Namespace, request: "PlanRequest", kinds: "list[Gpu]") -> None:
    from pipelines.planner import estimate, remedies, table

    plans = [estimate.plan(stage, request) for stage in stages]
    mended = {made.stage: [] if made.fits else remedies.remedies([made], request, kinds) for made in plans}
    # what the size's file gives to its jobs belongs to the machines that it names
    warned = {made.stage: remedies.warnings(made, request.size) for made in plans}
    others = [(gpu.name, dataclasses.replace(request, gpu=gpu)) for gpu in kinds if request.gpu]
    fitting = {stage: [name for name, other in others if estimate.plan(stage, other).fits] for stage in stages}
    if given.json:
        records = [table.record(made, mended[made.stage], warned[made.stage], fitting[made.stage]) for made in plans]
        print(json.dumps({"size": request.size.name, "plans": records}, indent=2))
    else:
        notes = [table.assumptions(plans, bool(given.mfu))]
        for names in dict.fromkeys(tuple(names) for names in fitting.values() if request.gpu):
            whose = ", ".join(stage for stage, found in fitting.items() if tuple(found) == names)
            notes.append(f"{whose}: as it is, {'fits ' + ', '.join(names) if names else 'fits no GPU of the list'}.")
        notes += table.other_batches(plans, request.size)
        lines = [line for stage in stages for line in warned[stage]]
        title = table.heading(plans, request.size.name)
        columns = {made.stage: table.figures(made) for made in plans}
        table.show(terminal.console(highlight=False), title, table.table(columns), notes, lines)
    short = [made for made in plans if not made.fits]
    if short:
        gpu = short[0].gpu
        assert gpu is not None
        needs = ", ".join(f"{made.stage} {table.gigabytes(made.needed)}" for made in short)
        would = remedies.remedies(short, request, kinds)
        mend = f"fits with {', or '.join(would)}" if would else "nothing that is known here would make it fit"
        raise InputError(f"--gpu {gpu.name} has {table.gigabytes(gpu.memory)}, and needed are: {needs}; {mend}")


def _serve(given: argparse.Namespace, request: "PlanRequest") -> None:
    from pipelines.planner import estimate, table

    made = estimate.serving_plan(request, given.context, given.concurrency, given.gpus_per_node)
    if given.json:
        print(json.dumps({"size": request.size.name, "plans": [table.serving_record(made)]}, indent=2))
    else:
        title = f"{request.size.name}: a pod of {made.gpus} {made.gpu.name}"
        notes = [f"vLLM takes {estimate.VLLM_SHARE:.0%} of a GPU unless told otherwise."]
        table.show(
            terminal.console(highlight=False), title, table.table({"serve": table.serving_figures(made)}), notes, []
        )
    if not made.fits:
        most = f"--concurrency {made.most}" if made.most else "more --gpus-per-node"
        raise InputError(
            f"serve does not fit --gpu {made.gpu.name}: {table.gigabytes(made.needed)} are needed and "
            f"{table.gigabytes(made.available)} there; it would with {most}, or another --gpu"
        )


def check(given: argparse.Namespace) -> None:
    from rich.text import Text

    from pipelines.manifests.check.check import check as check_files
    from pipelines.manifests.check.check import node_of
    from zhllama.kubernetes.names import check_namespace

    if not given.files and sys.stdin.isatty():
        raise InputError("check: give files or folders, or pipe manifests into it")
    paths = [Path(file) for file in given.files or ["-"]]
    node = node_of(given.largest_node)
    if given.namespace:
        check_namespace("--namespace", given.namespace)
    found = check_files(paths, given.crds, node, given.pod_security, given.kubernetes, given.namespace)
    console = terminal.console(soft_wrap=True)
    for finding in found:
        wrong = finding.counts_at(given.level)
        line = Text(f"{finding.file}:{finding.line}: ")
        line.append("error" if wrong else "warning", "bold red" if wrong else "bold yellow")
        line.append(f" [{finding.rule}] ", "dim").append(finding.message).append(f" ({finding.grade})", "dim")
        console.print(line)
    errors = sum(finding.counts_at(given.level) for finding in found)
    counts = (errors, "error"), (len(found) - errors, "warning")
    said = ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts)
    console.print(said, style="bold red" if errors else "bold green")
    if errors:
        sys.exit(1)
