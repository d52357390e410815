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
_DIGEST = re.compile("sha256:[0-9a-f]{64}")
_LINE = re.compile(rf"(?:\S*/)?zhllama-([a-z-]+)(?::[^/:\s]+)? \s*({_DIGEST.pattern})")
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = rf"(?:localhost|{_PART}(?:\.{_PART})+|{_PART}(?:\.{_PART})*:[0-9]+|\[[0-9a-fA-F:]+\](?::[0-9]+)?)"
"""A first part without a dot and a port is no host: `Team/model` is looked for on Docker Hub, where nothing is so."""
_FOLDER = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REGISTRY = re.compile(rf"(?:{_HOST}(?:/{_FOLDER})*|{_FOLDER}(?:/{_FOLDER})*)/?")
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_REFERENCE = re.compile(
    rf"(?:{_HOST}/)?{_FOLDER}(?:/{_FOLDER})*(?::{_TAG.pattern})?(?:@[A-Za-z][A-Za-z0-9+._-]*:[0-9a-fA-F]{{32,}})?",
    re.ASCII,
)


def image(stage: str) -> str:
    """`<registry>/zhllama-<stage>:<tag>[@<digest>]`, by ZHLLAMA_REGISTRY, ZHLLAMA_TAG (default: no registry, the
    version) and ZHLLAMA_DIGESTS. InputError for an image without a digest where others have one, and for a variable
    that holds no such thing."""
    target = stage.replace("_", "-")
    check_place(os.environ.get(REGISTRY, ""), os.environ.get(TAG, ""), (REGISTRY, TAG))
    place = os.environ.get(REGISTRY, "").rstrip("/")
    name = f"zhllama-{target}:{os.environ.get(TAG) or VERSION}"
    name = f"{place}/{name}" if place else name
    pinned = os.environ.get(DIGESTS, "")
    if not pinned:
        return name
    pairs = [pair.partition("=") for pair in pinned.split(",")]
    if not all(_DIGEST.fullmatch(digest) for _, _, digest in pairs):
        raise InputError(f"{DIGESTS}={pinned:.80}: no list NAME=sha256:…,NAME=sha256:…; a file's is given by --digests")
    digests = {name: digest for name, _, digest in pairs}
    if target not in digests:
        raise InputError(f"--digests: there is no digest of zhllama-{target}; list every image, or leave it out")
    return f"{name}@{digests[target]}"


def settings() -> dict[str, str]:
    """The variables that are set of those that name images."""
    return {name: os.environ[name] for name in (REGISTRY, TAG, DIGESTS) if os.environ.get(name)}


def image_reference(text: str) -> str:
    """What is wrong with an image's name, in a few words: a cluster takes any, and its kubelets refuse it."""
    if _REFERENCE.fullmatch(text) and len(text.partition("@")[0]) <= 255:
        return ""
    return "is no image; write [host[:port]/]path[:tag][@digest], the path in lower case"


def registry(text: str) -> str:
    """What is wrong with a place of images, in a few words."""
    good = _REGISTRY.fullmatch(text)
    return "" if good else "is no registry; write a host and a path in lower case, as registry.example.com/team"


def tag(text: str) -> str:
    """What is wrong with a tag, in a few words."""
    return "" if _TAG.fullmatch(text) else "is no tag: letters, digits, _ . and - are allowed, at most 128"


def check_place(place: str, version: str, called: tuple[str, str] = ("--registry", "--tag")) -> None:
    """InputError for what no image could be pulled from; "" is no wish."""
    for option, text, check in zip(called, (place, version), (registry, tag), strict=True):
        if text and (wrong := check(text)):
            raise InputError(f"{option}: {text!r} {wrong}")


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
