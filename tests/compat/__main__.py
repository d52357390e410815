"""`make compat` (all), or `make compat ONLY="trl mergekit"`: programs one after another, and docs/compatibility.md.

The page keeps the rows of those that are not tried. Exit code 1 when one differs from us in ids, logits or answers
without a word. COMPAT_KEEP=1: with the artifacts of the run before, for who writes a script.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from tests.compat import artifacts, table
from tests.compat.artifacts import BASES, BLENDS, BYTE_LEVEL, MODELS
from tests.compat.comparison import Comparison
from tests.compat.environments import Failed, install, run
from tests.compat.programs import PROGRAMS
from tests.loaded_model import load_model

BUILD = Path("build/compat").resolve()
PAGE = Path("docs/compatibility.md")


def main(chosen: list[str]) -> int:
    known = [program.name for program in PROGRAMS]
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        sys.exit(f"{', '.join(unknown)}: no such program; there are {', '.join(known)}")
    # ended from outside, it ends what it started (environments.py)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # the suite's own processes ask no network either; one thread each, which small models run fastest with
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    os.environ["ZHLLAMA_CACHE"] = str(BUILD / "cache")
    work = BUILD / "work"
    listed = work / "made.json"
    if not (os.environ.get("COMPAT_KEEP") and listed.is_file()):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        listed.write_text(json.dumps(artifacts.make(work)))
    made = json.loads(listed.read_text())
    probe = artifacts.probe_lines()
    ours = {
        name: artifacts.said(
            load_model(made[name]), artifacts.template_of(made[name]), probe if name in BYTE_LEVEL else ()
        )
        for name in MODELS
    }
    for name, base in BASES.items():
        # an engine has the base's template: it has to be what the adapter was taught
        template = artifacts.template_of(made[name]) or artifacts.template_of(made[base])
        ours[name] = artifacts.said(load_model(made[base], made[name]), template)
    asked = question(made, ours, probe)
    comparison = Comparison(made, ours, work)
    differing = 0
    for program in PROGRAMS:
        if chosen and program.name not in chosen:
            continue
        shutil.rmtree(work / program.name, ignore_errors=True)
        told = asked | {"out": str(work / program.name)}
        try:
            found = run(install(program), program.script, told, program.limit)
            rows, versions = comparison.rows(found, program.known), found["versions"]
        except Failed as error:
            rows, versions = [table.Row("install or start", f"error: {error}")], {}
        differing += sum(row.differs for row in rows)
        sections = table.sections(PAGE.read_text(encoding="utf-8"))
        sections[program.name] = table.section(program, versions, rows)
        print(sections[program.name], flush=True)
        PAGE.write_text(table.page([sections[name] for name in known if name in sections]), encoding="utf-8")
    print(f"{differing} results differ from ours")
    return 1 if differing else 0


def question(made: dict[str, str], ours: dict[str, artifacts.Said], probe: list[str]) -> dict[str, Any]:
    """What a script is told: folders and files by name, texts, and our ids of them, for which logits are asked."""
    folder = {name: reference.removesuffix("/manifest.json") for name, reference in made.items()}
    return {
        "lines": artifacts.LINES,
        "probe": dict.fromkeys(BYTE_LEVEL, probe),
        "chats": artifacts.CHATS,
        "answer": artifacts.ANSWER,
        "head": artifacts.HEAD,
        "models": {name: folder[name] for name in MODELS},
        "adapters": {name: [folder[name], folder[base]] for name, base in BASES.items()},
        "based": BASES,
        "blends": {method: {"ours": folder[f"blend-{method}"], **weights} for method, weights in BLENDS.items()},
        "gguf": {name: folder[f"gguf-{name}"] for name in MODELS},
        "said": {
            name: {"ids": said.ids, "chats": said.chats, "rows": said.logits[0].shape[-1], "pieces": said.pieces}
            for name, said in ours.items()
        },
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
