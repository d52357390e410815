"""zhllama: the pipeline's command line. `python -m pipelines` is the same.

Nothing heavy is imported before a command needs it: `--help` takes a tenth of a second.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from pipelines.cli import artifacts, cluster, local, planning, runs
from zhllama.errors import EXIT_INPUT
from zhllama.stage.command_line import nearest
from zhllama.stage.program import end, guarded


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and ends the process: 0 done, 2 wrong input (one line), 143 cancelled, else a fault."""

    def run() -> None:
        given = parser().parse_args(arguments)
        given.command(given)

    guarded(run)


class Parser(argparse.ArgumentParser):
    """A wrong word is one line, as all wrong input, and names the nearest option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            known = nearest(word, list(self._option_string_actions)) if word.startswith("-") else ""
            self.error(f"{word}: not known here{known}")
        return given, unknown

    def error(self, message: str) -> NoReturn:
        end(EXIT_INPUT, f"error: {message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    whole: argparse.ArgumentParser = Parser(
        prog="zhllama", description="Adapt a LLaMA model to Chinese, here or on Kubeflow."
    )
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (local.add_to, artifacts.add_to, cluster.add_to, planning.add_to, runs.add_to, planning.add_check_to):
        add(commands)
    return whole


if __name__ == "__main__":
    main()
