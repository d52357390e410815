"""The pipeline's exit handler: deletes the jobs of a run that still run, of either kind, found by their label.

`python -m components.launch_training.cleanup --run-id RUN --namespace NS --backend pytorchjob`. Argo runs it after a
terminate too, where the launcher's own handler has a fraction of a second at best.
"""

import logging
from dataclasses import dataclass
from typing import Literal

log = logging.getLogger("cleanup")


@dataclass(frozen=True, kw_only=True)
class Cleanup:
    """Delete the training jobs of a run that have not finished."""

    run_id: str
    """The run, as launch_training was given it."""
    backend: Literal["pytorchjob", "trainjob", "local"] = "pytorchjob"
    """Where its trainings ran."""
    namespace: str = ""
    """Namespace of the jobs; empty: this pod's."""


def cleanup(config: Cleanup) -> None:
    if config.backend == "local":
        log.info("local trainings end with their launcher: nothing to clean up")
        return
    from components.launch_training.job_deletion import delete_unfinished

    deleted = delete_unfinished(config.run_id, config.namespace)
    log.info("run %s: %s", config.run_id, f"deleted {', '.join(deleted)}" if deleted else "no job was left")


if __name__ == "__main__":
    import sys

    from zhllama.stage.command_line import parse
    from zhllama.stage.program import guarded

    guarded(lambda: cleanup(parse(Cleanup, sys.argv[1:])))
