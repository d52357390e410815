"""A stage, run: open the inputs, hand out what is published already or do the work, write what KFP wants."""

import dataclasses
import importlib.metadata
import json
import logging
import math
import sys
import time
import typing
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from zhllama import storage
from zhllama.artifacts.json_file import value_of
from zhllama.artifacts.manifest import Input, Manifest, digest_of
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.published import find_published
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.stage.command_line import parse
from zhllama.stage.inputs import Inputs
from zhllama.stage.options import Stage, StageOptions, configuration_of, stage_of
from zhllama.stage.program import guarded

log = logging.getLogger("stage")

REPORT = "report.html"
Work = Callable[[Stage, Inputs, ArtifactWriter], Manifest]
"""What a stage does: reads its inputs, publishes through the writer."""


def cache_key(options: StageOptions, inputs: Mapping[str, Input]) -> str:
    """The name of a stage's work, 32 hexadecimal digits: the digest of all that decides its result. Not of the code,
    since a comment would train a 7B anew: `cache_version` is raised by hand, and tests/test_cache_versions.py reminds
    who changes what a stage computes. InputError when a library whose version counts is not installed."""
    try:
        versions = {library: importlib.metadata.version(library) for library in options.libraries}
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f"the package {error.name} is not installed; install this stage's extra") from error
    value = {
        "stages": options.cache_versions(),
        "versions": versions,
        "configuration": configuration_of(options),
        "inputs": {name: given.digest for name, given in inputs.items()},
    }
    return digest_of(value)[:32]


def run_stage(options: Stage, work: Work[Stage]) -> Manifest:
    """The stage without the process around it: key, skip or work, outputs. Returns the manifest."""
    # a wrong one is found before the work
    executor_output = options.executor_output or _output_file(options.executor_input)
    stage = stage_of(type(options))
    started = time.monotonic()
    storage.check_writable(options.store)
    inputs = Inputs(options)
    key = cache_key(options, inputs.records)
    manifest = find_published(options.store, stage, key)
    if manifest is not None:
        log.info("%s: already done, nothing has changed: %s", stage, manifest.reference)
    else:
        configuration = configuration_of(options)
        out = ArtifactWriter(options.store, stage, key, configuration, inputs.records, inputs.require_unchanged)
        manifest = work(options, inputs, out)
        summary = manifest.facts.get("summary", "")
        log.info("%s: done in %.1f s%s", stage, time.monotonic() - started, f": {summary}" if summary else "")
    if options.output:
        manifest.write_copy(storage.normalise(options.output))
    if options.report and any(file.path == REPORT for file in manifest.named):
        storage.write_bytes(storage.normalise(options.report), open_artifact(manifest.reference).read(REPORT))
    if executor_output:
        # KFP reads this with a strict parser: NaN and infinity are no JSON
        metadata = {name: value for name, value in manifest.metrics.items() if math.isfinite(value)}
        value = {"artifacts": {"metrics": {"artifacts": [{"metadata": metadata}]}}}
        storage.write_bytes(storage.normalise(executor_output), json.dumps(value).encode())
    options.accept(manifest)
    # last: who finds it finds the others
    if options.reference:
        storage.write_bytes(storage.normalise(options.reference), manifest.reference.encode())
    return manifest


def _output_file(executor_input: str) -> str:
    """Where the executor input (JSON) says that the executor output belongs; "" without one."""
    if not executor_input:
        return ""
    try:
        return str(value_of(executor_input)["outputs"]["outputFile"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--executor-input: not KFP's executor input ({error!r}); pass {{{{$}}}} as it is") from error


def main(kind: type[Stage], work: Work[Stage], rest: str = "") -> NoReturn:
    """The whole program of a stage. rest: the field (a tuple of texts) that takes what stands after `--`."""

    def body() -> None:
        arguments = sys.argv[1:]
        cut = arguments.index("--") if rest and "--" in arguments else len(arguments)
        options = parse(kind, arguments[:cut])
        if rest:
            options = dataclasses.replace(options, **typing.cast(Any, {rest: tuple(arguments[cut + 1 :])}))
        run_stage(options, work)

    guarded(body)
