"""Training jobs: what the webhooks of the training operator (1.9) and of Kubeflow Trainer (2.3) refuse, what they let
pass and no operator can run, deadlines, and Kueue's labels."""

import re
from collections.abc import Iterator

from pipelines.manifests.check.documents import WORKS, Document, Finding, mapping
from pipelines.manifests.check.field import Field
from pipelines.manifests.check.pods import is_gpu, is_of_known_runtime, pods
from pipelines.manifests.check.server.metadata import name_of
from zhllama.kubernetes.formats import amount, dns_1035_label
from zhllama.kubernetes.job_manifest import RUNTIME
from zhllama.kubernetes.names import LONGEST_JOB_NAME, POD_KEYS, is_of_pods

TRAINING_KINDS = ("PyTorchJob", "TrainJob")
RENDEZVOUS = ("c10d", "etcd", "etcd-v2")
RESTARTS = ("Always", "OnFailure", "Never", "ExitCode")
CLEANINGS = ("Running", "All", "None")
MANAGERS = ("kubeflow.org/training-operator", "kueue.x-k8s.io/multikueue")
QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"
REPLICAS = ("spec", "pytorchReplicaSpecs")
_RESERVED = {
    "PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT",
}  # fmt: skip
"""Variables that Kubeflow Trainer sets itself."""
_OF_TRAINER = ("node", "dataset-initializer", "model-initializer")


# --- names ------------------------------------------------------------------------------------------------------------


def name(document: Document) -> Iterator[Finding]:
    """A job's name becomes part of host names: `<name>-worker-999` has to be one."""
    made = name_of(document.metadata)
    field = Field(document, value=document.value)["metadata"]["name" if document.name else "generateName"]
    form = f"lower-case letters, digits and dashes, a letter first, at most {LONGEST_JOB_NAME} characters"
    if made and dns_1035_label(made):
        yield field.wrong(f"the job's name {made!r} becomes part of host names: {form}", "dns-name")
    elif document.name and len(made) > LONGEST_JOB_NAME:
        yield document.works("dns-name", f"the job's name {made!r} becomes part of host names: {form}", *field.place)


# --- PyTorchJob -------------------------------------------------------------------------------------------------------


