"""A plan for people (a table, stages side by side) and for programs (JSON)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.planner.estimate import FRAGMENTATION, RESERVED, Plan, ServingPlan
from pipelines.sizes import Size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Figures = Mapping[str, Mapping[str, str]]
"""Heading → label → what is shown."""


def gigabytes(count: float) -> str:
    """`4.1 GB`, `950 MB`, `1,099.5 GB`, `32.0 TB`."""
    if count >= 10**13:
        return f"{count / 10**12:.1f} TB"
    return f"{count / 10**9:,.1f} GB" if count >= 10**9 else f"{count / 10**6:.0f} MB"


def hours(seconds: float) -> str:
    """`40 min`, `9.5 h`, `3.2 d`."""
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} d"


def figures(plan: Plan) -> Figures:
    s, gpu, tokens = plan.setting, plan.gpu, plan.tokens
    return {
        "at the peak, a GPU" if gpu else "at the peak, a process": {
            **{name: gigabytes(count) if count else "-" for name, count in plan.phase.parts.items()},
            "beside tensors": gigabytes(plan.needed - plan.phase.total),
            "needed": gigabytes(plan.needed),
            "there": gigabytes(gpu.memory) if gpu else "",
            "": _verdict(plan.fits) if gpu else "",
            "the peak is at": plan.phase.name,
        },
        "work": {
            "trained": f"{s.trained:,}",
            "DeepSpeed": plan.options.deepspeed if len(plan.options.deepspeed) < 16 else "a file",
            "recomputes": "activations" if s.checkpointing else "nothing",
            f"batch × passes × {'GPUs' if gpu else 'all'}": f"{s.batch} × {s.accumulation} × {s.processes}",
            "tokens a step": f"{plan.tokens_per_step:,}",
            "steps": f"{plan.steps:,}",
            "tokens": _many(tokens),
            "tokens a second": f"{plan.tokens_per_second:,.0f}" if plan.tokens_per_second else "",
            "time": hours(plan.seconds) if plan.seconds else "",
            "sent a step, by each": gigabytes(plan.exchanged),
        },
        "S3": {
            "read, by all nodes": gigabytes(plan.s3_read),
            "written": gigabytes(plan.s3_written),
            "left there": gigabytes(plan.s3_kept),
            "checkpoints": f"{plan.checkpoint_count} × {gigabytes(plan.checkpoint)}",
        },
        "a node": {"disk": gigabytes(plan.ephemeral), "memory": gigabytes(plan.host_memory)},
    }


def serving_figures(plan: ServingPlan) -> Figures:
    return {
        "memory of a GPU": {
            "weights, float16": gigabytes(plan.weights),
            f"keys and values: {plan.concurrency} × {plan.context:,} tokens": gigabytes(plan.cache),
            "beside tensors": gigabytes(RESERVED),
            "needed": f"{gigabytes(plan.needed)} of {gigabytes(plan.available)}",
            "": _verdict(plan.fits),
            "whole contexts at once, at most": f"{plan.most:,}",
        }
    }


def _verdict(fits: bool) -> str:
    return _FITS if fits else "does not fit"


_FITS = "fits"


def _looks(label: str, cell: str) -> str:
    """A cell's style."""
    if label:
        return "bold" if label in ("needed", "time") else ""
    return "bold green" if cell == _FITS else "bold red"


def table(columns: Mapping[str, Figures]) -> "Table":
    """Stages side by side: what they are called → their figures. What none of them has is left out."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    found.add_column("", no_wrap=True)
    for stage in columns:
        found.add_column(stage, justify="right", min_width=15, no_wrap=True)
    for title, rows in next(iter(columns.values())).items():
        found.add_row(Text(title, "bold"))
        for label in rows:
            cells = [shown[title][label] for shown in columns.values()]
            if any(cells):
                found.add_row(f"  {label}", *(Text(cell, _looks(label, cell)) for cell in cells))
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
    blocks = {plan.stage: plan.tokens_per_step // plan.setting.block for plan in plans}
    return [
        f"{stage}: {has:,} blocks a step, where the size has {size.training(stage).global_batch:,}; "
        "--gradient-accumulation-steps and --per-device-train-batch-size in --arguments make it so again."
        for stage, has in blocks.items()
        if has != size.training(stage).global_batch
    ]


def show(console: "Console", title: str, found: "Table", notes: Sequence[str], warned: Sequence[str]) -> None:
    from rich.text import Text

    console.print(f"{title}\n", style="bold")
    console.print(found, "")
    for line in notes:
        console.print(line, style="dim")
    for line in warned:
        console.print(Text.assemble(("warning", "bold yellow"), f" {line}"))


def record(plan: Plan, remedies: Sequence[str], warned: Sequence[str], kinds: Sequence[str]) -> dict[str, Any]:
    """A plan as JSON: bytes, seconds, tokens."""
    s, gpu = plan.setting, plan.gpu
    return {
        "stage": plan.stage, "gpu": gpu.name if gpu else None, "nodes": plan.nodes, "gpus_per_node": plan.per_node,
        "fits": plan.fits,
        "memory": {"needed": plan.needed, "available": gpu.memory if gpu else None, "peak_at": plan.phase.name,
                   "tensors": dict(plan.phase.parts)},
        "parameters": {"base": s.base_parameters, "frozen": s.frozen, "trained": s.trained, "pieces": s.pieces},
        "deepspeed": plan.options.deepspeed, "gradient_checkpointing": s.checkpointing,
        "batch": s.batch, "accumulation": s.accumulation, "block": s.block,
        "steps": plan.steps, "tokens_per_step": plan.tokens_per_step, "tokens": plan.tokens, "mfu": plan.mfu,
        "tokens_per_second": plan.tokens_per_second, "seconds": plan.seconds, "sent_per_gpu_and_step": plan.exchanged,
        "s3": {"read": plan.s3_read, "written": plan.s3_written, "kept": plan.s3_kept, "artifact": plan.artifact},
        "checkpoint": {"bytes": plan.checkpoint, "count": plan.checkpoint_count},
        "node": {"ephemeral_storage": plan.ephemeral, "memory": plan.host_memory},
        "fits_on": list(kinds), "would_fit_with": list(remedies), "warnings": list(warned),
    }  # fmt: skip


def serving_record(plan: ServingPlan) -> dict[str, Any]:
    return {
        "stage": "serve", "gpu": plan.gpu.name, "gpus": plan.gpus, "fits": plan.fits,
        "memory": {name: getattr(plan, name) for name in ("needed", "available", "weights", "cache")},
        "context": plan.context, "concurrency": plan.concurrency, "concurrency_at_most": plan.most,
    }  # fmt: skip


def _many(tokens: float) -> str:
    """`6.14 billion`, `98.3 million`, `36,864`."""
    if tokens < 10**6:
        return f"{tokens:,.0f}"
    return f"{tokens / 1e9:.2f} billion" if tokens >= 10**9 else f"{tokens / 1e6:.1f} million"
