"""The stage command: `python -m components.<stage> --option value`, the same in KFP, in a pod and in a shell.

`main(Config, run)` parses the options (a dataclass, through tyro), opens the inputs, and when the same work is already
published hands that out again; else it calls `run(config, out)`, which publishes through `out` and returns the
manifest. Then it writes what KFP wants: a copy of the manifest (`--output`), the reference (`--reference`), the report
page (`--report`) and the metrics (`--executor-output`).

KFP passes every parameter as text: `true` / `false` for booleans and an empty string for an absent value, which here
means "the default". Exit codes: 0 done, 2 wrong input (one line, no traceback), 143 cancelled, else a fault.
"""

import dataclasses
import errno
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from zhllama import storage
from zhllama.artifacts.manifest import Input, Manifest, digest_of
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.published import find_published
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import EXIT_CANCELLED, EXIT_DONE, EXIT_FAULT, EXIT_INPUT, InputError, StorageFault
from zhllama.stage.log import leave_last_line, mask, set_up_logging
from zhllama.stage.tls import take_secrets, trust_site

log = logging.getLogger("stage")

_REF = "reference"
_SEVERAL = "several"
_WEIGHTED = "weighted"
_NOT_KEYED = "not keyed"
Ref = Annotated[str, _REF]
"""A field that holds one reference ("" when absent). Its digest, not its address, is part of the input key."""
Refs = Annotated[str, _REF, _SEVERAL]
"""Several references, comma-separated or by repeating the option."""
WeightedRefs = Annotated[str, _REF, _SEVERAL, _WEIGHTED]
"""Likewise, and each may end in `:weight`."""

REPORT = "report.html"


def not_keyed(kind: Any) -> Any:
    """Marks a field that does not change the result (`workers: not_keyed(int) = 2`): it is left out of the key."""
    return Annotated[kind, _NOT_KEYED]


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What every stage takes."""

    store: str
    """Where the data is put: a folder or an s3:// prefix."""
    output: str = ""
    """Where a copy of the manifest is written (a path or an s3:// address)."""
    reference: str = ""
    """Where the artifact's reference is written, as text."""
    report: str = ""
    """Where a copy of the artifact's HTML report is written, if it has one."""
    executor_output: str = ""
    """Where KFP's executor output (metrics as artifact metadata) is written."""
    executor_input: str = ""
    """KFP's executor input, as JSON (the placeholder `{{$}}`): it names that place, as its outputs.outputFile."""

    def more_inputs(self) -> dict[str, Input]:
        """Inputs that are no artifacts, each with a digest that tells when it has changed. Part of the key."""
        return {}


Config = TypeVar("Config")
Stage = TypeVar("Stage", bound=StageOptions)
_PLUMBING = tuple(field.name for field in dataclasses.fields(StageOptions))


def split_references(value: str) -> list[str]:
    """`a,b:0.5` → [`a`, `b`]: the addresses of a reference field, weights taken off."""
    return [address for address, _ in weighted_references(value)]


def weighted_references(value: str) -> list[tuple[str, float | None]]:
    """`zh:0.9,en:0.1` → [(`zh`, 0.9), (`en`, 0.1)]. Beside one with a weight, one without has weight 1; where none has
    one, all have None."""
    found: list[tuple[str, float | None]] = []
    for part in filter(None, (part.strip() for part in value.split(","))):
        match = re.fullmatch(r"(.+):(\d+(?:\.\d+)?|\.\d+)", part)
        found.append((match[1], float(match[2])) if match else (part, None))
    if all(weight is None for _, weight in found):
        return found
    return [(address, 1.0 if weight is None else weight) for address, weight in found]


# --- the command line -------------------------------------------------------------------------------------------------


def parse(kind: type[Config], arguments: Sequence[str]) -> Config:
    """The options as a dataclass. InputError for an unknown option or a value that does not fit."""
    import tyro

    bridged = _bridge(kind, _with_machine(kind, list(arguments)))
    prog = f"python -m {program(kind)}"
    config = (tyro.conf.FlagConversionOff,)
    if "--help" in bridged or "-h" in bridged:
        return tyro.cli(kind, prog=prog, args=bridged, config=config)
    said = io.StringIO()
    try:
        with _wide_terminal(), redirect_stderr(said), redirect_stdout(said):
            return tyro.cli(kind, prog=prog, args=bridged, config=config, use_underscores=False)
    except _Terminated:
        raise
    except SystemExit as error:
        raise InputError(f"{program(kind)}: {_tyros_complaint(said.getvalue())}; see --help") from error


def program(kind: type) -> str:
    """Whose options they are: what the class says (others check a training's options for it), or its own stage."""
    return str(getattr(kind, "PROGRAM", ".".join(kind.__module__.split(".")[:2])))