def pytorchjob_webhook(document: Document) -> Iterator[Finding]:
    """validator.pytorchjob.training-operator.kubeflow.org, rule by rule."""
    if document.kind != "PyTorchJob":
        return
    spec = Field(document, value=document.value)["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    if not isinstance(replicas.value, dict):
        yield replicas.wrong("is needed: Master, Worker", "webhook")
        return
    if spec["elasticPolicy"]["nProcPerNode"] and spec["nprocPerNode"]:
        wrong = "stands beside spec.nprocPerNode; keep the latter"
        yield spec["elasticPolicy"]["nProcPerNode"].wrong(wrong, "nproc-elastic")
    manager = spec["runPolicy"].text("managedBy")
    if manager and manager not in MANAGERS:
        yield spec["runPolicy"]["managedBy"].wrong(f"{manager!r} must be one of {', '.join(MANAGERS)}", "webhook")
    for kind in replicas.names():
        replica = replicas[kind]
        count = replica.number("replicas")
        if kind not in ("Master", "Worker"):
            yield replica.wrong(f"{kind!r} must be Master or Worker", "webhook")
        elif kind == "Master" and count != 1:
            yield replica["replicas"].wrong("exactly one Master is needed, and said: replicas: 1", "one-master")
        elif kind == "Worker" and count is not None and count < 1:
            yield replica["replicas"].wrong("must be 1 or more; leave Worker out where there is none", "webhook")
        containers = replica["template"]["spec"]["containers"]
        for container in containers.items():
            if not container.text("image"):
                yield container["image"].wrong("is needed", "webhook")
        if not any(container.text("name") == "pytorch" for container in containers.items()):
            why = "the operator sets its variables in that one alone, and refuses the job"
            yield containers.wrong(f"no container is named pytorch: {why}", "container-name")


def pytorchjob_runs(document: Document) -> Iterator[Finding]:
    """What the webhook lets pass, and does not run."""
    if document.kind != "PyTorchJob":
        return
    spec = Field(document, value=document.value, grade=WORKS)["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    elastic = spec["elasticPolicy"]
    if elastic:
        yield from _elastic(elastic, replicas)
    elif isinstance(replicas.value, dict) and "Master" not in replicas.names():
        yield replicas.wrong("exactly one Master is needed; the other nodes are Workers", "one-master")
    for kind in replicas.names():
        restart = replicas[kind].text("restartPolicy")
        if restart and restart not in RESTARTS:
            wrong = f"{restart!r}: use {', '.join(RESTARTS)}"
            yield replicas[kind]["restartPolicy"].wrong(wrong, "restart-policy")
    nproc = spec["nprocPerNode"].value
    if isinstance(nproc, str) and nproc not in ("auto", "cpu", "gpu") and not re.fullmatch("[1-9][0-9]*", nproc):
        yield spec["nprocPerNode"].wrong(f"{nproc!r}: use a number, auto, cpu or gpu", "processes")
    policy = spec["runPolicy"]
    clean = policy.text("cleanPodPolicy")
    if clean and clean not in CLEANINGS:
        yield policy["cleanPodPolicy"].wrong(f"{clean!r}: use {', '.join(CLEANINGS)}", "run-policy")
    for name_, least in (("backoffLimit", 0), ("ttlSecondsAfterFinished", 0), ("activeDeadlineSeconds", 1)):
        number = policy.number(name_)
        if number is not None and number < least:
            yield policy[name_].wrong(f"{number}: must be {least} or more", "run-policy")


def _elastic(elastic: Field, replicas: Field) -> Iterator[Finding]:
    backend = elastic["rdzvBackend"].value
    if backend is not None and backend not in RENDEZVOUS:
        yield elastic["rdzvBackend"].wrong(f"{backend!r}: use {', '.join(RENDEZVOUS)}", "rendezvous")
    if "Master" in replicas.names():
        wrong = "an elastic job has Workers alone: which of them leads is found by rendezvous"
        yield replicas["Master"].wrong(wrong, "elastic-master")
    least, most = elastic.number("minReplicas"), elastic.number("maxReplicas")
    count = replicas["Worker"].number("replicas")
    count = 1 if count is None else count
    if least is not None and most is not None and not least <= count <= most:
        wrong = f"{count} Workers are not between minReplicas {least} and maxReplicas {most}"
        yield replicas["Worker"]["replicas"].wrong(wrong, "elastic-range")
    port = elastic.number("rdzvPort")
    if port is not None and not 1 <= port <= 65535:
        yield elastic["rdzvPort"].wrong(f"{port}: must be between 1 and 65535", "rendezvous")


# --- TrainJob ---------------------------------------------------------------------------------------------------------


def trainjob_webhook(document: Document) -> Iterator[Finding]:
    """What the webhook of Kubeflow Trainer refuses; where its definition stands alone, the job is taken, and fails."""
    if document.kind != "TrainJob":
        return
    spec = Field(document, value=document.value, grade=WORKS)["spec"]
    if not is_of_known_runtime(document):
        wrong = f"its pods come of a runtime that is not {RUNTIME}: what they are is not known here, and not checked"
        yield document.advice("runtime", wrong, "spec", "runtimeRef")
    if not spec["runtimeRef"].text("name"):
        yield spec["runtimeRef"]["name"].wrong("is needed", "webhook")
    trainer = spec["trainer"]
    for name_ in ("numNodes", "numProcPerNode"):
        number = trainer.number(name_)
        if number is not None and number < 1:
            yield trainer[name_].wrong(f"{number}: must be 1 or more", "webhook")
    if trainer.list("command")[:2] != ["tune", "run"]:  # torchtune has no variables but arguments
        for variable in trainer.each("env"):
            if variable.text("name") in _RESERVED:
                wrong = f"{variable.text('name')} is set by the operator, and refused here"
                yield variable["name"].wrong(wrong, "webhook")
    for patch in spec.each("runtimePatches"):
        for job in patch["trainingRuntimeSpec"]["template"]["spec"].each("replicatedJobs"):
            pod = job["template"]["spec"]["template"]["spec"]
            for container in (*pod.each("containers"), *pod.each("initContainers")):
                if container.text("name") in _OF_TRAINER and container["env"].value:
                    wrong = "variables of this container are refused in a patch: spec.trainer.env or spec.initializer"
                    yield container["env"].wrong(wrong, "webhook")


# --- advice -----------------------------------------------------------------------------------------------------------


def deadlines(document: Document) -> Iterator[Finding]:
    """A training that hangs is ended, a finished one goes away, and a dead pod's logs stay until then."""
    place = ("spec",) if document.kind == "TrainJob" else ("spec", "runPolicy")
    policy = mapping(document.value, *place)
    why = {
        "activeDeadlineSeconds": "a job that hangs holds its GPUs for ever",
        "ttlSecondsAfterFinished": "finished jobs stay for ever",
        "backoffLimit": "a job that cannot start is started again for ever",
    }
    for name_ in why if document.kind == "PyTorchJob" else ("activeDeadlineSeconds",):
        if name_ not in policy:
            yield document.advice("deadlines", f"no {name_}: {why[name_]}", *place)
    if document.kind == "PyTorchJob" and policy.get("cleanPodPolicy") != "Running":
        wrong = "with None the other pods run on after a failure, with All the logs go too"
        yield document.advice("deadlines", f"cleanPodPolicy must be Running: {wrong}", *place, "cleanPodPolicy")


def operators_pods(document: Document) -> Iterator[Finding]:
    """The operator puts an init container of its own into Workers' pods, and its default fails the standard."""
    if document.kind == "PyTorchJob" and "Worker" in mapping(document.value, *REPLICAS):
        yield document.advice(
            "operator-init",
            "the operator adds an init container to Workers that sets no securityContext by default: in a restricted "
            "namespace its configuration has to replace it (docs/checking-manifests.md)", *REPLICAS, "Worker",
        )  # fmt: skip


def processes(document: Document) -> Iterator[Finding]:
    """One process a GPU."""
    way, name_ = (("spec", "trainer"), "numProcPerNode") if document.kind == "TrainJob" else (("spec",), "nprocPerNode")
    count = mapping(document.value, *way).get(name_)
    if count is None or not str(count).isdecimal():
        return
    for container in (container for pod in pods(document) for container in pod.containers() if not container.init):
        for kind in filter(is_gpu, container.limits):
            if amount(container.limits[kind]) not in (None, int(count)):
                wrong = f"{container.limits[kind]} GPUs for {name_} {count}: one process a GPU is needed"
                yield container.works("processes", wrong, "resources", "limits", kind)


def queue_label(document: Document) -> Iterator[Finding]:
    """Kueue reads its labels on the job itself: on a pod template or as an annotation they do nothing."""
    for name_ in (QUEUE, PRIORITY):
        if name_ in mapping(document.value, "metadata", "annotations"):
            wrong = f"{name_} is a label of the job, not an annotation"
            yield document.works("queue-label", wrong, "metadata", "annotations", name_)
        for pod in pods(document):
            for field in ("labels", "annotations") if pod.at else ():
                if name_ in mapping(pod.value, "metadata", field):
                    wrong = f"{name_} belongs to the job's own labels: here Kueue does not see it"
                    yield document.works("queue-label", wrong, *pod.at, "metadata", field, name_)
    labels = mapping(document.value, "metadata", "labels")
    if PRIORITY in labels and QUEUE not in labels:
        yield document.works("queue-label", f"a priority without {QUEUE}", "metadata", "labels", PRIORITY)


def pods_metadata(document: Document) -> Iterator[Finding]:
    """Annotations that are read on pods: on what makes them (KServe hands its own on) and as labels they do nothing."""
    made = pods(document)
    if document.kind in ("Pod", "InferenceService") or not (made or document.kind in TRAINING_KINDS):
        return
    for kind in ("annotations", "labels"):
        for key in map(str, mapping(document.value, "metadata", kind)):
            wrong = f"{key} is an annotation of pods, which no operator takes from here: put it on the pod template"
            if key.startswith(POD_KEYS):
                yield document.works("pods-metadata", wrong, "metadata", kind, key)
            elif kind == "annotations" and is_of_pods(key):
                yield document.advice("pods-metadata", wrong, "metadata", kind, key)
    for pod in made:
        for key in map(str, mapping(pod.value, "metadata", "labels")):
            if key.startswith(POD_KEYS):
                wrong = f"{key} is an annotation, not a label"
                yield document.works("pods-metadata", wrong, *pod.at, "metadata", "labels", key)


OF_TRAININGS = (name, pytorchjob_webhook, pytorchjob_runs, trainjob_webhook, deadlines, operators_pods, processes)
