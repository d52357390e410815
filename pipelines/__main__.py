"""zhllama: the pipeline's command line. `python -m pipelines` is the same.

Nothing heavy is imported before a command needs it: `--help` takes a tenth of a second.
"""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from components.shared.cli import guarded
from pipelines.commands import admission, artifacts, cluster, local, planning, runs


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and ends the process: 0 done, 2 wrong input (one line), 143 cancelled, else a fault."""
    given = parser().parse_args(arguments)
    guarded(lambda: given.command(given))


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="zhllama", description="Adapt a LLaMA model to Chinese, here or on Kubeflow.")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (local, artifacts, cluster, planning, runs, admission):
        module.add_to(commands)
    return whole


if __name__ == "__main__":
    main()
