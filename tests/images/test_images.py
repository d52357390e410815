"""The images: one per stage, named after it, holding what the stage imports and nothing that it does not need."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import hcl2
import pytest
import yaml
from packaging.utils import canonicalize_name

from zhllama.kubernetes.model_server import VLLM_IMAGE
from zhllama.stage.images import VERSION, image

ROOT = Path(__file__).resolve().parents[2]
STAGES = sorted(path.parent.name for path in (ROOT / "components").glob("*/__main__.py"))
OURS = ("zhllama", "components", "pipelines")
DOCKERFILES = sorted((ROOT / "images").glob("*/Dockerfile"))
# What the stage's image does not hold: a user installs it, and the option that needs it says how where it is missing.
OPTIONAL = {"evaluate": {"lm_eval"}, "serve": {"gguf", "llama_cpp"}}


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


@cache
def missing_modules(extra: str) -> set[str]:
    """The top-level modules that are installed here and not in an image of this extra."""
    held = packages_of(extra)
    installed = packages_distributions()
    return {
        module
        for module, distributions in installed.items()
        if module not in ("zhllama", "components", "pipelines")
        and not held & {canonicalize_name(name) for name in distributions}
    }


# --- Dockerfiles ------------------------------------------------------------------------------------------------------


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, lines joined, comments left out."""
    text = "\n".join(
        line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")
    )
    joined = re.sub(r"\\\n\s*", " ", text)
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def of_stages() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(stage, the instructions of its Dockerfile)"""
    return ((stage, instructions(ROOT / "images" / stage / "Dockerfile")) for stage in STAGES)


def test_an_image_runs_its_own_stage_as_its_first_process():
    for stage, found in of_stages():
        assert json.loads(dict(found)["ENTRYPOINT"]) == ["python", "-m", f"components.{stage}"]
        assert "CMD" not in dict(found), stage


def test_an_image_is_its_base_the_library_and_the_stages():
    for stage, found in of_stages():
        assert [(name, words) for name, words in found if name in ("COPY", "ADD", "RUN")] == [
            ("COPY", "zhllama /app/zhllama"),
            ("COPY", "components /app/components"),
        ], stage


def test_an_image_is_labelled():
    for stage, found in of_stages():
        label = dict(found)["LABEL"]
        assert f'org.opencontainers.image.title="zhllama-{stage.replace("_", "-")}"' in label
        for name in ("description", "version", "revision", "source", "licenses"):
            assert f"org.opencontainers.image.{name}=" in label, stage


def test_by_hand_an_image_stands_on_the_base_that_bake_gives_it(extras):
    for stage, found in of_stages():
        assert ("ARG", f"BASE=zhllama-base-{extras[stage]}") in found, stage


def test_a_base_is_not_root_and_writes_below_tmp_alone():
    *_, final = (ROOT / "images" / "base" / "Dockerfile").read_text().split("\nFROM ")
    assert re.search(r"^USER [1-9]\d*:0$", final, re.MULTILINE)
    for name in ("HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert re.search(rf"{name}=/tmp", final)
    assert "RUN" not in final


def test_a_base_sees_a_gpu_only_where_it_was_asked_for():
    """CUDA's images say NVIDIA_VISIBLE_DEVICES=all, which shows a step without a GPU every GPU of its node."""
    assert "NVIDIA_VISIBLE_DEVICES=void" in dict(instructions(ROOT / "images" / "base" / "Dockerfile"))["ENV"]


def test_no_compiler_and_no_pip_of_ours_reach_an_image():
    building, final = (ROOT / "images" / "base" / "Dockerfile").read_text().rsplit("\nFROM ", 1)
    assert "--without-pip" in building
    assert re.findall(r"^(?:COPY|ADD) .*", final, re.MULTILINE) == [
        "COPY --from=dependencies /opt/zhllama /opt/zhllama"
    ]


def test_what_is_installed_is_held_against_hashes(lock):
    """torch apart: where the base has none, it comes from an index of the user's choice, each with its own files."""
    installs = re.findall(
        r"\$pip install ([^&|;]*)", dict(instructions(ROOT / "images" / "base" / "Dockerfile"))["RUN"]
    )
    torch, listed, tried = (shlex.split(options) for options in installs)
    assert torch == ["$TORCH_INDEX_ARGS", "$TORCH_SPEC"]
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:", f"--no-binary={','.join(lock.SOURCES)}"} <= set(
        listed
    )
    assert {"--dry-run", "--no-index"} <= set(tried)


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


