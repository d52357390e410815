"""What a real API server says of a request before it looks at an object: its address, who asks, options, selectors.

The words are those of tests/recordings/responses. What is not served here is answered 501, with why.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


class Refusal(Exception):
    """An answer other than what was asked for."""

    def __init__(self, code: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(code, body)
        self.code, self.body, self.headers = code, body, headers or {}


def status(code: int, reason: str, message: str, **details: Any) -> tuple[int, dict[str, Any]]:
    """A refusal, as an API server words it."""
    body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message}
    with_details = bool(details) or reason in ("MethodNotAllowed", "NotAcceptable")
    return code, body | ({"reason": reason} if reason else {}) | ({"details": details} if with_details else {}) | {
        "code": code
    }


def refused(code: int, reason: str, message: str, **details: Any) -> Refusal:
    return Refusal(*status(code, reason, message, **details))


def not_served(what: str) -> Refusal:
    """What this server cannot do, it says."""
    return refused(501, "NotImplemented", f"the API server of the tests cannot do this: {what}")


def invalid(kind: str, group: str, name: str, *causes: tuple[str, str, str]) -> Refusal:
    """422: reason, field and words of each cause."""
    told = [f"{field}: {message}" for _, field, message in dict.fromkeys(causes)]
    listed = [{"reason": reason, "message": message, "field": field} for reason, field, message in causes]
    details = ({"name": name} if name else {}) | ({"group": group} if group else {}) | {"kind": kind}
    words = told[0] if len(told) == 1 else f"[{', '.join(told)}]"
    title = f"{kind}{group and '.'}{group}"
    return refused(422, "Invalid", f'{title} "{name}" is invalid: {words}', **details, causes=listed)


PLAIN_404 = Refusal(404, "404 page not found\n")
GROUPS: Mapping[str, Mapping[str, str]] = {
    "v1": {
        "pods": "Pod", "events": "Event", "configmaps": "ConfigMap", "secrets": "Secret", "services": "Service",
        "serviceaccounts": "ServiceAccount", "namespaces": "Namespace", "nodes": "Node",
        "persistentvolumeclaims": "PersistentVolumeClaim", "resourcequotas": "ResourceQuota",
        "limitranges": "LimitRange",
    },
    "apps/v1": {"deployments": "Deployment", "replicasets": "ReplicaSet", "statefulsets": "StatefulSet"},
    "batch/v1": {"jobs": "Job", "cronjobs": "CronJob"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "autoscaling/v2": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "rbac.authorization.k8s.io/v1": {"roles": "Role", "rolebindings": "RoleBinding"},
    "authorization.k8s.io/v1": {"selfsubjectaccessreviews": "SelfSubjectAccessReview"},
    "authentication.k8s.io/v1": {"selfsubjectreviews": "SelfSubjectReview"},
    "admissionregistration.k8s.io/v1": {
        "validatingwebhookconfigurations": "ValidatingWebhookConfiguration",
        "validatingadmissionpolicybindings": "ValidatingAdmissionPolicyBinding",
    },
    "apiextensions.k8s.io/v1": {"customresourcedefinitions": "CustomResourceDefinition"},
    "kubeflow.org/v1": {"pytorchjobs": "PyTorchJob"},
    "trainer.kubeflow.org/v1alpha1": {"trainjobs": "TrainJob"},
    "serving.kserve.io/v1beta1": {"inferenceservices": "InferenceService"},
    "argoproj.io/v1alpha1": {"workflows": "Workflow"},
    "monitoring.coreos.com/v1": {"podmonitors": "PodMonitor"},
}  # fmt: skip
CLUSTER_WIDE = (
    "namespaces", "nodes", "customresourcedefinitions", "validatingwebhookconfigurations",
    "validatingadmissionpolicybindings", "selfsubjectaccessreviews", "selfsubjectreviews",
)  # fmt: skip
CUSTOM = ("kubeflow.org", "trainer.kubeflow.org", "serving.kserve.io", "argoproj.io", "monitoring.coreos.com")
"""Groups of custom resources: no strategic merge patch, other details, and a version is needed for a PUT."""


@dataclass(frozen=True)
class Address:
    """`/apis/GROUP/VERSION/namespaces/NAMESPACE/RESOURCE/NAME/SUBRESOURCE`, some of it left out."""

    group: str
    version: str
    namespace: str
    resource: str
    name: str = ""
    sub: str = ""

    @classmethod
    def of(cls, path: str) -> "Address | None":
        """None for what is no resource: `/version`."""
        root, *words = path.strip("/").split("/")
        group = words.pop(0) if root == "apis" and words else ""
        if root not in ("api", "apis") or len(words) < 2:
            return None
        version, *words = words
        if words[0] == "namespaces" and len(words) > 2:
            return cls(group, version, words[1], *words[2:5])
        space = words[1] if words[0] == "namespaces" and len(words) > 1 else ""
        return cls(group, version, space, *words[:3])

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}".lstrip("/")

    @property
    def kind(self) -> str:
        return GROUPS[self.api_version][self.resource]

    @property
    def custom(self) -> bool:
        return self.group in CUSTOM

    @property
    def collection(self) -> str:
        space = "" if self.resource in CLUSTER_WIDE or not self.namespace else f"namespaces/{self.namespace}/"
        return f"/{'apis' if self.group else 'api'}/{self.api_version}/{space}{self.resource}"

    @property
    def path(self) -> str:
        return f"{self.collection}/{self.name}"

    def called(self, name: str) -> "Address":
        return Address(self.group, self.version, self.namespace, self.resource, name)

    @property
    def words(self) -> str:
        """`pytorchjobs.kubeflow.org "llama-lora"`."""
        return f"{self.resource}{self.group and '.'}{self.group}" + (f' "{self.name}"' if self.name else "")

    @property
    def details(self) -> dict[str, str]:
        named = {"name": self.name} if self.name else {}
        return named | ({"group": self.group} if self.group else {}) | {"kind": self.resource}

    def known(self) -> None:
        """Refuses what no server of ours has."""
        if self.resource in GROUPS.get(self.api_version, {}):
            return
        if self.group or self.version != "v1":
            raise PLAIN_404
        code, body = status(404, "NotFound", "the server could not find the requested resource")
        raise Refusal(code, body | {"details": {}})

    def not_found(self) -> Refusal:
        return refused(404, "NotFound", f"{self.words} not found", **self.details)

    def exists(self, goes: bool) -> Refusal:
        going = "object is being deleted: " * goes
        return refused(409, "AlreadyExists", f"{going}{self.words} already exists", **self.details)

    def conflict(self, why: str, as_kind: bool = False) -> Refusal:
        words, details = self.words, self.details
        if as_kind:
            words, details = words.replace(self.resource, self.kind, 1), details | {"kind": self.kind}
        return refused(409, "Conflict", f"Operation cannot be fulfilled on {words}: {why}", **details)

    def stale(self) -> Refusal:
        return self.conflict(
            "the object has been modified; please apply your changes to the latest version and try again"
        )

    def invalid(self, *causes: tuple[str, str, str]) -> Refusal:
        return invalid(self.kind, self.group, self.name, *causes)


# --- who asks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """Who a token is, and what it may: `may(verb, resource, name)`, the resource as `pods/log`."""

    name: str
    may: Callable[[str, str, str], bool] = lambda verb, resource, name: True


ANONYMOUS = Account("system:anonymous", lambda *_: False)
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete", "GET": "get"}


def verb_of(method: str, at: Address, query: Mapping[str, str]) -> str:
    if method == "GET" and not at.name:
        return "watch" if true(query.get("watch")) else "list"
    return "deletecollection" if method == "DELETE" and not at.name else VERBS[method]


def authorized(account: Account, verb: str, at: Address, name: str = "") -> None:
    """403 in the server's words where the account may not."""
    resource = f"{at.resource}{at.sub and '/'}{at.sub}"
    if account.may(verb, resource, at.name or name):
        return
    where = f'in the namespace "{at.namespace}"' if at.namespace else "at the cluster scope"
    raise refused(
        403,
        "Forbidden",
        f'{at.words} is forbidden: User "{account.name}" cannot {verb} resource "{resource}" in API group '
        f'"{at.group}" {where}',
        **at.details,
    )


