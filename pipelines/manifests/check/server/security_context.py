"""Security contexts of pods and containers, as validation takes them: not what a standard allows (pod_security.py)."""

import re
from collections.abc import Iterator, Mapping

from pipelines.manifests.check.documents import Finding
from pipelines.manifests.check.field import Field
from zhllama.kubernetes import formats
from zhllama.kubernetes.formats import MOST, Check, between, given, needed, one_of

_ID = between(0, MOST)
_SYSCTL = re.compile(r"([a-z0-9]([-_a-z0-9]*[a-z0-9])?[./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?")
_APPARMOR = "container.apparmor.security.beta.kubernetes.io/"
_OF_LINUX = {
    "securityContext": {
        "seLinuxOptions", "seccompProfile", "appArmorProfile", "fsGroup", "fsGroupChangePolicy", "sysctls",
        "runAsUser", "runAsGroup", "supplementalGroups", "supplementalGroupsPolicy", "seLinuxChangePolicy",
    },
    "container": {
        "seLinuxOptions", "seccompProfile", "appArmorProfile", "capabilities", "readOnlyRootFilesystem", "privileged",
        "allowPrivilegeEscalation", "procMount", "runAsUser", "runAsGroup",
    },
    "spec": {"hostPID", "hostIPC", "hostUsers", "shareProcessNamespace"},
}  # fmt: skip


def profile(field: Field) -> Iterator[Finding]:
    """Of seccomp or AppArmor."""
    local = field["localhostProfile"]
    if field.text("type") == "Localhost":
        if not field.text("localhostProfile").strip():
            yield local.wrong("is needed with type Localhost")
        elif field.place[-1] == "seccompProfile" and (wrong := formats.relative_path(field.text("localhostProfile"))):
            yield local.wrong(wrong)
    elif local:
        yield local.wrong("is for type Localhost")


def of_container(field: Field) -> Iterator[Finding]:
    """A container's."""
    if field["allowPrivilegeEscalation"].value is False:
        if field["privileged"].value is True:
            yield field["allowPrivilegeEscalation"].wrong("cannot be false for a privileged container")
        if "CAP_SYS_ADMIN" in field["capabilities"].list("add"):
            yield field["allowPrivilegeEscalation"].wrong("cannot be false with the capability CAP_SYS_ADMIN")


def of_pod(field: Field) -> Iterator[Finding]:
    """A pod's."""
    seen = set()
    for one in field.each("sysctls"):
        name = one.text("name")
        if name in seen:
            yield one["name"].wrong("stands there already")
        elif not name or len(name) > 253 or not _SYSCTL.fullmatch(name):
            yield one["name"].wrong(f"{name!r} is no name of a sysctl")
        seen.add(name)


def of_pod_and_host(spec: Field) -> Iterator[Finding]:
    """What the pod's context and its view of the host say of each other."""
    host_users = spec["hostUsers"].value
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if host_users is False and spec[name].value is True:
            yield spec[name].wrong("cannot be true with hostUsers: false")
    if spec["shareProcessNamespace"].value is True and spec["hostPID"].value is True:
        yield spec["shareProcessNamespace"].wrong("cannot be true beside hostPID")
    for container in (*spec.each("initContainers"), *spec.each("containers")):
        context = container["securityContext"]
        if context.text("procMount") == "Unmasked" and host_users is not False:
            yield context["procMount"].wrong("Unmasked needs hostUsers: false")
    for one in spec["securityContext"].each("sysctls"):
        name = one.text("name").replace("/", ".")
        if name.startswith("net.") and spec["hostNetwork"].value is True:
            yield one["name"].wrong("cannot be set with hostNetwork")
        if name.startswith(("kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.")) and spec["hostIPC"].value is True:
            yield one["name"].wrong("cannot be set with hostIPC")
    yield from _windows(spec)


def _windows(spec: Field) -> Iterator[Finding]:
    os = spec["os"].text("name")
    containers = [*spec.each("initContainers"), *spec.each("containers")]
    contexts = [("securityContext", spec["securityContext"]), ("spec", spec)]
    contexts += [("container", container["securityContext"]) for container in containers]
    for kind, context in contexts:
        for name in sorted(context.names() & _OF_LINUX[kind]) if os == "windows" else ():
            if context[name].value is not False or kind != "spec":
                yield context[name].wrong("cannot be set for a pod of Windows")
        if os == "linux" and context["windowsOptions"]:
            yield context["windowsOptions"].wrong("cannot be set for a pod of Linux")
    shared = spec["securityContext"]["windowsOptions"]["hostProcess"].value
    own = [container["securityContext"]["windowsOptions"]["hostProcess"].value for container in containers]
    of_host = [shared is True if one is None else one is True for one in own]
    if any(of_host):
        if not all(of_host):
            yield spec["containers"].wrong("either all containers are hostProcess, or none")
        if spec["hostNetwork"].value is not True:
            yield spec["hostNetwork"].wrong("must be true with hostProcess containers")


def annotations(metadata: Field, spec: Field) -> Iterator[Finding]:
    """The old annotations that did what fields do."""
    names = {one.text("name") for kind in ("initContainers", "containers") for one in spec.each(kind)}
    for key, value in metadata.mapping("annotations").items():
        if not isinstance(value, str):
            continue
        if key.startswith(_APPARMOR):
            if key.removeprefix(_APPARMOR) not in names:
                yield metadata["annotations"][key].wrong("the pod has no container of that name")
            elif value and value not in ("runtime/default", "unconfined") and not value.startswith("localhost/"):
                yield metadata["annotations"][key].wrong(f"{value!r} is no profile of AppArmor")
        elif key == "controller.kubernetes.io/pod-deletion-cost" and not re.fullmatch(r"0|-?[1-9][0-9]{0,9}", value):
            yield metadata["annotations"][key].wrong("must be a whole number")
        elif key.startswith(("seccomp.security.alpha.kubernetes.io/pod", "container.seccomp.security.alpha.")):
            good = value in ("", "runtime/default", "docker/default", "unconfined") or value.startswith("localhost/")
            if not good:
                yield metadata["annotations"][key].wrong(f"{value!r} is no profile of seccomp")


_PROFILE = {"type": needed(one_of("Localhost", "RuntimeDefault", "Unconfined"))}
FIELDS: Mapping[str, Mapping[str, Check]] = {
    "PodSecurityContext": {
        "runAsUser": _ID, "runAsGroup": _ID, "fsGroup": _ID,
        "supplementalGroups": lambda groups: next((f"{one}: {wrong}" for one in groups if (wrong := _ID(one))), ""),
        "fsGroupChangePolicy": given(one_of("Always", "OnRootMismatch")),
        "supplementalGroupsPolicy": given(one_of("Merge", "Strict")),
        "seLinuxChangePolicy": given(one_of("MountOption", "Recursive")),
    },
    "SecurityContext": {
        "runAsUser": _ID, "runAsGroup": _ID, "procMount": given(one_of("Default", "Unmasked")),
    },
    "SeccompProfile": _PROFILE,
    "AppArmorProfile": _PROFILE,
}  # fmt: skip
RULES = {
    "SeccompProfile": [profile],
    "AppArmorProfile": [profile],
    "SecurityContext": [of_container],
    "PodSecurityContext": [of_pod],
}
