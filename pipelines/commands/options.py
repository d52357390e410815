"""Options that several commands share, and what they mean."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components.shared import images
from components.shared.errors import InputError
from components.shared.kubernetes_names import check_keys, check_labels

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.steps import Fixed

WORK = Path(".zhllama")


def size_option(add: argparse.ArgumentParser, default: str | None) -> None:
    from pipelines import sizes

    choices = ", ".join(sizes.names())
    note = f"{choices} (default: {default})" if default else choices
    add.add_argument("--size", default=default, required=default is None, help=note)


def image_options(add: argparse.ArgumentParser) -> None:
    add.add_argument("--registry", default="", help="where the images are: registry.example.com/team")
    add.add_argument("--tag", default="", help="of the images (default: this version)")
    add.add_argument(
        "--digests", type=Path, metavar="FILE",
        help="pin the images: what docker buildx bake --metadata-file wrote, or lines NAME sha256:…",
    )  # fmt: skip


def fixed_options(add: argparse.ArgumentParser) -> None:
    """What KFP takes no parameter for."""
    group = add.add_argument_group(
        "fixed in the compiled pipeline", "KFP takes no parameters of a run for these; all else: zhllama parameters"
    )
    group.add_argument(
        "--run-as-user", default="65532", metavar="UID",
        help="of the steps' pods (default: 65532); none leaves it to the cluster, as OpenShift wants it",
    )  # fmt: skip
    for name in ("label", "annotation"):
        group.add_argument(
            f"--{name}", action="append", default=[], metavar="NAME=VALUE", help=f"one more {name} of the steps' pods"
        )
    group.add_argument(
        "--pull-policy", default="", choices=("Always", "IfNotPresent", "Never"), help="default: the cluster's"
    )


def fixed(given: argparse.Namespace) -> "Fixed":
    """What `fixed_options` were given. InputError for a uid or a label that Kubernetes would refuse."""
    from pipelines.steps import Fixed

    user = given.run_as_user
    if user != "none" and not (user.isascii() and user.isdigit() and int(user) > 0):
        raise InputError(f"--run-as-user {user}: write a number above 0 (root is refused), or none")
    labels = _pairs("--label", given.label)
    check_labels("--label", labels)
    annotations = _pairs("--annotation", given.annotation)
    check_keys("--annotation", annotations)
    return Fixed(
        run_as_user=None if user == "none" else int(user),
        labels=labels,
        annotations=annotations,
        pull_policy=given.pull_policy,
    )


def set_option(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the pipeline"
    )


def work_option(add: argparse.ArgumentParser) -> None:
    add.add_argument("--work", type=Path, default=WORK, metavar="DIR", help=f"logs, records and data (default: {WORK})")


def json_option(add: argparse.ArgumentParser) -> None:
    add.add_argument("--json", action="store_true", help="print JSON, for programs")


def console() -> "Console":
    """Standard output. Where it is no terminal, lines are as long as they are: what reads them may be a program."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 10_000, highlight=False, soft_wrap=not sys.stdout.isatty())


def settings(pairs: Sequence[str]) -> dict[str, str]:
    """`--set` options as a mapping. InputError for one without `=` or given twice."""
    return _pairs("--set", pairs)


def _pairs(option: str, pairs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"{option} {pair}: write NAME=VALUE")
        if name in found:
            raise InputError(f"{option} {name}: given twice; keep one")
        found[name] = value
    return found


def use_images(given: argparse.Namespace) -> None:
    """Before the components are imported: their signatures name images. InputError for what no registry or tag is
    called, and for a wrong list of digests."""
    images.check_place(given.registry, given.tag)
    pinned = images.read_digests(given.digests) if given.digests else ""
    for name, value in ((images.REGISTRY, given.registry), (images.TAG, given.tag), (images.DIGESTS, pinned)):
        if value:
            os.environ[name] = value
