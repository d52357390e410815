"""All that no schema says, of one object."""

from collections.abc import Iterator

from pipelines.manifests.check import job_rules, pod_rules
from pipelines.manifests.check.documents import Document, Finding
from pipelines.manifests.check.pod_rules import Node
from pipelines.manifests.check.pods import pods

OF_OBJECTS = (
    job_rules.operator, job_rules.deadlines, job_rules.operators_pods, job_rules.processes, job_rules.queue_label,
)  # fmt: skip
OF_PODS = (pod_rules.grace, pod_rules.restricted, pod_rules.token)
OF_CONTAINERS = (
    pod_rules.shared_memory, pod_rules.restricted_container, pod_rules.read_only_root, pod_rules.images,
    pod_rules.plain_secrets, pod_rules.resources,
)  # fmt: skip


def check_rules(document: Document, node: Node) -> Iterator[Finding]:
    for of_object in OF_OBJECTS:
        yield from of_object(document)
    for pod in pods(document):
        for of_pod in OF_PODS:
            yield from of_pod(document, pod)
        yield from pod_rules.fits(document, pod, node)
        for container in pod.containers():
            for of_container in OF_CONTAINERS:
                yield from of_container(document, pod, container)
