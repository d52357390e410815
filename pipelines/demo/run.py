"""The demo's course: material, a base model, one run of the compiled pipeline, and what was learnt, as tables.
What has not changed is not done again: material and base carry the digest of what made them, steps skip themselves."""

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from pipelines.demo.bases import SMOLLM2, STEPS, SUMS, TOY
from pipelines.demo.material import prepare_material
from zhllama import storage, terminal
from zhllama.artifacts.open import open_artifact
from zhllama.errors import EXIT_DONE, EXIT_FAULT, InputError
from zhllama.stage.options import split_references
from zhllama.stage.report_figures import figures_table
from zhllama.stage.run import REPORT

log = logging.getLogger("demo")


def upload(folder: Path, target: str) -> str:
    """Puts the files of a folder under a prefix, as a user would, and gives the prefix."""
    kept = {item.name for item in storage.listing(str(folder))}
    for name in {item.name for item in storage.listing(target)} - kept:
        storage.delete(storage.join(target, name))
    for file in sorted(kept):
        storage.copy(storage.join(str(folder), file), storage.join(target, file))
    return target


def demo(work: Path, text: str = "", instructions: str = "", toy: bool = False) -> int:
    """Runs the demo below `work` and returns the exit code. text, instructions: references to a user's own text and
    items, instead of the demo's; a share of each is held out for the evaluation. toy: a tiny model that is made here,
    and speaks no language, in the place of SmolLM2."""
    from pipelines import sizes
    from pipelines.adapt_llama import compile_pipeline
    from pipelines.configuration import configure
    from pipelines.local.runner import run_pipeline, s3_for

    started = time.monotonic()
    console = terminal.console(highlight=False)
    work = work.absolute()
    for option, given in (("--text", text), ("--instructions", instructions)):
        for reference in split_references(given):
            # what is on this machine is looked at before the minutes that the material and the base take
            if "://" not in reference:
                open_artifact(reference, option)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--work {work}: {error.strerror}; choose another folder") from error
    material = prepare_material(work / "material")
    base = TOY if toy else SMOLLM2
    weights = work / base.folder
    weights.mkdir(exist_ok=True)
    base.make(material, weights)
    with s3_for(work, "") as store:
        # side by side with the artifacts, in the same bucket
        uploads = f"{store.rsplit('/', 1)[0]}/uploads"
        own = {"text": text, "instructions": instructions}
        folders = {
            "weights": (weights, base.folder),
            "text": (material.text, "text"),
            "english_text": (material.english_held_out, "english-held-out"),
            # what it knows is shown to it again: else it is forgotten in minutes
            "replay_text": (material.replay, "replay") if base.speaks else (material.english, "english"),
            "instructions": (material.instructions, "instructions"),
            "prompts": (material.prompts, "prompts"),
        }
        if not text:
            folders["text_validation"] = material.text_held_out, "text-held-out"
        if not instructions:
            folders["instructions_validation"] = material.instructions_held_out, "held-out"
        arguments: dict[str, Any] = {"store": store, "expect": f"{uploads}/{base.folder}/{SUMS}"}
        for name, (folder, place) in folders.items():
            theirs = own.get(name)
            arguments[name] = storage.normalise(theirs) if theirs else upload(folder, f"{uploads}/{place}")
        if base.weights:
            arguments["weights"] += f"/{base.weights}"
        if base.speaks and not instructions:
            arguments["instructions"] += f":0.5,{upload(material.writing, f'{uploads}/writing')}:0.5"
        settings = {"backend": "local", **base.settings(work)}
        told = configure(base.size, arguments, defaults=settings, write=False)
        package = work / "pipeline.yaml"
        compile_pipeline(told, package)
        result = run_pipeline(package, arguments, work, again=zhllama_command("demo", work, text, instructions, toy))
        if result.exit_code != EXIT_DONE:
            return result.exit_code
        evaluation = open_artifact(result.reference("evaluate"))
        page = work / REPORT
        page.write_bytes(evaluation.read(REPORT))
        gguf = as_gguf(result.reference("merge_sft"), store, work)
        merged = [open_artifact(result.reference(step)).manifest for step in ("merge_sft", "merge_both")]
        report = json.loads(evaluation.read("report.json"))
    one_by_one, in_one_call = (manifest.facts["weights_digest"] for manifest in merged)
    show_report(report, (one_by_one, in_one_call), console)
    minutes = (time.monotonic() - started) / 60
    console.print(f"\nAll of it took {minutes:.1f} minutes. The report, a page for the browser: {page}")
    console.print(f"The model for llama.cpp: {gguf}")
    console.print(f"Talk to the model: {zhllama_command('chat', work)}")
    fewer = any(told[name] < sizes.load(base.size).training(name.removesuffix("_steps")).steps for name in STEPS)
    figures = report["models"][0], report["models"][-1]
    problems = [] if text or instructions or fewer else base.shortfalls(*figures)
    if one_by_one != in_one_call:
        problems.append("merging one by one and in one call gave different weights")
    for problem in problems:
        log.error("%s", problem)
    return EXIT_FAULT if problems else EXIT_DONE


def as_gguf(model: str, store: str, work: Path) -> Path:
    """The model as one file for llama.cpp, in float16, which needs no llama.cpp to be written."""
    told, target = work / "gguf.txt", work / "adapted-f16.gguf"
    command = [sys.executable, "-m", "components.export_model", "--store", store, "--model", model, "--format", "gguf"]
    command += ["--quantization", "f16", "--reference", str(told)]
    ended = subprocess.run(command, env={**os.environ, "ZHLLAMA_LOG": "WARNING"})
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command[1:3])} ended with {ended.returncode}")
    exported = open_artifact(told.read_text())
    storage.copy(storage.join(exported.root, "model-f16.gguf"), str(target))
    return target


def show_report(report: Mapping[str, Any], merge_proof: tuple[str, str], console: Console) -> None:
    """`report` is evaluate's report.json; `merge_proof` the weights' digests of the two ways to merge."""
    models = report["models"]
    one_by_one, in_one_call = (digest[:12] for digest in merge_proof)
    proof = Text(f"Merged one by one and in one call: the same weights, bit for bit ({one_by_one}).", "green")
    if merge_proof[0] != merge_proof[1]:
        proof = Text(f"Merged one by one ({one_by_one}) and in one call ({in_one_call}): DIFFERENT weights.", "red")
    console.print()
    console.print(figures_table("What was learnt", models))
    console.print(proof)
    for sample in report["samples"]:
        # answers to held-out items, and texts gone on with, are in the report
        if sample["kind"] == "prompt":
            body = Text()
            for label in (models[0]["label"], models[-1]["label"]):
                body.append(f"{label}: ", "bold")
                body.append(f"{' '.join(sample['answers'].get(label, '–').split()) or '(nothing)'}\n")
            body.rstrip()
            console.print(Panel(body, title=Text(sample["prompt"].replace("\n", " · ")), title_align="left"))


def zhllama_command(name: str, work: Path, text: str = "", instructions: str = "", toy: bool = False) -> str:
    """A zhllama command for this shell: this program, in the work folder."""
    program = Path(sys.executable).with_name("zhllama")
    words = [os.path.relpath(program) if program.is_relative_to(Path.cwd()) else str(program), name]
    given = {"--text": text, "--instructions": instructions}
    given["--work"] = "" if work == Path(".zhllama").absolute() else str(work)
    words += ["--toy"] if toy else []
    return shlex.join([*words, *(word for pair in given.items() if pair[1] for word in pair)])
