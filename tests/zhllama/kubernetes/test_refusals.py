"""A refusal's cause is in the server's words: as a real API server worded them, and as policies of others do."""

import json

import pytest
from kubernetes.client.exceptions import ApiException

from components.launch_training.options import LaunchTraining
from components.serve.options import Serve
from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.api import passes
from zhllama.kubernetes.refusals import Asker, wants_room

JOBS = Asker("zhllama-runner", "install the operator", LaunchTraining, "the job's options")
MODELS = Asker("zhllama-deployer", "install KServe", Serve)
FORBIDDEN = 'pods "p" is forbidden: '


def answer(status: int, words: str) -> ApiException:
    error = ApiException(status)
    error.body = json.dumps({"message": words})
    return error


@pytest.mark.parametrize(
    ("status", "words", "kind", "mend"),
    [
        (403, f"{FORBIDDEN}exceeded quota: team, requested: count/x=1", InputError, "free some of the quota"),
        (403, f"{FORBIDDEN}failed quota: team: must specify limits.memory for: server", InputError, "(--memory)"),
        (403, f"{FORBIDDEN}maximum memory usage per Container is 8Gi, but limit is 16Gi", InputError, "(--memory)"),
        (403, f"{FORBIDDEN}cpu max limit to request ratio per Container is 4", InputError, "(--cpu)"),
        (403, f'{FORBIDDEN}error looking up service account a/b: serviceaccount "b" not found', InputError,
         "(--service-account)"),
        (403, f"{FORBIDDEN}no PriorityClass with name none was found", InputError, "(--priority-class)"),
        (403, f'{FORBIDDEN}violates PodSecurity "restricted:latest": x', InputError, "Pod Security standard"),
        (403, "ValidatingAdmissionPolicy 'a' denied request: every object needs a label team", InputError,
         "mend what it names (--labels)"),
        (422, "x is forbidden: ValidatingAdmissionPolicy 'a' denied request: no", InputError, "; mend what it names"),
        (403, 'admission webhook "v.kyverno" denied the request: image r.example.com/a is not allowed', InputError,
         "(--training-image)"),
        (403, 'admission webhook "gatekeeper" denied the request: missing annotation owner, no toleration',
         InputError, "(--annotations, --tolerations)"),
        (400, 'admission webhook "a" denied the request: resources nvidia.com/gpu', InputError, "(--gpu-resource)"),
        (403, "unable to create new content in namespace x because it is being terminated", StorageFault,
         "give another --namespace, or try again"),
        (403, 'jobs is forbidden: User "system:serviceaccount:a:b" cannot create resource "jobs"', InputError,
         "give this account the Role zhllama-runner"),
        (403, f"{FORBIDDEN}of a rule that nobody knows", InputError, "; mend the job's options"),
        (404, "404 page not found", InputError, "install the operator"),
        (404, 'namespaces "none" not found', InputError, "; check --namespace"),
        (422, "metadata.name: Invalid value: a DNS-1123 label must", InputError, "(--run-id)"),
        (401, "Unauthorized", InputError, "check the account and its Role"),
        (500, "etcdserver: request is too large", InputError, "shorten the job's options"),
        (413, "Request entity too large: limit is 3145728", InputError, "shorten the job's options"),
        (500, "etcdserver: mvcc: database space exceeded", StorageFault, "500 etcdserver"),
        (403, "pod does not tolerate the namespace's taints", InputError, "mend what it names (--tolerations)"),
    ],
)  # fmt: skip
def test_every_cause_is_mended_otherwise(status: int, words: str, kind: type, mend: str) -> None:
    error = JOBS.refusal("job a/b", answer(status, words))
    assert type(error) is kind
    assert words in str(error)
    assert mend in str(error)


def test_a_webhook_that_speaks_of_a_quota_is_not_waited_for() -> None:
    assert wants_room(answer(403, f"{FORBIDDEN}exceeded quota: team, requested: pods=1"))
    assert not wants_room(answer(403, 'admission webhook "a" denied the request: exceeded quota of the team'))


def test_each_command_names_options_of_its_own() -> None:
    denied = answer(403, 'admission webhook "a" denied the request: image, replicas, queue, memory')
    assert str(MODELS.refusal("x", denied)).endswith("; mend what it names (--vllm-image, --memory, --replicas)")
    told = "(--training-image, --queue, --memory, --nodes)"
    assert str(JOBS.refusal("x", denied)).endswith(f"; mend what it names {told}")


def test_the_name_of_a_webhook_is_no_option() -> None:
    denied = answer(403, 'admission webhook "memory.labels.example.com" denied the request: no')
    assert str(JOBS.refusal("x", denied)).endswith("; mend what it names")


def test_what_a_quota_may_have_room_for_later_is_told_from_what_it_never_will() -> None:
    assert wants_room(answer(403, f"{FORBIDDEN}exceeded quota: team, requested: pods=1"))
    assert wants_room(answer(403, f"{FORBIDDEN}status unknown for quota: team, resources: pods"))
    assert not wants_room(answer(403, f"{FORBIDDEN}failed quota: team: must specify limits.memory for: a"))
    assert not wants_room(answer(500, "exceeded quota"))
    assert not wants_room(ValueError("exceeded quota"))


@pytest.mark.parametrize(
    ("status", "words", "again"),
    [
        (500, 'failed calling webhook "a": dial tcp: connection refused', True),
        (500, 'admission webhook "a" denied the request: no', False),
        (500, "etcdserver: request is too large", False),
        (500, "failed to create typed patch object (a/b): .spec.x: field not declared in schema", False),
        (409, 'Operation cannot be fulfilled on resourcequotas "team": the object has been modified', True),
        (409, 'pytorchjobs.kubeflow.org "a" already exists', False),
    ],
)
def test_what_will_be_answered_otherwise_later_is_asked_again(status: int, words: str, again: bool) -> None:
    assert passes(answer(status, words)) is again