@contextmanager
def _wide_terminal() -> Iterator[None]:
    """tyro folds its messages at the terminal's width, in the middle of a path if need be."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "2000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _tyros_complaint(said: str) -> str:
    """What is wrong, in one line. tyro writes a title, a rule, what is wrong, a rule, and the help of the option."""
    sections = re.split(r"^[ ]*-{4,}[ ]*$", said, flags=re.MULTILINE)
    text = " ".join(sections[min(1, len(sections) - 1)].split())
    return text.removesuffix(".") or "the options do not parse"


MACHINE = "--machine"
"""Of a class with that field: options as one JSON object. A pipeline's step is told a job's machine so."""


def _with_machine(kind: type, arguments: list[str]) -> list[str]:
    """The arguments with what `--machine` says put before them, but for options that are there by themselves."""
    if MACHINE[2:] not in {field.name for field in dataclasses.fields(kind)}:
        return arguments
    rest, told, at = [], "", 0
    while at < len(arguments):
        word = arguments[at]
        name, equals, value = word.partition("=")
        at += 1
        if name != MACHINE:
            rest.append(word)
        elif equals:
            told = value
        else:
            told = arguments[at] if at < len(arguments) else ""
            at += 1
    try:
        machine = json.loads(told or "{}")
    except ValueError as error:
        raise InputError(f'{program(kind)}: {MACHINE} {told}: not JSON ({error}); write {{"memory": "8Gi"}}') from error
    if not isinstance(machine, dict):
        raise InputError(f'{program(kind)}: {MACHINE} {told}: write options by name, as {{"memory": "8Gi"}}')
    given = {word.partition("=")[0].replace("_", "-") for word in rest if word.startswith("--")}
    options = {f"--{name.replace('_', '-')}": value for name, value in machine.items()}
    return [*(f"{name}={_as_text(value)}" for name, value in options.items() if name not in given), *rest]


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _bridge(kind: type, arguments: list[str]) -> list[str]:
    """KFP's texts as tyro wants them: empty values dropped, true/false as True/False, unknown options refused.

    A text may begin with `--` (a prompt may): only an option's name is never taken for a value. An option of several
    references may be repeated; one of a single reference may not, since all but the last would be lost unseen.
    """
    hints = typing.get_type_hints(kind)
    marked = typing.get_type_hints(kind, include_extras=True)
    fields = {f"--{field.name.replace('_', '-')}": field.name for field in dataclasses.fields(kind)}
    known = {option: hints[name] for option, name in fields.items()}
    place_of: dict[str, int] = {}

    def option(word: str) -> str:
        return word.partition("=")[0].replace("_", "-")

    bridged: list[str] = []
    at = 0
    while at < len(arguments):
        word = arguments[at]
        at += 1
        if not word.startswith("--") or word == "--help":
            bridged.append(word)
            continue
        name = option(word)
        _, has_value, value = word.partition("=")
        if name not in known:
            raise InputError(f"{program(kind)}: there is no option {name}{nearest(name, known)}; see --help")
        if not has_value:
            following = arguments[at] if at < len(arguments) else None
            flag = _is_bool(known[name])
            if following is None or option(following) in known or (flag and following.startswith("--")):
                if not flag:
                    raise InputError(f"{program(kind)}: the option {name} needs a value; see --help")
                value = "true"
            else:
                value = following
                at += 1
        if value == "":
            continue
        if _is_bool(known[name]) and value.lower() in ("true", "false"):
            value = value.capitalize()
        marks = getattr(marked[fields[name]], "__metadata__", ())
        if _REF in marks and name in place_of:
            if _SEVERAL not in marks:
                raise InputError(f"{program(kind)}: the option {name} is there twice, and takes one reference")
            bridged[place_of[name]] += f",{value}"
            continue
        place_of[name] = len(bridged)
        bridged.append(f"{name}={value}")
    return bridged


def _is_bool(hint: Any) -> bool:
    return hint is bool or (isinstance(hint, types.UnionType) and bool in typing.get_args(hint))


def nearest(word: str, choices: typing.Iterable[str]) -> str:
    """` (did you mean x?)`, or nothing when no choice is near."""
    import difflib

    found = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


# --- the input key ----------------------------------------------------------------------------------------------------


def references_of(config: Any) -> dict[str, list[str]]:
    """The reference fields that are set: name → addresses. InputError for a weight where none counts."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        marks = getattr(hints[field.name], "__metadata__", ())
        if _REF not in marks or not value:
            continue
        given = weighted_references(value)
        if _WEIGHTED not in marks and any(weight is not None for _, weight in given):
            option = f"--{field.name.replace('_', '-')}"
            raise InputError(f"{option} {value}: weights do not count here; leave them out")
        found[field.name] = [address for address, _ in given]
    return found


