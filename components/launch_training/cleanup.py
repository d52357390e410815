"""The pipeline's exit handler: deletes the jobs of a run that still run, of either kind, found by their label.

`python -m components.launch_training.cleanup --run-id RUN`. Argo runs it after a terminate too, where the launcher's
own handler has a fraction of a second at best.
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
    """Deletes the run's jobs of either kind that are not over; their policies go with them."""
    if config.backend == "local":
        log.info("local trainings end with their launcher: nothing to clean up")
        return
    from kubernetes.client.exceptions import ApiException

    from components.launch_training.cluster import Cluster
    from zhllama.kubernetes.api import unanswered
    from zhllama.kubernetes.job_kinds import BY_BACKEND, has_ended
    from zhllama.kubernetes.names import LABEL, label_value

    deleted, errors = [], []
    for kind in BY_BACKEND.values():
        cluster = Cluster(kind)
        place = config.namespace or cluster.namespace
        try:
            jobs = cluster.jobs(place, f"{LABEL}run={label_value(config.run_id)}")
        except ApiException as error:
            # without this kind's operator there are none
            if error.status != 404:
                errors.append(error)
            continue
        for job in jobs:
            name, uid = job["metadata"]["name"], job["metadata"]["uid"]
            try:
                if not has_ended(job) and cluster.delete(place, name, uid):
                    deleted.append(name)
            except ApiException as error:
                errors.append(error)
    if errors:
        raise unanswered(errors[0])
    log.info("run %s: %s", config.run_id, f"deleted {', '.join(deleted)}" if deleted else "no job was left")


if __name__ == "__main__":
    import sys

    from zhllama.stage.command_line import parse
    from zhllama.stage.program import guarded

    guarded(lambda: cleanup(parse(Cleanup, sys.argv[1:])))
