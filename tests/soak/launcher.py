"""The launcher of training jobs under faults, kills, restarts, cancels and a second launcher: one job, or none.

Each seed is a run of one stage on a cluster whose API server fails, drops, stalls and cuts what it likes, with an
operator that queues, runs, restarts and ends the job as the seed says. Launchers are processes; some are killed and
started again, some come in pairs, some are cancelled, with the container killed a moment later, as Kubeflow Pipelines
does, or without. Held for every seed:

- never two jobs of the run that are not over;
- a launcher ends with 0 exactly when a job has succeeded, with 2 when the training said so, with 143 when cancelled;
- after a cancel no job is left: the launcher deleted it, or, where it was killed, the run's exit handler, or else the
  reaper (a request to create a job may arrive after both);
- every launcher comes to its end;
- a launcher that followed the last job from its beginning passed each line of the jobs' logs on, once, with the pod's
  name. Of a pod that its operator has deleted, LINGERS seconds after its job failed, nobody can have more than what the
  API server has answered until then: each line of those answers was passed on, be they cut or not; and what else the
  pod had written is said to be missing, but where a stream was cut in a way that looks like its end.
"""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from components.launch_training import cancel, cluster_job, follower, job_log
from components.launch_training.launcher import launch_training
from components.launch_training.options import LaunchTraining
from tests.components.launch_training.fake_cluster import JOBS, ROOTS, FakeCluster, finished, warm_up
from tests.components.launch_training.operators import give_up, name_of, train
from tests.kubernetes_server import Fault, going
from zhllama.kubernetes import api as kubernetes_api
from zhllama.stage.program import guarded
from zhllama.stage.run import run_stage

ATTEMPTS = 3
MOST_STARTS = 12
ENDS_WITHIN = 90
"""Seconds for one launcher: far more than any needs."""
LINGERS = 0.2
"""Seconds for which a pod that its operator deletes has a log. A real one had it for two, and waits are cut more."""
RUN = "run-of-the-soak"
PACE: tuple[tuple[Any, dict[str, Any]], ...] = (
    (kubernetes_api, {"FIRST_WAIT": 0.01, "LONGEST_WAIT": 0.1, "LONGEST_ASKED": 0.05, "TIMEOUT": (2.0, 1.5)}),
    (kubernetes_api, {"GIVE_UP_AFTER": 60.0}),
    (follower, {"LOOK_EVERY": 0.3, "WATCH_SECONDS": 1, "FIRST_REWATCH": 0.01, "LONGEST_REWATCH": 0.05}),
    (cluster_job, {"GONE_WITHIN": 30.0}),
    (cancel, {"CANCEL_TIMEOUT": (1.0, 1.0), "CANCEL_WITHIN": 10.0, "LATE_EVERY": 0.1}),
    (job_log, {"FIRST_WAIT": 0.01, "LONGEST_WAIT": 0.05, "SILENT": 1.5, "LAST_LINES_WITHIN": 30.0}),
    (cancel, {"LEAVE_WITHIN": 5.0}),
)
"""The launcher's waits, cut to what a server on this machine needs."""
REFUSED = ("500", "503", "429", "lost question", "lost answer")


@dataclass(frozen=True)
class Plan:
    """What a seed means. share: of the requests that fail; kills, cancel: requests at which a launcher is killed or
    cancelled; killed_after: seconds from the cancel to the end of the container; ends: of the attempts, in order."""

    backend: str
    share: float
    launchers: int
    kills: tuple[int, ...]
    cancel: int | None
    killed_after: float | None
    ends: tuple[str, ...]

    @staticmethod
    def of(seed: int) -> "Plan":
        chance = random.Random(seed)
        return Plan(
            backend=chance.choice(("pytorchjob", "pytorchjob", "trainjob")),
            share=chance.choice((0.0, 0.05, 0.15, 0.3)),
            launchers=2 if chance.random() < 0.2 else 1,
            kills=tuple(chance.randrange(2, 60) for _ in range(chance.choice((0, 0, 1, 2, 3)))),
            cancel=chance.randrange(1, 60) if chance.random() < 0.4 else None,
            killed_after=chance.choice((None, None, 0.0, 0.02, 0.1)),
            ends=tuple(
                chance.choices(
                    ("succeeded", "failed", "wrong input", "deadline", "deleted"), (50, 35, 7, 4, 4), k=ATTEMPTS
                )
            ),
        )


