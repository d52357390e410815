"""What an API server's refusal means, by its own words: a 403 has many causes, and few of them are a missing Role.

A quota may be free later; a namespace that goes is nobody's mistake; what a webhook or a policy denies is mended by an
option; only an account that may not is mended by a Role.
"""

import re
from dataclasses import dataclass, fields
from typing import Any

from kubernetes.client.exceptions import ApiException

from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.api import short, unanswered
from zhllama.stage.options import option_of

_OPTIONS = (
    (r"serviceaccount|service account", ("service_account",)),
    (r"imagepullsecret|pull secret", ("pull_secret",)),
    (r"\bsecret \"|\bsecret key\b", ("s3_secret", "api_key_secret")),
    (r"\bconfigmap\b", ("ca_config_map",)),
    (r"\bimages?\b|registry|registries", ("training_image", "vllm_image")),
    (r"(?<!1123 )(?<!1035 )\blabels?\b", ("labels",)),
    (r"\bannotations?\b", ("annotations",)),
    (r"tolerat|\btaint", ("tolerations",)),
    (r"nodeselector|node selector", ("node_selector",)),
    (r"priority", ("priority_class",)),
    (r"\bqueue|localqueue", ("queue",)),
    (r"sizelimit|shared memory|/dev/shm", ("shared_memory",)),
    (r"ephemeral-storage", ("ephemeral_storage",)),
    (r"\bmemory\b", ("memory",)),
    (r"\bcpu\b", ("cpu",)),
    (r"\w\.\w+/[a-z]*gpu\b", ("gpu_resource",)),
    (r"nproc_?per_?node", ("processes_per_node",)),
    (r"\breplicas\b|numnodes|minreplicas|maxreplicas", ("nodes", "replicas")),
    (r"activedeadlineseconds|\bdeadline", ("deadline_seconds",)),
    (r"runasuser|runasgroup|\buids?\b", ("run_as_user", "openshift")),
    (r"terminationgraceperiod", ("grace_seconds",)),
    (r"metadata\.name\b|\bdns[- ]", ("run_id", "name")),
)
"""What a refusal may speak of, and the options that say it: of each command its own."""


def wants_room(error: BaseException) -> bool:
    """Whether a quota of the namespace is used up, or not counted yet: the same request may be granted later."""
    words = ("exceeded quota", "status unknown for quota")
    said = short(error)
    of_quota = isinstance(error, ApiException) and error.status == 403 and " denied " not in said
    return of_quota and any(word in said for word in words)


@dataclass(frozen=True)
class Asker:
    """Who is refused: what its account, its cluster and its options have to do with it."""

    role: str
    """The Role that its account needs."""
    missing: str
    """How a 404 is mended."""
    options: Any
    """A command's dataclass."""
    whose: str = "the options"

    def mend(self, error: ApiException) -> tuple[str, bool]:
        """How the refusal is mended, "" for an answer that is none; and whether by who gave the options."""
        said = short(error)
        if wants_room(error):
            return "free some of the quota, or ask for less", True
        if "being terminated" in said:
            return "give another --namespace, or try again when it is there anew", False
        if " denied " in said:
            return f"mend what it names{named_options(said.partition(' denied ')[2], self.options)}", True
        if "violates PodSecurity" in said:
            return "let the namespace's Pod Security standard allow it", True
        if error.status == 404:
            return "check --namespace" if 'namespaces "' in said else self.missing, True
        # what RBAC refuses "cannot" be done; the rest is a LimitRange's, or speaks of an account, a class
        if error.status in (400, 422) or (error.status == 403 and " is forbidden: " in said and " cannot " not in said):
            return f"mend {self.whose}{named_options(said, self.options)}", True
        if error.status == 413 or "request is too large" in said:
            return f"shorten {self.whose}: texts, labels, annotations", True
        if error.status == 403 and " cannot " not in said and (found := named_options(said, self.options)):
            return f"mend what it names{found}", True
        return (f"give this account the Role {self.role}" if error.status == 403 else ""), True

    def refusal(self, named: str, error: ApiException) -> Exception:
        """What to raise for an answer that will not change; StorageFault where nobody can mend it from here."""
        mend, ours = self.mend(error)
        if not mend:
            return unanswered(error)
        return (InputError if ours else StorageFault)(f"{named} was refused: {short(error)}; {mend}")


def named_options(said: str, options: Any) -> str:
    """` (--labels, --memory)`: the options of a command's dataclass that the words speak of, "" for none."""
    known = {field.name for field in fields(options)}
    spoken = (names for pattern, names in _OPTIONS if re.search(pattern, said, re.IGNORECASE))
    found = [option_of(name) for names in spoken for name in names if name in known]
    return f" ({', '.join(found)})" if found else ""