def impersonation(account: Account, user: str | None) -> None:
    if user is not None:
        authorized(account, "impersonate", Address("", "v1", "", "users", user))
        raise not_served("to act for another user")


# --- options ----------------------------------------------------------------------------------------------------------


def true(value: str | None) -> bool:
    return value in ("true", "True", "1")


def acceptable(accept: str | None) -> None:
    """Objects are told as JSON."""
    known = accept is None or any(kind in accept for kind in ("*/*", "application/json"))
    if accept is None or (known and ";as=" not in accept):
        return
    if any(kind in accept for kind in ("protobuf", "yaml", ";as=")):
        raise not_served(f"to answer as {accept}")
    kinds = ["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"]
    streams = ["application/json;stream=watch", "application/vnd.kubernetes.protobuf;stream=watch"]
    told = f"406: Not Acceptable\n\nAvailable representations: {', '.join(kinds + streams)}"
    raise refused(406, "NotAcceptable", told)


def media_type(method: str, given: str, at: Address) -> None:
    """Whether a body of that type is read."""
    whole = ["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"]
    known = whole
    if method == "PATCH":
        strategic = [] if at.custom else ["application/strategic-merge-patch+json"]
        known = [
            "application/json-patch+json", "application/merge-patch+json", *strategic, "application/apply-patch+yaml",
        ]  # fmt: skip
    if method in ("POST", "PUT", "PATCH") and given not in known:
        told = "the body of the request was in an unknown format - accepted media types include: "
        raise refused(415, "UnsupportedMediaType", told + ", ".join(known))
    if given not in ("", "application/json", "application/merge-patch+json", "application/apply-patch+yaml"):
        raise not_served(f"to read {given}")


