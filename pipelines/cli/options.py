"""What commands take: options as rows, those that several share, and what these mean."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from zhllama import terminal
from zhllama.errors import InputError
from zhllama.kubernetes.names import check_value
from zhllama.kubernetes.pods import uid
from zhllama.stage import images

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.configuration import Configuration
    from pipelines.local.placeholders import Value

_OF_THEIR_OWN = ("run_as_user", "pull_policy", "registry", "tag", "digests")
"""Settings that have an option of their own, beside labels and annotations."""
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Row = tuple[Any, ...]
"""An option: "--name|--alias METAVAR" (or a word without dashes), its note, and its default, "" where none is said:
False for a switch, a list for what may be given several times, a tuple for its choices, the default first, a type for
none of that type, … for what has to be given."""

WORK_FOLDER = Path(".zhllama")
WORK: Row = ("--work DIR", f"logs, records and data (default: {WORK_FOLDER})", WORK_FOLDER)
JSON: Row = ("--json", "print JSON, for programs", False)
IMAGES: tuple[Row, ...] = (
    ("--registry", "where the images are: registry.example.com/team"),
    ("--tag", "of the images (default: this version)"),
    ("--digests FILE", "pin the images: what docker buildx bake --metadata-file wrote, or lines NAME sha256:…", Path),
)


def command(
    commands: Commands, name: str, does: Callable[..., None], note: str, **more: Any
) -> argparse.ArgumentParser:
    add = commands.add_parser(name, help=note, **more)
    add.set_defaults(command=does)
    return add


def take(add: Any, *rows: Row) -> None:
    for name, note, *rest in rows:
        words, _, metavar = name.partition(" ")
        default = rest[0] if rest else ""
        more: dict[str, Any] = {"metavar": metavar} if metavar else {}
        if default is False:
            more["action"] = "store_true"
        elif default is ...:
            more["required"] = True
        elif isinstance(default, type):
            more["type"] = default
        elif isinstance(default, list):
            more |= {"action": "append", "default": default}
        elif isinstance(default, tuple):
            more |= {"choices": default, "default": default[0]}
        else:
            more |= {"default": default, "type": type(default)}
            if rest and not words.startswith("-"):
                more["nargs"] = "?"
        add.add_argument(*words.split("|"), help=note, **more)


def size(default: str | None = None) -> Row:
    from pipelines import sizes

    choices = ", ".join(sizes.names())
    return "--size", f"{choices} (default: {default})" if default else choices, default or ...


def take_settings(add: argparse.ArgumentParser) -> None:
    note = "what a run is told: its start, addresses, steps, machines … (zhllama parameters lists all)"
    add.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help=note)
    note = "a YAML file of such settings, over the size's; --set stands over it; may be given several times"
    add.add_argument("--config", action="append", default=[], type=Path, metavar="FILE", help=note)


def take_compilation(add: argparse.ArgumentParser) -> None:
    """What a compiled pipeline is made of: its size, images, settings, and of these what has an option of its own."""
    take(add, size(), *IMAGES)
    group = add.add_argument_group("the steps' pods", "all else: --set, --config, zhllama parameters")
    take(
        group,
        ("--run-as-user UID", "of the pods (default: 65532); none leaves it to the cluster, as OpenShift wants it"),
        ("--label NAME=VALUE", "one more label of the steps' pods", []),
        ("--annotation NAME=VALUE", "one more annotation of the steps' pods", []),
    )
    policies = ("Always", "IfNotPresent", "Never")
    group.add_argument("--pull-policy", default="", choices=policies, help="default: the cluster's")
    take_settings(add)


def configured(
    given: argparse.Namespace, write: bool = True, defaults: "Mapping[str, Value] | None" = None
) -> "Configuration":
    """The run's configuration, of what the command was given; and its images are used."""
    from pipelines.configuration import configure

    texts = settings(given.settings)
    # an option of its own → what it says for the setting of that name
    said = {name: str(value) for name in _OF_THEIR_OWN if (value := getattr(given, name, None))}
    for name in ("label", "annotation"):
        if pairs := settings(getattr(given, name, []), f"--{name}"):
            check_value(f"{name}s", pairs, f"--{name}")
            said[f"step_{name}s"] = json.dumps(pairs)
    if "run_as_user" in said:
        uid(said["run_as_user"])
    for name in said:
        if name in texts:
            option = {"step_labels": "label", "step_annotations": "annotation"}.get(name, name.replace("_", "-"))
            raise InputError(f"--set {name}: it is given by --{option} too; keep one")
    told = configure(given.size, texts | said, given.config, defaults=defaults, write=write)
    try:
        use_images(told["registry"], told["tag"], Path(told["digests"]) if told["digests"] else None)
    except InputError as error:
        if "digests" not in texts:
            raise
        raise InputError(str(error).replace("--digests", "--set digests")) from error
    return told


def console() -> "Console":
    """Standard output. Where it is no terminal, lines are as long as they are: what reads them may be a program."""
    here = sys.stdout.isatty()
    return terminal.console(width=None if here else 10_000, highlight=False, soft_wrap=not here)


def settings(pairs: Sequence[str], option: str = "--set") -> dict[str, str]:
    """`--set` options as a mapping. InputError for one without `=` or given twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"{option} {pair}: write NAME=VALUE")
        if name in found:
            raise InputError(f"{option} {name}: given twice; keep one")
        found[name] = value
    return found


def use_images(registry: str, tag: str, digests: Path | None) -> None:
    """Before the components are imported: their signatures name images. InputError for what no registry or tag is
    called, and for a wrong list of digests."""
    images.check_place(registry, tag)
    pinned = images.read_digests(digests) if digests else ""
    for name, value in ((images.REGISTRY, registry), (images.TAG, tag), (images.DIGESTS, pinned)):
        if value:
            os.environ[name] = value
