"""`zhllama plan`: what a training needs, and whether it fits, before a GPU is rented."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cli import options
from zhllama.errors import InputError

if TYPE_CHECKING:
    from pipelines.planner.estimate import Plan, PlanRequest
    from pipelines.planner.gpus import Gpu


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    add = commands.add_parser(
        "plan",
        help="memory, time and storage of a training, and whether it fits",
        description="Ends with 2 when it does not fit, and says what would. docs/planning.md has the formulae.",
    )
    options.size_option(add, None)
    add.add_argument("--gpu", default="", metavar="KIND", help="a100-80gb, h100-80gb …: `--gpu list` shows them")
    add.add_argument("--stage", default="", help="embeddings, lora, sft or serve (default: the three trainings)")
    add.add_argument("--nodes", type=int, default=0, help="default: the size's")
    add.add_argument("--gpus-per-node", type=int, default=0, help="default: the size's")
    add.add_argument(
        "--arguments", default="", metavar="TEXT", help="more options of the training, as one text, as `render` takes"
    )
    add.add_argument("--pieces", type=int, default=0, help="rows of the vocabulary (default: with the size's Chinese)")
    add.add_argument("--block", type=int, default=0, help="tokens of a block (default: the size's)")
    add.add_argument("--steps", type=int, default=0, help="optimizer steps (default: the size's)")
    add.add_argument("--data-tokens", type=int, default=0, help="of the dataset (default: as many as the steps take)")
    add.add_argument(
        "--mfu", type=float, default=0.0, metavar="SHARE", help="of the GPU's peak that the model gets, as the log says"
    )
    add.add_argument("--gpus-file", type=Path, metavar="FILE", help="kinds of GPU of your own, as planner/gpus.yaml")
    add.add_argument("--context", type=int, default=0, help="serve: tokens of prompt and answer (default: the size's)")
    add.add_argument("--concurrency", type=int, default=0, help="serve: requests at once (default: 16)")
    options.set_option(add)
    options.json_option(add)
    add.set_defaults(command=plan)


def plan(given: argparse.Namespace) -> None:
    from pipelines.planner.estimate import PlanRequest
    from pipelines.planner.gpus import FILE, gpu_of, gpus
    from pipelines.sizes import STAGES
    from zhllama.stage.command_line import nearest

    kinds = list(gpus(given.gpus_file or FILE).values())
    if given.gpu == "list":
        _list(kinds)
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
    request = PlanRequest(
        size=size,
        values=told.values,
        gpu=gpu_of(given.gpu, given.gpus_file or FILE) if given.gpu else None,
        nodes=given.nodes,
        gpus_per_node=given.gpus_per_node,
        pieces=given.pieces,
        block=given.block,
        steps=given.steps,
        data_tokens=given.data_tokens,
        arguments=given.arguments,
        mfu=given.mfu,
    )
    if stage == "serve":
        _serve(given, request)
    else:
        _train([stage] if stage else trained, given, request, kinds)


def _train(stages: list[str], given: argparse.Namespace, request: "PlanRequest", kinds: "list[Gpu]") -> None:
    from rich.console import Console

    from pipelines.planner import estimate, remedies, table

    plans = [estimate.plan(stage, request) for stage in stages]
    mended = {made.stage: [] if made.fits else remedies.remedies([made], request, kinds) for made in plans}
    # what the size's file gives to its jobs belongs to the machines that it names
    warned = {made.stage: remedies.warnings(made, request.size) for made in plans}
    fitting = {made.stage: remedies.kinds_that_fit(made, request, kinds) if request.gpu else [] for made in plans}
    if given.json:
        records = [table.record(made, mended[made.stage], warned[made.stage], fitting[made.stage]) for made in plans]
        _print_json({"size": request.size.name, "plans": records})
    else:
        notes = [table.assumptions(plans, bool(given.mfu))]
        for names in dict.fromkeys(tuple(names) for names in fitting.values() if request.gpu):
            whose = ", ".join(stage for stage, found in fitting.items() if tuple(found) == names)
            notes.append(f"{whose}: as it is, {'fits ' + ', '.join(names) if names else 'fits no GPU of the list'}.")
        notes += table.other_batches(plans, request.size)
        lines = [line for stage in stages for line in warned[stage]]
        title = table.heading(plans, request.size.name)
        columns = {made.stage: table.figures(made) for made in plans}
        table.show(Console(highlight=False), title, table.table(columns), notes, lines)
    short = [made for made in plans if not made.fits]
    if short:
        raise InputError(_refusal(short, remedies.remedies(short, request, kinds)))


def _refusal(short: "list[Plan]", remedies: list[str]) -> str:
    from pipelines.planner.table import gigabytes

    gpu = short[0].gpu
    assert gpu is not None
    needs = ", ".join(f"{made.stage} {gigabytes(made.needed)}" for made in short)
    mend = f"fits with {', or '.join(remedies)}" if remedies else "nothing that is known here would make it fit"
    return f"--gpu {gpu.name} has {gigabytes(gpu.memory)}, and needed are: {needs}; {mend}"


def _serve(given: argparse.Namespace, request: "PlanRequest") -> None:
    from rich.console import Console

    from pipelines.planner import estimate, table
    from pipelines.planner.table import gigabytes

    made = estimate.serving_plan(request, given.context, given.concurrency, given.gpus_per_node)
    if given.json:
        _print_json({"size": request.size.name, "plans": [table.serving_record(made)]})
    else:
        title = f"{request.size.name}: a pod of {made.gpus} {made.gpu.name}"
        notes = [f"vLLM takes {estimate.VLLM_SHARE:.0%} of a GPU unless told otherwise."]
        table.show(Console(highlight=False), title, table.table({"serve": table.serving_figures(made)}), notes, [])
    if not made.fits:
        most = f"--concurrency {made.most}" if made.most else "more --gpus-per-node"
        raise InputError(
            f"serve does not fit --gpu {made.gpu.name}: {gigabytes(made.needed)} are needed and "
            f"{gigabytes(made.available)} there; it would with {most}, or another --gpu"
        )


def _list(kinds: "list[Gpu]") -> None:
    from rich.console import Console
    from rich.table import Table

    from pipelines.planner.table import gigabytes

    found = Table("kind", "device", "memory", "TFLOP/s", "MFU, assumed", box=None, padding=(0, 2, 0, 0))
    for gpu in kinds:
        found.add_row(gpu.name, gpu.device, gigabytes(gpu.memory), f"{gpu.tflops:,.0f}", f"{gpu.mfu:.0%}")
    Console(highlight=False).print(found)


def _print_json(value: dict[str, Any]) -> None:
    json.dump(value, sys.stdout, indent=2)
    print()
