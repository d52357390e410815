"""The reaper as a command of the launcher's image: `python -m components.launch_training.reap --older-than 10m`.

The CronJob in k8s/components/reaper runs it; `zhllama reap` is the same from a shell.
"""

import logging
import sys
from dataclasses import dataclass

log = logging.getLogger("reaper")


@dataclass(frozen=True, kw_only=True)
class Reap:
    """Delete unfinished training jobs whose run has ended or is gone."""

    namespace: str = ""
    """Where; empty: this pod's namespace."""
    older_than: str = "10m"
    """Jobs that were created longer ago than this: 90s, 10m, 2h, 1d, 1w."""
    dry_run: bool = False
    """Say what would be deleted, and delete nothing."""


def reap(config: Reap) -> None:
    from zhllama.kubernetes.reaper import reap as reap_now

    lines = reap_now(config.namespace, config.older_than, config.dry_run)
    for line in lines:
        log.info("%s", line)
    log.info("%d orphaned training %s", len(lines), "job" if len(lines) == 1 else "jobs")


if __name__ == "__main__":
    from zhllama.stage.command_line import parse
    from zhllama.stage.program import guarded

    guarded(lambda: reap(parse(Reap, sys.argv[1:])))
