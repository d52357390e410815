"""Options that several commands share, and what they mean."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components.shared.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

WORK = Path(".zhllama")


def size_option(add: argparse.ArgumentParser, default: str | None) -> None:
    from pipelines import sizes

    choices = ", ".join(sizes.names())
    note = f"{choices} (default: {default})" if default else choices
    add.add_argument("--size", default=default, required=default is None, help=note)


def image_options(add: argparse.ArgumentParser) -> None:
    add.add_argument("--registry", default="", help="where the images are: registry.example.com/team")
    add.add_argument("--tag", default="", help="of the images (default: this version)")


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
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair}: write NAME=VALUE")
        if name in found:
            raise InputError(f"--set {name}: given twice; keep one")
        found[name] = value
    return found


def use_images(given: argparse.Namespace) -> None:
    # before the components are imported: their signatures name their images
    for name, value in (("ZHLLAMA_REGISTRY", given.registry), ("ZHLLAMA_TAG", given.tag)):
        if value:
            os.environ[name] = value