def run(seeds: Iterable[int], scratch: Path) -> dict[str, int]:
    """Every seed in turn; AssertionError with the seed in it where something does not hold."""
    counted: Counter[str] = Counter()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    before = {(module, name): getattr(module, name) for module, values in PACE for name in values}
    environment = dict(os.environ)
    # the exit handler and the reaper run in this process
    set_pace()
    warm_up()
    for name in ("model", "dataset"):
        (scratch / name).mkdir(parents=True, exist_ok=True)
        (scratch / name / "config.json").write_text("{}")
    try:
        for seed in seeds:
            with FakeCluster() as cluster:
                os.environ["KUBECONFIG"] = str(cluster.kubeconfig(scratch / "kubeconfig"))
                try:
                    counted += _Run(seed, cluster, context, scratch).all()
                except Exception as error:
                    raise AssertionError(f"seed {seed}: {error}") from error
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for (module, name), value in before.items():
            setattr(module, name, value)
    return dict(sorted(counted.items()))


def set_pace() -> None:
    for module, values in PACE:
        for name, value in values.items():
            setattr(module, name, value)


def launch(scratch: str, output: str, backend: str) -> None:
    """A launcher, as its command runs it, in a process of its own."""
    said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ["KUBECONFIG"] = f"{scratch}/kubeconfig"
    set_pace()

    class Armed(cancel.Canceller):
        """Leaves word that from now on a cancel is its own to carry out."""

        def __enter__(self) -> Self:
            entered = super().__enter__()
            Path(f"{output}.armed").touch()
            return entered

    cluster_job.Canceller = Armed  # type: ignore[misc]
    config = LaunchTraining(
        stage="lora",
        model=f"{scratch}/model",
        dataset=f"{scratch}/dataset",
        store=f"{scratch}/store",
        run_id=RUN,
        backend=backend,
        attempts=ATTEMPTS,
    )

    def work() -> None:
        run_stage(config, launch_training)

    guarded(work)


