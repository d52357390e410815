"""What the stages compute, as digests: the code that decides results, without comments, docstrings and imports.

    python -m tests.cache_versions --because "the loop is written otherwise, its result is the same"

writes down what there is now. Do it when what a stage computes has changed but its result has not, or after its
`cache_version` was raised, because the result has. tests/test_cache_versions.py compares.
"""

import argparse
import ast
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.stage_options import options_class

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "goldens" / "computing.json"
STAGES = sorted(path.parent.name for path in (ROOT / "components").glob("*/__main__.py"))
PLUMBING = ("zhllama.stage", "zhllama.storage", "zhllama.artifacts", "zhllama.kubernetes", "zhllama.errors",
            "zhllama.progress")  # fmt: skip
"""Modules that move, say and start things, and compute nothing."""
SIGNATURES = ("__init__", "__main__", "component")


def source_of(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    for found in (path.with_suffix(".py"), path / "__init__.py"):
        if found.is_file():
            return found
    return None


def imported(module: str, tree: ast.Module) -> Iterator[str]:
    """Modules of ours that a module imports, at its top or inside a function."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [name for one in node.names for name in (f"{node.module}.{one.name}", node.module)]
        yield from (name for name in names if name.startswith(("zhllama.", "components.")) and source_of(name))


def computing_modules(stage: str) -> dict[str, ast.Module]:
    """The modules of a stage, and what they import, as far as it computes."""
    waiting = [
        f"components.{stage}.{path.stem}"
        for path in (ROOT / "components" / stage).glob("*.py")
        if path.stem not in SIGNATURES
    ]
    # a stage may call the library, and have no module of its own that does
    program = f"components.{stage}.__main__"
    waiting += imported(program, ast.parse((ROOT / "components" / stage / "__main__.py").read_text()))
    found: dict[str, ast.Module] = {}
    while waiting:
        module = waiting.pop()
        if module in found or module.startswith(PLUMBING):
            continue
        source = source_of(module)
        assert source is not None
        found[module] = ast.parse(source.read_text())
        waiting += imported(module, found[module])
    return found


def meaning(node: Any) -> Any:
    """A piece of syntax as lists, the same for every Python: no places, docstrings, imports, empty fields."""
    if isinstance(node, list):
        return [meaning(one) for one in node if not _says_nothing(one)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [
        [name, meaning(value)]
        for name, value in ast.iter_fields(node)
        if value not in (None, []) and name not in ("ctx", "type_comment", "kind")
    ]
    return [type(node).__name__, fields]


def _says_nothing(node: Any) -> bool:
    """A docstring, an import, what is imported for annotations alone."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or isinstance(node, ast.Import | ast.ImportFrom)


def definitions(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, digest) of each statement of a module; one without a name is called after its kind."""
    for node in tree.body:
        if _says_nothing(node):
            continue
        target = getattr(node, "target", None) or next(iter(getattr(node, "targets", [])), None)
        name = getattr(node, "name", None) or getattr(target, "id", type(node).__name__)
        yield name, hashlib.sha256(json.dumps(meaning(node)).encode()).hexdigest()[:12]


def computed(stage: str) -> dict[str, Any]:
    """A stage's cache version and definitions, wherever they stand: to move one changes nothing."""
    found: dict[str, list[str]] = {}
    for tree in computing_modules(stage).values():
        for name, digest in definitions(tree):
            found.setdefault(name, []).append(digest)
    version: Any = options_class(stage)
    return {
        "cache_version": version.cache_version,
        "definitions": {name: " ".join(sorted(digests)) for name, digests in sorted(found.items())},
    }


def recorded() -> dict[str, Any]:
    return dict(json.loads(GOLDEN.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cache_versions", description=__doc__.splitlines()[0])
    parser.add_argument("--because", required=True, help="one line: why the results are the same, or what was raised")
    because = parser.parse_args().because
    before = recorded() if GOLDEN.exists() else {"because": [], "stages": {}}
    now = {stage: computed(stage) for stage in STAGES}
    changed = sorted(stage for stage in now if now[stage] != before["stages"].get(stage))
    reasons = [*before["because"], f"{', '.join(changed)}: {because}"] if changed else before["because"]
    GOLDEN.write_text(json.dumps({"because": reasons, "stages": now}, indent=1, ensure_ascii=False) + "\n")
    print(f"{GOLDEN.relative_to(ROOT)}: {', '.join(changed) or 'nothing has changed'}")


if __name__ == "__main__":
    main()