def members(bake, group: str) -> list[str]:
    """The targets of a group, through the groups that it names."""
    return [
        target
        for name in bake["group"][group]["targets"]
        for target in (members(bake, name) if name in bake["group"] else [name])
    ]


def test_a_release_builds_every_stage_once_and_each_base_in_one_group(bake, extras):
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "images.yaml").read_text())
    groups = [built["group"] for built in release["jobs"]["publish"]["strategy"]["matrix"]["include"]]
    by_extra: dict[str, set[str]] = {}
    for stage, extra in extras.items():
        by_extra.setdefault(extra, set()).add(stage.replace("_", "-"))
    assert sorted(sorted(members(bake, group)) for group in groups) == sorted(map(sorted, by_extra.values()))
    assert members(bake, "default") == ["stage"]


def test_the_light_images_are_those_without_torch(bake, extras):
    light = {stage.replace("_", "-") for stage, extra in extras.items() if extra not in ("train", "serve", "gguf")}
    assert set(members(bake, "without-torch")) == light


def test_what_images_stand_on_is_pinned(bake):
    """By digest; vLLM's, whose digest was not to be had here, by its version."""
    stands_on = {name: bake["variable"][name]["default"] for name in ("PYTHON_IMAGE", "TORCH_IMAGE", "SERVE_IMAGE")}
    for name in ("PYTHON_IMAGE", "TORCH_IMAGE"):
        assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", stands_on[name])
    assert f"BASE_IMAGE={stands_on['PYTHON_IMAGE']}" in (ROOT / "images" / "base" / "Dockerfile").read_text()
    assert stands_on["SERVE_IMAGE"] == VLLM_IMAGE, "a served model's pod pulls one image, not two"


def test_sbom_and_provenance_are_made_where_they_are_asked_for(bake):
    assert bake["variable"]["ATTEST"]["default"] is False
    assert bake["target"]["stage"]["attest"] == '${ATTEST ? ["type=sbom", "type=provenance,mode=max"] : []}'


def test_the_version_is_one(bake):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert bake["variable"]["TAG"]["default"] == project["version"] == VERSION


def test_torch_is_the_pinned_one_in_the_cuda_base_and_on_plain_python(bake):
    spec = bake["variable"]["TORCH_SPEC"]["default"]
    assert spec in (ROOT / "constraints.txt").read_text().splitlines()
    assert bake["variable"]["TORCH_IMAGE"]["default"].startswith(f"pytorch/pytorch:{spec.removeprefix('torch==')}-cuda")


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


def test_an_image_holds_every_package_that_its_stage_imports(extras):
    needed = [
        f"{place}: imports {module}, which the {extras[stage]} image does not hold"
        for stage in STAGES
        for place, module in third_party(ROOT / "components" / stage)
        if module in missing_modules(extras[stage]) - OPTIONAL.get(stage, set())
    ]
    assert needed == []


@pytest.mark.parametrize("extra", ["control", "data", "generate"])
def test_stages_without_torch_load_with_what_their_image_holds(extra, extras):
    """Every module of the stages, and what of the library they load, in a process where the rest cannot be imported."""
    stages = [stage for stage, held in extras.items() if held == extra]
    assert stages
    program = (
        "import importlib, json, pkgutil, sys\n"
        "missing = set(json.loads(sys.argv[2]))\n"
        "class Gate:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in missing:\n"
        "            raise ModuleNotFoundError(f'{name} is not in this image')\n"
        "sys.meta_path.insert(0, Gate())\n"
        "for stage in json.loads(sys.argv[1]):\n"
        "    package = importlib.import_module(f'components.{stage}')\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if module.name.rsplit('.', 1)[1] not in ('__main__', 'component'):\n"
        "            importlib.import_module(module.name)\n"
    )
    missing = json.dumps(sorted(missing_modules(extra) - {"__editable___zhllama_0_1_0_finder"}))
    command = [sys.executable, "-c", program, json.dumps(stages), missing]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
