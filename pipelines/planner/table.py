"""A plan for people (a table, stages side by side) and for programs (JSON)."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.planner.estimate import FRAGMENTATION, RESERVED, Plan
from pipelines.planner.serving import ServingPlan
from pipelines.planner.units import gigabytes, hours
from pipelines.sizes import Size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Row = tuple[str, Callable[[Plan], str]]

PARTS = ("weights", "optimizer", "gradients", "activations", "loss", "buffers")


def _part(name: str) -> Callable[[Plan], str]:
    return lambda plan: gigabytes(plan.phase.parts[name]) if plan.phase.parts[name] else "-"


def _verdict(plan: Plan) -> str:
    if plan.gpu is None:
        return ""
    return "[bold green]fits[/]" if plan.fits else "[bold red]does not fit[/]"


def _batch(plan: Plan) -> str:
    s = plan.setting
    return f"{s.batch} × {s.accumulation} × {s.processes}"


def _how(plan: Plan) -> str:
    return plan.options.deepspeed if len(plan.options.deepspeed) < 16 else "a file"


def _sections(on_gpus: bool) -> list[tuple[str, list[Row]]]:
    return [
        (
            "at the peak, a GPU" if on_gpus else "at the peak, a process",
            [
                *((name, _part(name)) for name in PARTS),
                ("beside tensors", lambda plan: gigabytes(plan.needed - plan.phase.total)),
                ("needed", lambda plan: f"[bold]{gigabytes(plan.needed)}[/]"),
                ("there", lambda plan: gigabytes(plan.gpu.memory) if plan.gpu else ""),
                ("", _verdict),
                ("the peak is at", lambda plan: plan.phase.name),
            ],
        ),
        (
            "work",
            [
                ("trained", lambda plan: f"{plan.setting.trained:,}"),
                ("DeepSpeed", _how),
                ("recomputes", lambda plan: "activations" if plan.setting.checkpointing else "nothing"),
                ("batch × passes × GPUs" if on_gpus else "batch × passes × all", _batch),
                ("tokens a step", lambda plan: f"{plan.tokens_per_step:,}"),
                ("steps", lambda plan: f"{plan.steps:,}"),
                ("tokens", lambda plan: _count(plan.tokens)),
                ("tokens a second", lambda plan: f"{plan.tokens_per_second:,.0f}" if plan.tokens_per_second else ""),
                ("time", lambda plan: f"[bold]{hours(plan.seconds)}[/]" if plan.seconds else ""),
                ("sent a step, by each", lambda plan: gigabytes(plan.exchanged)),
            ],
        ),
        (
            "S3",
            [
                ("read, by all nodes", lambda plan: gigabytes(plan.s3_read)),
                ("written", lambda plan: gigabytes(plan.s3_written)),
                ("left there", lambda plan: gigabytes(plan.s3_kept)),
                ("checkpoints", lambda plan: f"{plan.checkpoint_count} × {gigabytes(plan.checkpoint)}"),
            ],
        ),
        (
            "a node",
            [
                ("disk", lambda plan: gigabytes(plan.ephemeral)),
                ("memory", lambda plan: gigabytes(plan.host_memory)),
            ],
        ),
    ]


def _count(tokens: int) -> str:
    return f"{tokens / 1e9:.2f} billion" if tokens >= 10**9 else f"{tokens / 1e6:.1f} million"


def table(plans: Sequence[Plan]) -> "Table":
    """Stages side by side."""
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    found.add_column("", no_wrap=True)
    for plan in plans:
        found.add_column(plan.stage, justify="right", min_width=15, no_wrap=True)
    for title, rows in _sections(plans[0].gpu is not None):
        found.add_row(f"[bold]{title}[/]")
        for label, value in rows:
            cells = [value(plan) for plan in plans]
            if any(cells):
                found.add_row(f"  {label}", *cells)
    return found


def heading(plans: Sequence[Plan], size: str) -> str:
    """`7b: 2 nodes × 8 h100-80gb`; stages on other numbers of nodes are named with theirs."""
    kind = plans[0].gpu.name if plans[0].gpu else "processes, no GPU"
    places: dict[tuple[int, int], list[str]] = {}
    for plan in plans:
        places.setdefault((plan.nodes, plan.per_node), []).append(plan.stage)
    words = [
        f"{nodes} {'node' if nodes == 1 else 'nodes'} × {each} {kind}"
        + (f" ({', '.join(stages)})" if len(places) > 1 else "")
        for (nodes, each), stages in places.items()
    ]
    return f"{size}: {'; '.join(words)}"


def assumptions(plans: Sequence[Plan], stated: bool) -> str:
    """What the figures rest on."""
    gpu = plans[0].gpu
    if gpu is None:
        return "No time is given: what a processor does is not stated. Memory: the process's own included."
    whose = "as you gave it" if stated else "assumed, give yours with --mfu"
    return (
        f"Time: {plans[0].mfu:.0%} of {gpu.tflops:,.0f} TFLOP/s ({whose}), without loading, evaluation and what nodes "
        f"send each other. Beside tensors: {gigabytes(RESERVED)} and {FRAGMENTATION:.0%} of them, assumed. "
        "docs/planning.md has the formulae."
    )


def other_batches(plans: Sequence[Plan], size: Size) -> list[str]:
    """Where the machines make the global batch another one than the size has."""
    found = []
    for plan in plans:
        has, wanted = plan.tokens_per_step // plan.setting.block, size.training(plan.stage).global_batch
        if has != wanted:
            found.append(
                f"{plan.stage}: {has:,} blocks a step, where the size has {wanted:,}; --gradient-accumulation-steps "
                "and --per-device-train-batch-size in --arguments make it so again."
            )
    return found


def serving_table(plan: ServingPlan) -> "Table":
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    found.add_column("")
    found.add_column("serve", justify="right")
    found.add_row("[bold]memory of a GPU[/]")
    found.add_row("  weights, float16", gigabytes(plan.weights))
    found.add_row(f"  keys and values: {plan.concurrency} × {plan.context:,} tokens", gigabytes(plan.cache))
    found.add_row("  beside tensors", gigabytes(RESERVED))
    found.add_row("  needed", f"{gigabytes(plan.needed)} of {gigabytes(plan.available)}")
    found.add_row("", "[bold green]fits[/]" if plan.fits else "[bold red]does not fit[/]")
    found.add_row("  whole contexts at once, at most", f"{plan.most:,}")
    return found


def show(console: "Console", title: str, found: "Table", notes: Sequence[str], warned: Sequence[str]) -> None:
    console.print(f"[bold]{title}[/]\n")
    console.print(found, "")
    for line in notes:
        console.print(line, style="dim")
    for line in warned:
        console.print(f"[bold yellow]warning[/] {line}")


def record(plan: Plan, remedies: Sequence[str], warned: Sequence[str], kinds: Sequence[str]) -> dict[str, Any]:
    """A plan as JSON: bytes, seconds, tokens."""
    s = plan.setting
    return {
        "stage": plan.stage,
        "gpu": plan.gpu.name if plan.gpu else None,
        "nodes": plan.nodes,
        "gpus_per_node": plan.per_node,
        "fits": plan.fits,
        "memory": {
            "needed": plan.needed,
            "available": plan.gpu.memory if plan.gpu else None,
            "peak_at": plan.phase.name,
            "tensors": _plain(plan.phase.parts),
        },
        "parameters": {"base": s.base_parameters, "frozen": s.frozen, "trained": s.trained, "pieces": s.pieces},
        "deepspeed": plan.options.deepspeed,
        "gradient_checkpointing": s.checkpointing,
        "batch": s.batch,
        "accumulation": s.accumulation,
        "block": s.block,
        "steps": plan.steps,
        "tokens_per_step": plan.tokens_per_step,
        "tokens": plan.tokens,
        "mfu": plan.mfu,
        "tokens_per_second": plan.tokens_per_second,
        "seconds": plan.seconds,
        "sent_per_gpu_and_step": plan.exchanged,
        "s3": {"read": plan.s3_read, "written": plan.s3_written, "kept": plan.s3_kept, "artifact": plan.artifact},
        "checkpoint": {"bytes": plan.checkpoint, "count": plan.checkpoint_count},
        "node": {"ephemeral_storage": plan.ephemeral, "memory": plan.host_memory},
        "fits_on": list(kinds),
        "would_fit_with": list(remedies),
        "warnings": list(warned),
    }


def _plain(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: int(value) for name, value in parts.items()}


def serving_record(plan: ServingPlan) -> dict[str, Any]:
    return {
        "stage": "serve",
        "gpu": plan.gpu.name,
        "gpus": plan.gpus,
        "fits": plan.fits,
        "memory": {
            "needed": plan.needed,
            "available": plan.available,
            "weights": plan.weights,
            "cache": plan.cache,
        },
        "context": plan.context,
        "concurrency": plan.concurrency,
        "concurrency_at_most": plan.most,
    }
