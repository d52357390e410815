"""Writes constraints.txt and images/requirements/<extra>.txt from what is installed beside the Python that runs it.

`make lock`, with the tests' Python 3.11, after a change of pyproject.toml's extras or of a version. Packages and
versions are the installed ones, so a test can say offline whether the files still agree. Their SHA-256 come from the
index, through uv, which lists every file of a version (`pip install --report` names only the one that fits the
machine). Listed are the wheels that fit one of BASES, and the source of what has none: one list serves amd64 and arm64
and each Python of the images' bases, and a version that one of them cannot install is refused here.

torch is pinned in constraints.txt and left out of the images' lists: the GPU bases bring it, and which build is wanted
elsewhere (a GPU's, the processor's; each index has files of its own, so other hashes) is chosen per machine
(`TORCH_INDEX_ARGS`) and per image (`TORCH_SPEC`). Its GPU libraries are pinned by torch itself.
"""

import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import distribution
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "images" / "requirements"
CORE = "core"
"""The name here of what the package needs without any extra."""
IMAGE_EXTRAS = ("control", "data", "train", "generate", "serve", "gguf")
"""The extras that an image is made of."""
SECTIONS = (CORE, *IMAGE_EXTRAS, "pipelines", "local", "dev")
SOURCES = ("deepspeed", "llama-cpp-python")
"""What comes as source only, and is built in the image."""
BASES = tuple(((3, minor), machine) for minor in (11, 12) for machine in ("x86_64", "aarch64"))
"""The Pythons and processors of the images' bases: Python's own image has 3.11, the CUDA ones Ubuntu's 3.12."""
_GLIBC = 35
"""glibc 2.35 at least: Ubuntu 22.04, Debian 12."""
_GPU_LIBRARIES = ("nvidia-", "cuda-", "triton")


def closure(extra: str) -> dict[str, str]:
    """Canonical package name → exact version, of everything that `zhllama[extra]` needs here, zhllama left out. Raises
    importlib.metadata.PackageNotFoundError when one of them is not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = {CORE: project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    # a requirement, and the extra of the package that asks for it
    left = [(Requirement(text), "") for text in (*own[CORE], *(own[extra] if extra != CORE else ()))]
    while left:
        requirement, active = left.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": active}):
            continue
        if name == project["name"]:
            left += [(Requirement(text), "") for inner in requirement.extras for text in own[inner]]
        elif not name.startswith(_GPU_LIBRARIES):
            found[name], required = _installed(name)
            for inner in {"", *requirement.extras}:
                if (name, inner) not in seen:
                    seen.add((name, inner))
                    left += [(each, inner) for each in required]
    return found


@cache
def _installed(name: str) -> tuple[str, tuple[Requirement, ...]]:
    """The version of an installed package, without +cpu and the like, and what it requires."""
    package = distribution(name)
    return Version(package.version).public, tuple(Requirement(text) for text in package.requires or ())


def image_pins(extra: str) -> dict[str, str]:
    """What an image of this extra installs beside torch: package → version."""
    return {name: version for name, version in closure(extra).items() if name != "torch"}


def constraints() -> str:
    """The text of constraints.txt: every package once, under the first section that needs it."""
    text = (
        "# Every version that this project is tested with; written by `make lock`, not by hand.\n"
        "# pip install -c constraints.txt -e '.[dev]'\n"
    )
    listed: set[str] = set()
    for section in SECTIONS:
        pins = {name: version for name, version in sorted(closure(section).items()) if name not in listed}
        listed |= set(pins)
        text += f"\n# --- {section}\n" + "".join(f"{name}=={version}\n" for name, version in pins.items())
    return text


def tags_of(python: tuple[int, int], machine: str) -> frozenset[Tag]:
    """The tags of the wheels that a base with this Python, on this processor, takes."""
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(_GLIBC, 4, -1)]
    platforms += [f"{name}_{machine}" for name in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]
    interpreter = f"cp{python[0]}{python[1]}"
    return frozenset([*cpython_tags(python, platforms=platforms), *compatible_tags(python, interpreter, platforms)])


def hashes(pins: Mapping[str, str]) -> dict[str, list[str]]:
    """package → the SHA-256 of each file of its version that an image may install, from the index uv is set up for.

    Raises CalledProcessError when the index cannot be asked or lacks a version, SystemExit when one of BASES finds no
    wheel of a package that is not in SOURCES.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-deps", "--universal"]
    command += ["--python-version", "3.11", "--format", "pylock.toml", "-"]
    asked = "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))
    done = subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True, check=True)
    bases = {base: tags_of(*base) for base in BASES}
    found = {}
    for package in tomllib.loads(done.stdout)["packages"]:
        if package["name"] in SOURCES:
            found[package["name"]] = [package["sdist"]["hashes"]["sha256"]]
            continue
        chosen = set()
        for (python, machine), takes in bases.items():
            fitting = {
                wheel["hashes"]["sha256"]
                for wheel in package.get("wheels", ())
                if parse_wheel_filename(PurePosixPath(wheel["url"]).name)[3] & takes
            }
            if not fitting:
                place = f"Python {python[0]}.{python[1]} on {machine}"
                raise SystemExit(f"{package['name']}=={package['version']} has no wheel for {place}")
            chosen |= fitting
        found[package["name"]] = sorted(chosen)
    return found


def requirements(extra: str, pins: Mapping[str, str], known: Mapping[str, list[str]]) -> str:
    """The text of images/requirements/<extra>.txt: complete, to be installed with --no-deps."""
    text = f"# What zhllama[{extra}] needs, torch left out (see images/base); written by `make lock`.\n"
    for name, version in sorted(pins.items()):
        text += " \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{sha}" for sha in known[name])]) + "\n"
    return text


def main() -> None:
    pins = {extra: image_pins(extra) for extra in IMAGE_EXTRAS}
    known = hashes({name: version for held in pins.values() for name, version in held.items()})
    texts = {REQUIREMENTS / f"{extra}.txt": requirements(extra, pins[extra], known) for extra in IMAGE_EXTRAS}
    for path, text in {ROOT / "constraints.txt": constraints(), **texts}.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
