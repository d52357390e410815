"""Writes constraints.txt and images/requirements/<extra>.txt from what is installed beside the Python that runs it.

`make lock` after a change of pyproject.toml's extras or of a version. The lists are computed from the installed
packages' own metadata, so no index is asked and a test can say whether the files still agree with it.

torch is pinned in constraints.txt and left out of the images' lists: which build is wanted (a GPU's, the processor's)
is chosen per machine (`TORCH_INDEX_ARGS`) and per image (`TORCH_SPEC`). Its GPU libraries are pinned by torch itself.

Run it with Python 3.11, the images' Python: the lists hold what that one needs.
"""

import tomllib
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
CORE = "core"
"""The name here of what the package needs without any extra."""
IMAGE_EXTRAS = ("control", "data", "train", "generate", "serve", "gguf")
"""The extras that an image is made of."""
SECTIONS = (CORE, *IMAGE_EXTRAS, "pipelines", "local", "dev")
_GPU_LIBRARIES = ("nvidia-", "cuda-", "triton")


def closure(extra: str) -> dict[str, str]:
    """Canonical package name → exact version, of everything that `zhllama[extra]` needs here, zhllama left out.

    Raises importlib.metadata.PackageNotFoundError when one of them is not installed.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()

    def own(chosen: str) -> None:
        for text in project["dependencies"] if chosen == CORE else project["optional-dependencies"][chosen]:
            follow(Requirement(text), "")

    def follow(requirement: Requirement, active: str) -> None:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": active}):
            return
        name = canonicalize_name(requirement.name)
        if name == project["name"]:
            for inner in requirement.extras:
                own(inner)
            return
        if name.startswith(_GPU_LIBRARIES):
            return
        for inner in ("", *requirement.extras):
            if (name, inner) in seen:
                continue
            seen.add((name, inner))
            package = distribution(name)
            found[name] = Version(package.version).public  # without +cpu and the like
            for text in package.requires or ():
                follow(Requirement(text), inner)

    own(CORE)
    if extra != CORE:
        own(extra)
    return found


def lines(pins: Iterable[tuple[str, str]]) -> str:
    return "".join(f"{name}=={version}\n" for name, version in sorted(pins))


def constraints() -> str:
    """The text of constraints.txt: every package once, under the first section that needs it."""
    text = (
        "# Every version that this project is tested with; written by `make lock`, not by hand.\n"
        "# pip install -c constraints.txt -e '.[dev]'\n"
    )
    listed: set[str] = set()
    for section in SECTIONS:
        new = {name: version for name, version in closure(section).items() if name not in listed}
        listed.update(new)
        text += f"\n# --- {section}\n{lines(new.items())}"
    return text


def requirements(extra: str) -> str:
    """The text of images/requirements/<extra>.txt: complete, to be installed with --no-deps after torch."""
    pins = closure(extra)
    pins.pop("torch", None)
    return f"# What zhllama[{extra}] needs, torch left out (see images/base); written by `make lock`.\n" + lines(
        pins.items()
    )


def main() -> None:
    (ROOT / "constraints.txt").write_text(constraints())
    for extra in IMAGE_EXTRAS:
        (ROOT / "images" / "requirements" / f"{extra}.txt").write_text(requirements(extra))


if __name__ == "__main__":
    main()