def options(method: str, query: Mapping[str, str], patch: str = "") -> None:
    """The options of a change."""
    kind = {"POST": "CreateOptions", "PUT": "UpdateOptions", "PATCH": "PatchOptions", "DELETE": "DeleteOptions"}
    if method not in kind:
        return

    def unsupported(field: str, value: str, known: str) -> Refusal:
        told = f"Unsupported value: {value}: supported values: {known}"
        return invalid(kind[method], "meta.k8s.io", "", ("FieldValueNotSupported", field, told))

    dry, strict = query.get("dryRun", "All"), query.get("fieldValidation", "")
    if dry != "All":
        raise unsupported("dryRun", f'["{dry}"]', '"All"')
    if strict not in ("", "Ignore", "Strict", "Warn"):
        raise unsupported("fieldValidation", f'"{strict}"', '"", "Ignore", "Strict", "Warn"')
    policy = query.get("propagationPolicy", "Background")
    if policy not in ("Foreground", "Background", "Orphan"):
        raise unsupported("propagationPolicy", f'"{policy}"', '"Foreground", "Background", "Orphan", "nil"')
    if patch == "application/apply-patch+yaml" and not query.get("fieldManager"):
        told = "Required value: is required for apply patch"
        raise invalid("PatchOptions", "meta.k8s.io", "", ("FieldValueRequired", "fieldManager", told))


def listing(query: Mapping[str, str], at: Address) -> None:
    """The options of a list or a watch."""
    if not query.get("limit", "0").isdecimal():
        raise refused(400, "BadRequest", f'strconv.ParseInt: parsing "{query["limit"]}": invalid syntax')
    version = query.get("resourceVersion", "")
    if version and not version.isdecimal():
        told = f'resourceVersion: Invalid value: "{version}": strconv.ParseUint: parsing "{version}": invalid syntax'
        watching = true(query.get("watch"))
        raise refused(500, "", told) if watching else refused(400, "BadRequest", f"invalid resource version: {told}")
    if true(query.get("sendInitialEvents")):
        raise not_served("sendInitialEvents, which the recording server's storage could not do")
    if query.get("resourceVersionMatch") and not version:
        told = "Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided"
        raise invalid("ListOptions", "meta.k8s.io", "", ("FieldValueForbidden", "resourceVersionMatch", told))
    list(_requirements(query.get("labelSelector", "")))
    list(_fields(query.get("fieldSelector", ""), at))


# --- selectors --------------------------------------------------------------------------------------------------------

_TERM = re.compile(
    r"\s*(?P<no>!?)\s*(?P<key>[^\s,=!()]+)\s*(?:(?P<op>==|=|!=|\bin\b|\bnotin\b)\s*"
    r"(?:\((?P<set>[^()]*)\)|(?P<value>[^\s,=!()]*)))?\s*(?:,|$)"
)
_FIELDS = {
    "Pod": ("spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName",
            "spec.hostNetwork", "status.phase", "status.podIP", "status.nominatedNodeName"),
    "Event": ("involvedObject.kind", "involvedObject.namespace", "involvedObject.name", "involvedObject.uid",
              "involvedObject.apiVersion", "involvedObject.resourceVersion", "involvedObject.fieldPath", "reason",
              "reportingComponent", "source", "type"),
}  # fmt: skip


def _requirements(text: str) -> Iterator[tuple[str, str, set[str]]]:
    """Key, operator and values of each term."""
    at = 0
    while at < len(text):
        found = _TERM.match(text, at)
        if found is None:
            words = text[at:].split()
            if len(words) == 2:
                told = f"unable to parse requirement: found '{words[1]}', expected: in, notin, =, ==, !=, gt, lt"
                raise refused(400, "BadRequest", told)
            raise not_served(f"the label selector {text!r}")
        values = {
            one.strip() for one in (found["set"] if found["set"] is not None else found["value"] or "").split(",")
        }
        operator = found["op"] or ("absent" if found["no"] else "there")
        yield found["key"], operator, values
        at = found.end()


def _fields(text: str, at: Address) -> Iterator[tuple[str, bool, str]]:
    """Place, whether it is to be the value, and the value."""
    for term in filter(None, text.split(",")):
        place, operator, value = re.split(r"(!=|==|=)", term, maxsplit=1) if "=" in term else (term, "", "")
        if place not in ("metadata.name", "metadata.namespace", *_FIELDS.get(at.kind, ())):
            raise refused(400, "BadRequest", f"field label not supported: {place}")
        yield place, operator != "!=", value


def selected(thing: dict[str, Any], query: Mapping[str, str], at: Address) -> bool:
    """Whether an object is one of those that a request's label and field selectors choose."""
    labels = thing["metadata"].get("labels") or {}
    for key, operator, values in _requirements(query.get("labelSelector", "")):
        holds = {
            "there": key in labels,
            "absent": key not in labels,
            "!=": labels.get(key) not in values,
            "notin": labels.get(key) not in values,
        }.get(operator, key in labels and labels[key] in values)
        if not holds:
            return False
    for place, wanted, value in _fields(query.get("fieldSelector", ""), at):
        found: Any = thing
        for step in place.split("."):
            found = found.get(step, {}) if isinstance(found, dict) else {}
        if (found == value) is not wanted:
            return False
    return True
