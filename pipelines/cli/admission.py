"""`zhllama check`: what a cluster would refuse, or accept and regret, before it is applied."""

import argparse
import sys
from pathlib import Path


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    add = commands.add_parser(
        "check",
        help="check manifests without a cluster",
        description="Ends with 1 when an object would be refused or would not work, with 0 otherwise.",
    )
    add.add_argument("files", nargs="+", type=Path, metavar="FILE", help="YAML files, or folders of them")
    add.add_argument(
        "--crds", type=Path, metavar="DIR", help="CustomResourceDefinition files, as kubectl get crd -o yaml"
    )
    add.add_argument("--largest-node", default="", metavar="TEXT", help="cpu=96,memory=1Ti,gpus=8: what a pod may need")
    add.set_defaults(command=check)


def check(given: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.text import Text

    from pipelines.manifests.check.check import check as check_files
    from pipelines.manifests.check.check import node_of

    found = check_files(given.files, given.crds, node_of(given.largest_node))
    console = Console(soft_wrap=True)
    for finding in found:
        line = Text(f"{finding.file}:{finding.line}: ")
        line.append(finding.level, "bold red" if finding.level == "error" else "bold yellow")
        line.append(f" [{finding.rule}] ", "dim").append(finding.message)
        console.print(line)
    errors = sum(finding.level == "error" for finding in found)
    console.print(
        f"{errors} {'error' if errors == 1 else 'errors'}, {len(found) - errors} "
        f"{'warning' if len(found) - errors == 1 else 'warnings'}",
        style="bold red" if errors else "bold green",
    )
    if errors:
        sys.exit(1)
