"""The image of a stage, as compiled pipelines and rendered manifests name it: by tag, or by tag and digest.

A pipeline names its images when it is compiled. The steps that name images when they run (of a training, of a served
model) get the same settings in their environment, so that all come from one place.
"""

import os
import re
from pathlib import Path

from zhllama.artifacts.json_file import object_of
from zhllama.errors import InputError

VERSION = "0.1.0"
REGISTRY = "ZHLLAMA_REGISTRY"
TAG = "ZHLLAMA_TAG"
DIGESTS = "ZHLLAMA_DIGESTS"
"""`convert-weights=sha256:…,evaluate=sha256:…`"""
_LINE = re.compile(r"(?:\S*/)?zhllama-([a-z-]+)(?::[^/:\s]+)? \s*(sha256:[0-9a-f]{64})")
_HOST = r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
_PART = r"[a-z0-9]+((\.|__?|-+)[a-z0-9]+)*"
# a first part without a dot or a port is no host, but a part of a path
_REGISTRY = re.compile(rf"({_HOST}((\.{_HOST})+(:\d+)?|:\d+)|{_PART})(/{_PART})*/?")
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)


def image(stage: str) -> str:
    """`<registry>/zhllama-<stage>:<tag>[@<digest>]`, by ZHLLAMA_REGISTRY, ZHLLAMA_TAG (default: no registry, the
    version) and ZHLLAMA_DIGESTS. InputError for an image without a digest where others have one."""
    target = stage.replace("_", "-")
    registry = os.environ.get(REGISTRY, "").rstrip("/")
    name = f"zhllama-{target}:{os.environ.get(TAG) or VERSION}"
    name = f"{registry}/{name}" if registry else name
    pinned = os.environ.get(DIGESTS, "")
    if not pinned:
        return name
    digests = dict(pair.split("=", 1) for pair in pinned.split(","))
    if target not in digests:
        raise InputError(f"--digests: there is no digest of zhllama-{target}; list every image, or leave it out")
    return f"{name}@{digests[target]}"


def settings() -> dict[str, str]:
    """The variables that are set of those that name images."""
    return {name: os.environ[name] for name in (REGISTRY, TAG, DIGESTS) if os.environ.get(name)}


def check_place(registry: str, tag: str) -> None:
    """InputError for what no image could be pulled from; "" is no wish."""
    if registry and not _REGISTRY.fullmatch(registry):
        raise InputError(f"--registry {registry}: write a host and a path in lower case, as registry.example.com/team")
    if tag and not _TAG.fullmatch(tag):
        raise InputError(f"--tag {tag}: letters, digits, _ . and - are allowed in a tag, at most 128")


def read_digests(path: Path) -> str:
    """ZHLLAMA_DIGESTS from a file: what `docker buildx bake --metadata-file` writes, or lines `NAME sha256:…`, as
    the workflow that publishes images prints them. InputError for another file, and for digests of other images."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--digests {path}: it cannot be read ({error}); give a list of images") from error
    try:
        if text.lstrip().startswith("{"):
            # beside the images it has provenance, warnings and the bases, which have no name
            built = [one for one in object_of(text).values() if isinstance(one, dict) and "image.name" in one]
            lines = [f"{one['image.name'].split(',')[0]} {one['containerimage.digest']}" for one in built]
        else:
            lines = [line for line in text.splitlines() if line.strip()]
        pairs = sorted(map(_of_line, lines))
    except (ValueError, KeyError, TypeError) as error:
        mend = "give what bake --metadata-file wrote, or lines NAME sha256:…"
        raise InputError(f"--digests {path}: {error}; {mend}") from error
    return ",".join(f"{name}={digest}" for name, digest in pairs)


def _of_line(line: str) -> tuple[str, str]:
    found = _LINE.fullmatch(line.strip())
    if found is None:
        raise ValueError(f"{line!r} is not an image of ours and its digest")
    return found[1], found[2]
