"""What would make a plan fit: smaller batches, ZeRO, other GPUs, more nodes; where a size gives its jobs too little."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipelines.planner.estimate import Plan, PlanRequest, plan
from pipelines.planner.gpus import Gpu
from pipelines.planner.table import gigabytes, hours
from pipelines.sizes import Size
from zhllama.errors import InputError
from zhllama.kubernetes.formats import amount


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
    # the batch halved, and halved again, with as many more passes, so that the global batch stays
    batch, passes = options.per_device_train_batch_size, options.gradient_accumulation_steps
    smaller = []
    while batch > 1 and batch % 2 == 0:
        batch, passes = batch // 2, passes * 2
        smaller.append(f"--per-device-train-batch-size {batch} --gradient-accumulation-steps {passes}")
    last = smaller[-1] if smaller else ""

    def given(*more: str) -> tuple[str, PlanRequest]:
        text = " ".join(word for word in more if word)
        whole = f"{request.arguments} {text}".strip()
        return f"--arguments {shlex.quote(text)}", replace(request, arguments=whole)

    if checkpointing:
        yield given(checkpointing)
    yield from (given(checkpointing, less) for less in smaller)
    if made.setting.zero.stage == 0 and made.setting.processes > 1:
        yield given(checkpointing, "--deepspeed zero2", last)
    if made.setting.zero.stage != 3:
        yield from (given(checkpointing, less, "--deepspeed zero3") for less in dict.fromkeys(("", last)))
    for gpu in kinds:
        if request.gpu and gpu.memory > request.gpu.memory:
            yield f"--gpu {gpu.name}", replace(request, gpu=gpu)
    for times in (2, 4, 8, 16):
        nodes = made.nodes * times
        zero3 = given(checkpointing, last, "--deepspeed zero3" if made.setting.zero.stage != 3 else "")
        yield f"--nodes {nodes} {zero3[0]}", replace(zero3[1], nodes=nodes)


def warnings(made: Plan, size: Size) -> list[str]:
    """Where the size's file gives the job less than the plan needs."""
    training, seconds = size.training(made.stage), made.seconds
    found = []
    for field, need in (("memory", made.host_memory), ("ephemeral_storage", made.ephemeral)):
        told = getattr(training, field)
        if need > (has := float(amount(told) or 0)):
            place = f"{told} ({gigabytes(has)}) in pipelines/sizes/{size.name}.yaml"
            found.append(f"{made.stage}: {field} of a node is {place}, and {gigabytes(need)} are needed")
    if seconds is not None and seconds > training.deadline_seconds:
        ended = f"the job is ended after {hours(training.deadline_seconds)} (deadline_seconds)"
        found.append(f"{made.stage}: {ended}, and {hours(seconds)} are needed")
    return found