def said(path: Path) -> str:
    """What a launcher said; nothing when it was killed before it could."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


class _Run:
    def __init__(self, seed: int, cluster: FakeCluster, context: Any, scratch: Path) -> None:
        self._plan, self._chance = Plan.of(seed), random.Random(seed + 10**6)
        self._cluster, self._context, self._scratch = cluster, context, scratch
        self._lock = threading.Lock()
        self._counted: Counter[str] = Counter(runs=1)
        self._live: dict[int, Any] = {}
        self._seen = 0
        self._calm = False
        self._cancelled = False
        self._their_own = True
        self._published = False
        self._ended: dict[str, str] = {}
        self._written: dict[str, list[str]] = {}
        self._deleted: set[str] = set()
        self._misled: set[str] = set()
        """Pods of whose logs a stream was cut as if it had come to its end."""
        self._job_of: dict[str, str] = {}
        self._wrong: list[str] = []

    def all(self) -> "Counter[str]":
        shutil.rmtree(self._scratch / "store", ignore_errors=True)
        cluster = self._cluster
        cluster.before_create, cluster.on_create, cluster.fault = self._one_at_a_time, self._operate, self._meet
        cluster.deletes = self._delete_pod
        begun = [threading.Thread(target=self._keep_launching, args=(n,)) for n in range(self._plan.launchers)]
        for one in begun:
            one.start()
        for one in begun:
            one.join(MOST_STARTS * ENDS_WITHIN)
        self._calm = True
        if self._cancelled:
            self._nothing_left()
        if self._wrong:
            raise AssertionError("; ".join(self._wrong))
        return self._counted

    # --- launchers ----------------------------------------------------------------------------------------------------

    def _keep_launching(self, number: int) -> None:
        try:
            for start in range(MOST_STARTS):
                path = self._scratch / f"said-{number}"
                for one in (path, Path(f"{path}.armed")):
                    one.unlink(missing_ok=True)
                arguments = (str(self._scratch), str(path), self._plan.backend)
                process = self._context.Process(target=launch, args=arguments)
                with self._lock:
                    if self._cancelled:
                        return
                    seen = set(self._ended)
                    process.start()
                    self._live[number] = process
                process.join(ENDS_WITHIN)
                with self._lock:
                    del self._live[number]
                    self._counted["restarts"] += start > 0
                if process.exitcode is None:
                    process.kill()
                    self._wrong.append(f"a launcher hangs: {said(path)[-3000:]}")
                    return
                if process.exitcode == -signal.SIGKILL:
                    continue
                self._judge(process.exitcode, said(path), alone=start == 0 and not seen)
                return
            self._wrong.append("no end was come to")
        except Exception as error:  # noqa: BLE001 - told by the main thread
            self._wrong.append(f"{type(error).__name__}: {error}")

    def _judge(self, code: int, said: str, alone: bool) -> None:
        """The launcher's end against what has become of the jobs."""
        ends = list(self._ended.values())
        self._counted[f"ended with {code}"] += 1
        # of two launchers one deletes the job whose input is wrong, and the other may see no more than that
        other = self._plan.launchers > 1 and "wrong input" in ends
        gone = other or bool({"deadline", "deleted"} & set(ends))
        known = {
            # a result that is there counts, whatever becomes of the job
            0: "succeeded" in ends or self._published,
            1: gone or ends.count("failed") == ATTEMPTS or self._cancelled,
            2: "wrong input" in ends,
            143: self._cancelled,
            # it had not begun: the second of two
            -signal.SIGTERM: self._cancelled,
        }
        if not known.get(code, False):
            self._wrong.append(f"a launcher ended with {code}, the jobs with {self._ended}: {said[-3000:]}")
        if "succeeded" in ends and code != 0 and not self._cancelled:
            self._wrong.append(f"a job succeeded, and its launcher ended with {code}: {said[-3000:]}")
        followed = "already done" not in said and "the job's result is there" not in said
        if code == 0 and alone and followed and not self._cancelled:
            # one of two may have come when an attempt was over
            theirs = {pod: lines for pod, lines in self._written.items() if f" team/{self._job_of[pod]} " in said}
            for pod, lines in theirs.items():
                passed = Counter(
                    line.removeprefix(f"{pod} | ") for line in said.splitlines() if line.startswith(f"{pod} | ")
                )
                lost, more = Counter(lines) - passed, passed - Counter(lines)
                if lost and pod in self._deleted:
                    self._counted["lines that went with their pods"] += lost.total()
                    missing = f"of {pod} are missing: ", f"{self._job_of[pod]}: no line of its log was heard"
                    if not any(words in said for words in missing) and pod not in self._misled:
                        self._wrong.append(f"log of {pod}: {lost.total()} lines went unsaid: {said[-2000:]}")
                    # each has its own text
                    lost &= Counter({line.split(" ", 1)[1].rstrip("\n") for line in self._cluster.told.get(pod, ())})
                if lost or more:
                    self._wrong.append(
                        f"log of {pod}: lost {lost.total()} lines ({list(lost)[:3]}), repeated {more.total()} "
                        f"({list(more)[:3]}): {said[-2000:]}"
                    )
                self._counted["lines of logs"] += len(lines)

    def _live_jobs(self) -> list[str]:
        return [name for name, job in self._cluster.jobs.items() if not finished(job)]

    def _nothing_left(self) -> None:
        from components.launch_training.cleanup import Cleanup, cleanup
        from zhllama.kubernetes.reaper import reap

        if not self._live_jobs():
            self._counted["cancels that left no job"] += 1
            return
        if self._plan.killed_after is None and self._their_own:
            self._wrong.append("a launcher was cancelled, had all the time it wanted, and left a job")
        cleanup(Cleanup(run_id=RUN, backend="pytorchjob"))
        if not self._live_jobs():
            self._counted["cancels finished by the exit handler"] += 1
            return
        workflow = {"name": "w", "namespace": "team", "uid": "u", "labels": {"pipeline/runid": RUN}}
        ended = {"kind": "Workflow", "metadata": workflow, "status": {"phase": "Failed"}}
        self._cluster.put(f"{ROOTS['Workflow']}/w", ended)
        reap("team", "0s", dry_run=False)
        self._counted["cancels finished by the reaper"] += 1
        if self._live_jobs():
            self._wrong.append(f"left after a cancel: {self._live_jobs()}")

    # --- the API server -----------------------------------------------------------------------------------------------

    def _one_at_a_time(self, thing: dict[str, Any]) -> None:
        if thing["kind"] in JOBS and self._live_jobs():
            self._wrong.append(f"{name_of(thing)} was created beside {self._live_jobs()}")

    def _meet(self, method: str, path: str) -> Fault | int | None:
        """What a request meets; and the moments at which launchers are killed and cancelled."""
        with self._lock:
            if self._calm:
                return None
            self._seen += 1
            if self._seen in self._plan.kills and self._live and not self._cancelled:
                self._chance.choice(list(self._live.values())).kill()
                self._counted["kills"] += 1
            if self._seen == self._plan.cancel:
                self._cancel()
            if self._chance.random() >= self._plan.share:
                return None
            kinds = [*REFUSED, *REFUSED, *REFUSED, "stall"]
            kinds += ["cut"] * 8 if method == "WATCH" or path.endswith("/log") else []
            # a cut that looks like an end is a proxy's doing, and those end the streams that are long
            kinds += ["cut cleanly"] * 8 if method in ("WATCH", "FOLLOW") else []
            kind = self._chance.choice(kinds)
            self._counted["faults"] += 1
            self._counted[f"faults: {kind}"] += 1
            if kind == "cut cleanly" and path.endswith("/log"):
                self._misled.add(path.split("/")[-2])
            return self._fault(kind)

    def _cancel(self) -> None:
        if not self._live:
            return
        self._cancelled = True
        self._counted["cancels"] += 1
        for number, process in self._live.items():
            # one that is still reading its inputs does not know its job; the exit handler does
            self._their_own &= (self._scratch / f"said-{number}.armed").exists()
            os.kill(process.pid, signal.SIGTERM)
            if self._plan.killed_after is not None:
                threading.Timer(self._plan.killed_after, process.kill).start()

    def _fault(self, kind: str) -> Fault:
        if kind == "stall":
            hold = threading.Event()
            threading.Timer(self._chance.choice((0.05, 0.3, 2.0)), hold.set).start()
            return Fault(hold=hold)
        cut = self._chance.choice((0, 1, 30, 100, 300, 1000, 5000))
        return {
            "500": Fault(status=500),
            "503": Fault(status=503),
            "429": Fault(status=429, headers={"Retry-After": "1"}),
            "lost question": Fault(lose="before"),
            "lost answer": Fault(lose="after"),
            "cut": Fault(cut=cut),
            "cut cleanly": Fault(cut=cut, cleanly=True),
        }[kind]

    # --- the operator -------------------------------------------------------------------------------------------------

    def _operate(self, job: dict[str, Any]) -> None:
        """Moves a job to the end that its attempt is to have, unless it is deleted on the way."""
        cluster, name, uid = self._cluster, name_of(job), job["metadata"]["uid"]
        with self._lock:
            # for a job that is made again after it was deleted, what was drawn for the first one holds
            chance = random.Random(f"{self._chance.random()}")
            end = self._plan.ends[int(name.rpartition("-a")[2]) - 1]
        pod = cluster.pod(name)[0] if cluster.jobs.get(name) else ""
        self._written[pod] = []
        self._job_of[pod] = name

        def step(*acts: Any) -> bool:
            """Does it while the job is there; then a moment passes."""
            with cluster.changed:
                there = cluster.jobs.get(name, {}).get("metadata", {}).get("uid") == uid
                for act in acts if there else ():
                    act()
            time.sleep(chance.choice((0.0, 0.0, 0.005, 0.02)))
            return there

        def say(text: str) -> None:
            cluster.write_log(pod, text)
            self._written[pod].append(text)

        restarts = 0
        for _ in range(chance.choice((0, 0, 1, 2))):
            step(lambda: cluster.set_condition(name, "Suspended"))
        step(lambda: cluster.set_pod(name, "Running"), lambda: cluster.set_condition(name, "Running"))
        for number in range(chance.choice((1, 5, 40))):
            if not step(lambda number=number: say(f"step {number}: {'x' * chance.randrange(200)}")):
                return
        if chance.random() < 0.3 and end == "succeeded":
            restarts = 1
            step(
                lambda: cluster.restart_log(pod),
                lambda: cluster.set_pod(name, "Running", 1, "fault: once", last=True, restarts=1),
            )
            for number in range(chance.choice((0, 1, 5))):
                step(lambda number=number: say(f"again {number}"))
        self._end(job, end, step, restarts)

    def _delete_pod(self, path: str) -> None:
        """The operator's doing: at once where the job goes on, which has the next one by the same name."""
        cluster = self._cluster
        pod = cluster.objects[path]
        owner = pod["metadata"]["ownerReferences"]
        if "exitCode" not in str(pod["status"]):
            cluster.delete(path)
            return
        self._deleted.add(name_of(pod))

        def remove() -> None:
            with cluster.changed:
                if path in cluster.objects and cluster.objects[path]["metadata"]["ownerReferences"] == owner:
                    cluster.delete(path)

        going(pod)
        cluster.put(path, pod)
        threading.Timer(LINGERS, remove).start()

    def _end(self, job: dict[str, Any], end: str, step: Any, restarts: int) -> None:
        cluster, name = self._cluster, name_of(job)

        def note() -> None:
            self._ended[name] = end

        def publish() -> None:
            self._published = True
            train(job)

        if end == "succeeded":
            step(publish)
            step(
                lambda: cluster.set_pod(name, "Succeeded", 0, restarts=restarts),
                lambda: job["kind"] == "TrainJob" and cluster.set_condition(name, "Complete"),
                note,
            )
        elif end == "failed":
            step(lambda: give_up(cluster, job), note)
        elif end == "wrong input":
            step(lambda: cluster.set_pod(name, "Running", 2, "error: --dataset x: mend it", last=True), note)
        elif end == "deadline":
            step(lambda: cluster.set_condition(name, "Late"), note)
        else:
            step(lambda: cluster.delete_job(name), note)