def configuration_of(config: Any) -> dict[str, Any]:
    """The options that change the result, as JSON values: no plumbing, no addresses of inputs."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        marks = getattr(hints[field.name], "__metadata__", ())
        if field.name in _PLUMBING or _NOT_KEYED in marks:
            continue
        value = getattr(config, field.name)
        if _REF in marks:
            # the weights and the order of several inputs count; their addresses do not
            weights = [weight for _, weight in weighted_references(value)]
            if any(weight is not None for weight in weights):
                chosen[field.name] = weights
            continue
        chosen[field.name] = value
    return typing.cast(dict[str, Any], json.loads(json.dumps(chosen)))


def inputs_of(config: Any) -> dict[str, Input]:
    """Reference fields → what they hold now. Several references in a field become `name.0`, `name.1`."""
    found: dict[str, Input] = {}
    for name, addresses in references_of(config).items():
        option = f"--{name.replace('_', '-')}"
        for index, address in enumerate(addresses):
            artifact = open_artifact(address, option)
            reference = artifact.manifest.reference if artifact.verified else _plain_address(address, artifact)
            found[name if len(addresses) == 1 else f"{name}.{index}"] = Input(reference, artifact.digest)
    if isinstance(config, StageOptions):
        found.update(config.more_inputs())
    return found


def _plain_address(address: str, artifact: Artifact) -> str:
    """A folder, prefix or file as it was given, made absolute; of a repository of the Hub, with the commit found."""
    return artifact.root if artifact.root.startswith("hf://") else storage.normalise(address)


def source_digest(stages: Sequence[str]) -> str:
    """SHA-256 over the files of the stages and of the library that do work (not the KFP signature, not the command
    line)."""
    root = Path(__file__).parents[2]
    running = hashlib.sha256()
    for folder in (*(f"components/{stage}" for stage in sorted(stages)), "zhllama"):
        for path in sorted((root / folder).rglob("*")):
            works = path.suffix in (".py", ".json", ".yaml", ".txt", ".html", ".jinja") and path.is_file()
            if works and path.name not in ("component.py", "__main__.py"):
                running.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return running.hexdigest()


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise InputError(f"the package {package} is not installed; install this stage's extra") from error
    return found


def input_key(config: Any, inputs: dict[str, Input], stages: Sequence[str], packages: Sequence[str]) -> str:
    """The name of this work: 32 hexadecimal digits of the digest of all that decides its result."""
    value = {
        "stages": list(stages),
        "source": source_digest(stages),
        "versions": versions_of(packages),
        "configuration": configuration_of(config),
        "inputs": {name: given.digest for name, given in inputs.items()},
    }
    return digest_of(value)[:32]


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


def guarded(work: Callable[[], None]) -> NoReturn:
    """Runs a program's body and ends the process with the contract's exit code and one line for an error."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        set_up_logging()
        take_secrets()
        trust_site()
        work()
    except InputError as error:
        end(EXIT_INPUT, f"error: {error}")
    except StorageFault as error:
        end(EXIT_FAULT, f"fault: {error}")
    except (KeyboardInterrupt, _Terminated):
        end(EXIT_CANCELLED, "cancelled")
    except BrokenPipeError:
        # whoever read our output (`| head`) has gone; what Python would still flush to it must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        mend = {
            errno.ENOSPC: "no space left; free some, or point --store, TMPDIR or ZHLLAMA_CACHE elsewhere",
            errno.EDQUOT: "the disk quota is used up; free some, or point --store, TMPDIR or ZHLLAMA_CACHE elsewhere",
            errno.EROFS: "the file system is read-only; choose another place",
            errno.EACCES: "permission denied; choose another place or mend its rights",
        }.get(error.errno or 0)
        if mend is None:
            _fault()
        end(EXIT_INPUT, f"error: {error.filename or 'a file'}: {mend}")
    except Exception:  # noqa: BLE001 - the end of the program: reported whole, exit code 1
        _fault()
    sys.exit(EXIT_DONE)


def _fault() -> NoReturn:
    print(mask(traceback.format_exc()), file=sys.stderr, flush=True)
    kind, error, _ = sys.exc_info()
    end(EXIT_FAULT, f"fault: {kind.__name__ if kind else ''}: {error}")


class _Terminated(SystemExit):
    """SIGTERM came. A SystemExit, so that what is open is given up on the way out."""


def _terminated(signum: int, frame: object) -> NoReturn:
    # a second SIGTERM must not cut short what the first one has begun to clear away
    signal.signal(signal.SIGTERM, lambda *_: None)
    raise _Terminated(EXIT_CANCELLED)


# A forked child (a library's worker) has nothing of ours to clear away, and an exception would come at a place that may
# swallow it: who then waits for the child waits forever. So SIGTERM ends it at once. The signal is held back while the
# child is made, so that one that comes early is not lost.
_masks = threading.local()


def _before_fork() -> None:
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _after_fork_in_child() -> None:
    if signal.getsignal(signal.SIGTERM) is _terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def end(code: int, line: str) -> NoReturn:
    """Prints the last line, leaves it where Kubernetes shows it, and exits."""
    leave_last_line(line)
    sys.exit(code)
