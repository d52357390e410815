"""A stage, run: open the inputs, hand out what is published already or do the work, write what KFP wants.

`main(Options, run)` is the whole program. The outputs: a copy of the manifest (`--output`), the reference
(`--reference`), the report page (`--report`) and the metrics (`--executor-output`).
"""

import dataclasses
import json
import logging
import math
import sys
import time
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from zhllama import storage
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.published import find_published
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.stage.cache_key import input_key, inputs_of
from zhllama.stage.command_line import parse
from zhllama.stage.options import Stage, StageOptions, configuration_of
from zhllama.stage.program import guarded

log = logging.getLogger("stage")


REPORT = "report.html"


# --- running ----------------------------------------------------------------------------------------------------------
def run_stage(
    config: Stage,
    run: Callable[[Stage, ArtifactWriter], Manifest],
    packages: Sequence[str] = (),
    also_source: Sequence[str] = (),
) -> Manifest:
    """The stage without the process around it: key, skip or work, outputs. Returns the manifest."""
    _output_file(config.executor_input)  # a wrong one is found before the work
    stage = type(config).__module__.split(".")[1]
    started = time.monotonic()
    storage.check_writable(config.store)
    inputs = inputs_of(config)
    key = input_key(config, inputs, (stage, *also_source), packages)
    manifest = find_published(config.store, stage, key)
    if manifest is not None:
        log.info("%s: already done, nothing has changed: %s", stage, manifest.reference)
    else:
        out = ArtifactWriter(config.store, stage, key, configuration_of(config), inputs)
        manifest = run(config, out)
        summary = manifest.facts.get("summary", "")
        log.info("%s: done in %.1f s%s", stage, time.monotonic() - started, f": {summary}" if summary else "")
    write_outputs(config, manifest)
    return manifest


def write_outputs(config: StageOptions, manifest: Manifest) -> None:
    """What KFP reads after the step: manifest copy, report, metrics, and last the reference."""
    if config.output:
        storage.write_bytes(storage.normalise(config.output), manifest.to_json())
    if config.report and any(file.path == REPORT for file in manifest.files):
        page = open_artifact(manifest.reference).read(REPORT)
        storage.write_bytes(storage.normalise(config.report), page)
    if executor_output := config.executor_output or _output_file(config.executor_input):
        # KFP reads this with a strict parser: NaN and infinity are no JSON
        metadata = {name: value for name, value in manifest.metrics.items() if math.isfinite(value)}
        value = {"artifacts": {"metrics": {"artifacts": [{"metadata": metadata}]}}}
        storage.write_bytes(storage.normalise(executor_output), json.dumps(value).encode())
    if config.reference:
        storage.write_bytes(storage.normalise(config.reference), manifest.reference.encode())


def _output_file(executor_input: str) -> str:
    """Where the executor input (JSON) says that the executor output belongs; "" without one."""
    if not executor_input:
        return ""
    try:
        return str(json.loads(executor_input)["outputs"]["outputFile"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--executor-input: not KFP's executor input ({error!r}); pass {{{{$}}}} as it is") from error


def main(
    kind: type[Stage],
    run: Callable[[Stage, ArtifactWriter], Manifest],
    packages: Sequence[str] = (),
    also_source: Sequence[str] = (),
    rest: str = "",
) -> NoReturn:
    """The whole program of a stage. Never returns.

    packages: whose installed versions are part of the key. also_source: other stages whose source is. rest: the field
    (a tuple of texts) that takes what stands after `--`.
    """

    def work() -> None:
        arguments, remainder = sys.argv[1:], []
        if rest and "--" in arguments:
            cut = arguments.index("--")
            arguments, remainder = arguments[:cut], arguments[cut + 1 :]
        config = parse(kind, arguments)
        if rest:
            config = dataclasses.replace(config, **typing.cast(Any, {rest: tuple(remainder)}))
        run_stage(config, run, packages, also_source)

    guarded(work)
