"""The shape of the tree, held by its own syntax: who may import whom, what a stage folder is, what stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "deepspeed", "datasets", "peft", "accelerate"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def stages() -> list[str]:
    return sorted({path.relative_to(ROOT / "components").parts[0] for path in sources("components")} - {"__init__.py"})


STAGES = stages()
ids = lambda path: str(path.relative_to(ROOT)) if isinstance(path, Path) else str(path)  # noqa: E731
every_source = pytest.mark.parametrize("path", sources("components", "pipelines", "images"), ids=ids)
every_stage = pytest.mark.parametrize("stage", STAGES)


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; name the package"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def statements(path: Path) -> list[ast.stmt]:
    """A module's statements, the docstring left out."""
    body = ast.parse(path.read_text()).body
    return body[1:] if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) else body


# --- who may import whom ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sources("components"), ids=ids)
def test_a_stage_imports_shared_and_itself_and_no_other_stage(path):
    own = path.relative_to(ROOT / "components").parts[0]
    for name in imported(path):
        package, _, rest = name.partition(".")
        assert package != "pipelines", f"{path}: imports {name}; components know no pipeline"
        if package == "components" and rest:
            assert rest.split(".")[0] in ("shared", own), f"{path}: imports {name} of another stage"


OF_OPTIONS = ("settings.py", "machines.py")
"""What a run can be told comes from the stages' options; what a job is made of, from the code that makes it."""


@pytest.mark.parametrize("path", sources("pipelines"), ids=ids)
def test_pipelines_import_components_signatures_and_shared_alone(path):
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "components" and len(parts) > 1 and path.name not in OF_OPTIONS:
            allowed = parts[1] == "shared" or (len(parts) > 2 and parts[2] == "component")
            assert allowed, f"{path}: imports {name}; pipelines may import component.py files and shared"


# --- what a stage folder is -------------------------------------------------------------------------------------------


def test_every_stage_of_the_design_is_here():
    assert STAGES == [
        "convert_weights", "evaluate", "export_model", "extend_tokenizer", "fetch_weights", "finetune", "generate",
        "generate_instructions", "launch_training", "merge_adapters", "prepare_dataset", "pretrain", "serve",
        "train_tokenizer",
    ]  # fmt: skip


@every_stage
def test_a_stage_says_what_goes_in_and_what_comes_out_and_nothing_else(stage):
    module = ast.parse((ROOT / "components" / stage / "__init__.py").read_text())
    said = ast.get_docstring(module) or ""
    assert "In:" in said
    assert "Out:" in said
    assert len(module.body) == 1


@every_stage
def test_a_stages_command_is_imports_and_one_call(stage):
    body = statements(ROOT / "components" / stage / "__main__.py")
    *imports, last = body
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in imports)
    if isinstance(last, ast.If):
        assert ast.unparse(last.test) == "__name__ == '__main__'"
        assert not last.orelse
        (last,) = last.body
    assert isinstance(last, ast.Expr)
    assert isinstance(last.value, ast.Call)
    # guarded: a command that is more than its stage (a conversation, a server until it is stopped)
    assert ast.unparse(last.value.func) in ("main", "guarded")


@every_stage
def test_a_stages_component_is_a_signature_and_one_container(stage):
    body = statements(ROOT / "components" / stage / "component.py")
    assert all(isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef) for node in body)
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    assert stage in {function.name for function in functions}
    for function in functions:
        assert [ast.unparse(decorator) for decorator in function.decorator_list] == ["dsl.container_component"]
        returned = function.body[-1]
        assert len(function.body) - (ast.get_docstring(function) is not None) == 1
        assert isinstance(returned, ast.Return)
        assert isinstance(returned.value, ast.Call)
        assert ast.unparse(returned.value.func) == "dsl.ContainerSpec"
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in returned.value.keywords}
        assert given["image"] == f"image('{stage}')"
        # a stage's second command is a module of it
        assert given["command"].startswith(f"['python', '-m', 'components.{stage}")


@every_stage
def test_a_stage_has_an_image(stage):
    assert (ROOT / "images" / stage / "Dockerfile").is_file()


# --- light at import --------------------------------------------------------------------------------------------------


def imports_of(command: list[str], cwd: Path) -> set[str]:
    """The top-level packages that a command really imports, as the interpreter itself reports them."""
    command = [sys.executable, "-X", "importtime", *command]
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(cwd)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


@every_stage
def test_a_stages_help_loads_nothing_heavy_and_no_kfp(stage, tmp_path):
    found = imports_of(["-m", f"components.{stage}", "--help"], tmp_path)
    assert "tyro" in found
    assert not found & (HEAVY | {"kfp"})


def test_zhllamas_help_loads_nothing_heavy(tmp_path):
    assert not imports_of(["-m", "pipelines", "--help"], tmp_path) & HEAVY


def test_compiling_loads_nothing_heavy(tmp_path):
    found = imports_of(["-m", "pipelines", "compile", "--size", "7b", "-o", str(tmp_path / "pipeline.yaml")], tmp_path)
    assert "kfp" in found
    assert not found & HEAVY


# --- errors are never swallowed ---------------------------------------------------------------------------------------


@every_source
def test_no_except_catches_everything_and_goes_on(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            where = f"{path}:{node.lineno}"
            assert node.type is not None, f"{where}: a bare except"
            if "BaseException" in ast.unparse(node.type):
                raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                assert raises, f"{where}: catches BaseException and does not raise it again"
            assert not all(isinstance(inner, ast.Pass) for inner in node.body), (
                f"{where}: an error passed over in silence"
            )


@every_source
def test_a_module_says_what_it_is(path):
    module = ast.parse(path.read_text())
    if path.name != "__main__.py" and module.body:
        assert ast.get_docstring(module), f"{path}: no docstring"
