"""What would make a plan fit: smaller batches, ZeRO, other GPUs, more nodes; where a size gives its jobs too little."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipelines.planner.estimate import Plan, PlanRequest, plan
from pipelines.planner.gpus import Gpu
from pipelines.planner.units import gigabytes, hours
from pipelines.sizes import Size
from zhllama.errors import InputError
from zhllama.kubernetes.quantity import quantity
from zhllama.training.options import LoraOptions


def remedies(short: Sequence[Plan], request: PlanRequest, kinds: Sequence[Gpu], most: int = 3) -> list[str]:
    """Changes under which all of these plans fit, the least costly first, in the words of the command line."""
    found: dict[str, int] = {}
    # the one with the largest batch has the most to give
    for words, changed in _changes(max(short, key=lambda made: made.setting.batch), request, kinds):
        if any(_words(less) <= _words(words) for less in found):
            # less of it is enough
            continue
        try:
            others = [plan(made.stage, changed) for made in short]
        except InputError:
            continue
        if all(other.fits for other in others):
            found[words] = max(other.needed for other in others)
        if len(found) == most:
            break
    return [f"{words} ({gigabytes(needed)})" for words, needed in found.items()]


def _words(command: str) -> set[str]:
    return {word for text in shlex.split(command) for word in text.split()}


def _changes(made: Plan, request: PlanRequest, kinds: Sequence[Gpu]) -> Iterator[tuple[str, PlanRequest]]:
    options = made.options
    checkpointing = "" if options.gradient_checkpointing else "--gradient-checkpointing true"
    smaller = _smaller_batches(options)

    def given(*more: str) -> tuple[str, PlanRequest]:
        text = " ".join(word for word in more if word)
        whole = f"{request.arguments} {text}".strip()
        return f"--arguments {shlex.quote(text)}", replace(request, arguments=whole)

    if checkpointing:
        yield given(checkpointing)
    for batch in smaller:
        yield given(checkpointing, batch)
    last = smaller[-1] if smaller else ""
    if made.setting.zero.stage == 0 and made.setting.processes > 1:
        yield given(checkpointing, "--deepspeed zero2", last)
    if made.setting.zero.stage != 3:
        for batch in ("", last) if last else ("",):
            yield given(checkpointing, batch, "--deepspeed zero3")
    for gpu in kinds:
        if request.gpu and gpu.memory > request.gpu.memory:
            yield f"--gpu {gpu.name}", replace(request, gpu=gpu)
    for times in (2, 4, 8, 16):
        nodes = made.nodes * times
        zero3 = given(checkpointing, last, "--deepspeed zero3" if made.setting.zero.stage != 3 else "")
        yield f"--nodes {nodes} {zero3[0]}", replace(zero3[1], nodes=nodes)


def _smaller_batches(options: LoraOptions) -> list[str]:
    """The batch halved, and halved again, with as many more passes, so that the global batch stays."""
    batch, passes = options.per_device_train_batch_size, options.gradient_accumulation_steps
    found = []
    while batch > 1 and batch % 2 == 0:
        batch, passes = batch // 2, passes * 2
        found.append(f"--per-device-train-batch-size {batch} --gradient-accumulation-steps {passes}")
    return found


def kinds_that_fit(made: Plan, request: PlanRequest, kinds: Sequence[Gpu]) -> list[str]:
    """The kinds of GPU on which this very plan fits."""
    return [gpu.name for gpu in kinds if plan(made.stage, replace(request, gpu=gpu)).fits]


def warnings(made: Plan, size: Size) -> list[str]:
    """Where the size's file gives the job less than the plan needs."""
    training = size.training(made.stage)
    found = []
    for field, need in (("memory", made.host_memory), ("ephemeral_storage", made.ephemeral)):
        has = quantity(getattr(training, field)) or 0
        if need > has:
            found.append(
                f"{made.stage}: {field} of a node is {getattr(training, field)} ({gigabytes(has)}) in "
                f"pipelines/sizes/{size.name}.yaml, and {gigabytes(need)} are needed"
            )
    if made.seconds is not None and made.seconds > training.deadline_seconds:
        found.append(
            f"{made.stage}: the job is ended after {hours(training.deadline_seconds)} (deadline_seconds), and "
            f"{hours(made.seconds)} are needed"
        )
    return found
