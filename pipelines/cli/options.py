"""Options that several commands share, and what they mean."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zhllama.errors import InputError
from zhllama.kubernetes.names import check_keys, check_labels
from zhllama.stage import images

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.configuration import Configuration
    from pipelines.setting import Value

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


def pod_options(add: argparse.ArgumentParser) -> None:
    """Settings of the steps' pods that have an option of their own."""
    group = add.add_argument_group("the steps' pods", "all else: --set, --config, zhllama parameters")
    group.add_argument(
        "--run-as-user", default="", metavar="UID",
        help="of the pods (default: 65532); none leaves it to the cluster, as OpenShift wants it",
    )  # fmt: skip
    for name in ("label", "annotation"):
        group.add_argument(
            f"--{name}", action="append", default=[], metavar="NAME=VALUE", help=f"one more {name} of the steps' pods"
        )
    group.add_argument(
        "--pull-policy", default="", choices=("Always", "IfNotPresent", "Never"), help="default: the cluster's"
    )


def configured(
    given: argparse.Namespace, write: bool = True, defaults: "Mapping[str, Value] | None" = None
) -> "Configuration":
    """The run's configuration, of what the command was given; and its images are used. InputError for what no pipeline
    can be compiled from."""
    from pipelines.configuration import configure
    from zhllama.kubernetes.pod_security import uid

    texts = settings(given.settings)
    of_pods = {name: _pairs(f"--{name}", getattr(given, name, [])) for name in ("label", "annotation")}
    check_labels("--label", of_pods["label"])
    check_keys("--annotation", of_pods["annotation"])
    if user := getattr(given, "run_as_user", ""):
        uid(user)
    # an option of its own → its setting, and what it says
    options = {
        "--run-as-user": ("run_as_user", user),
        "--pull-policy": ("pull_policy", getattr(given, "pull_policy", "")),
        "--registry": ("registry", getattr(given, "registry", "")),
        "--tag": ("tag", getattr(given, "tag", "")),
        "--digests": ("digests", str(getattr(given, "digests", None) or "")),
        **{f"--{name}": (f"step_{name}s", json.dumps(pairs) if pairs else "") for name, pairs in of_pods.items()},
    }
    for option, (name, text) in options.items():
        if text and name in texts:
            raise InputError(f"--set {name}: it is given by {option} too; keep one")
    told = configure(
        given.size,
        texts | {name: text for name, text in options.values() if text},
        given.config,
        defaults=defaults,
        write=write,
    )
    _use(told["registry"], told["tag"], Path(told["digests"]) if told["digests"] else None)
    return told


def set_option(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="NAME=VALUE",
        help="what a run is told: its start, addresses, steps, machines … (zhllama parameters lists all)",
    )  # fmt: skip
    add.add_argument(
        "--config", action="append", default=[], type=Path, metavar="FILE",
        help="a YAML file of such settings, over the size's; --set stands over it; may be given several times",
    )  # fmt: skip


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
    """As `_use`, of `image_options`."""
    _use(given.registry, given.tag, given.digests)


def _use(registry: str, tag: str, digests: Path | None) -> None:
    """Before the components are imported: their signatures name images. InputError for what no registry or tag is
    called, and for a wrong list of digests."""
    images.check_place(registry, tag)
    pinned = images.read_digests(digests) if digests else ""
    for name, value in ((images.REGISTRY, registry), (images.TAG, tag), (images.DIGESTS, pinned)):
        if value:
            os.environ[name] = value
