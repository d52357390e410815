"""The Pod Security Standards of Kubernetes 1.34, *baseline* and *restricted*, as the server's admission holds them."""

from collections.abc import Iterator

from pipelines.manifests.check.documents import Finding
from pipelines.manifests.check.field import Field

STANDARDS = ("privileged", "baseline", "restricted")
_CAPABILITIES = {
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "SETFCAP",
    "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
}  # fmt: skip
_SYSCTLS = {
    "kernel.shm_rmid_forced",
    *(f"net.ipv4.{name}" for name in (
        "ip_local_port_range", "ip_unprivileged_port_start", "tcp_syncookies", "ping_group_range",
        "ip_local_reserved_ports", "tcp_keepalive_time", "tcp_fin_timeout", "tcp_keepalive_intvl",
        "tcp_keepalive_probes", "tcp_rmem", "tcp_wmem",
    )),
}  # fmt: skip
_SELINUX = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
_APPARMOR = "container.apparmor.security.beta.kubernetes.io/"
_PROFILES = ("RuntimeDefault", "Localhost")
_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")


def pod_security(pod: Field, standard: str) -> Iterator[Finding]:
    """What the standard does not let a pod (or a template: what has metadata and spec) have."""
    if standard == "privileged":
        return
    for place, message in _baseline(pod):
        yield place.wrong(message, standard)
    for place, message in _restricted(pod) if standard == "restricted" else ():
        yield place.wrong(message, standard)


Said = Iterator[tuple[Field, str]]


def _containers(spec: Field) -> list[tuple[Field, Field]]:
    """Each container, and its security context."""
    kinds = ("containers", "initContainers", "ephemeralContainers")
    return [(one, one["securityContext"]) for kind in kinds for one in spec.each(kind)]


def _baseline(pod: Field) -> Said:
    spec = pod["spec"]
    shared = spec["securityContext"]
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec[name].value is True:
            yield spec[name], "is not allowed"
    for volume in spec.each("volumes"):
        if volume["hostPath"]:
            yield volume["hostPath"], "a hostPath is not allowed"
    for sysctl in shared.each("sysctls"):
        if sysctl.text("name") not in _SYSCTLS:
            yield sysctl["name"], f"the sysctl {sysctl.text('name')} is not allowed"
    for key, value in pod["metadata"].mapping("annotations").items():
        if (
            key.startswith(_APPARMOR)
            and value not in ("", "runtime/default")
            and not str(value).startswith("localhost/")
        ):
            yield pod["metadata"]["annotations"][key], f"the profile {value} is not allowed"
    yield from _context(shared)
    for container, own in _containers(spec):
        for port in container.each("ports"):
            if port.number("hostPort"):
                yield port["hostPort"], "a hostPort is not allowed"
        if own["privileged"].value is True:
            yield own["privileged"], "privileged is not allowed"
        if own.text("procMount") not in ("", "Default"):
            yield own["procMount"], "procMount must be Default"
        for one in own["capabilities"]["add"].items():
            if one.value not in _CAPABILITIES:
                yield one, f"the capability {one.value} is not allowed"
        yield from _context(own)
        handlers = [container[name] for name in _PROBES]
        handlers += [container["lifecycle"][name] for name in ("postStart", "preStop")]
        for handler in handlers:
            for kind in ("httpGet", "tcpSocket"):
                if handler[kind].text("host"):
                    yield handler[kind]["host"], "a host of its own is not allowed in a probe or a hook"


def _context(context: Field) -> Said:
    """Of what pods and containers both say."""
    options = context["seLinuxOptions"]
    if options.text("type") not in _SELINUX:
        yield options["type"], f"the type {options.text('type')} is not allowed"
    for name in ("user", "role"):
        if options.text(name):
            yield options[name], f"a {name} is not allowed"
    for name in ("seccompProfile", "appArmorProfile"):
        if context[name].text("type") == "Unconfined":
            yield context[name]["type"], f"{name} Unconfined is not allowed"
    if context["windowsOptions"]["hostProcess"].value is True:
        yield context["windowsOptions"]["hostProcess"], "hostProcess is not allowed"


def _restricted(pod: Field) -> Said:
    spec = pod["spec"]
    shared = spec["securityContext"]
    on_windows = spec["os"].text("name") == "windows"
    for volume in spec.each("volumes"):
        for kind in sorted(volume.names() - {"name", "hostPath"} - _VOLUMES):
            yield volume[kind], f"a volume of kind {kind} is not allowed"
    if shared["runAsNonRoot"].value is False:
        yield shared["runAsNonRoot"], "must be true"
    if shared.number("runAsUser") == 0:
        yield shared["runAsUser"], "runAsUser 0 is root"
    profiled = shared["seccompProfile"].text("type") in _PROFILES
    for container, own in _containers(spec):
        name = f"container {container.text('name')}"
        if own["runAsNonRoot"].value is False:
            yield own["runAsNonRoot"], f"{name}: must be true"
        elif own["runAsNonRoot"].value is None and shared["runAsNonRoot"].value is not True:
            yield own["runAsNonRoot"], f"{name}: must be true, here or for the pod"
        if own.number("runAsUser") == 0:
            yield own["runAsUser"], f"{name}: runAsUser 0 is root"
        for one in own["capabilities"]["add"].items() if not on_windows else ():
            if one.value in _CAPABILITIES - {"NET_BIND_SERVICE"}:
                yield one, f"{name}: the capability {one.value} is not allowed"
        if on_windows:
            continue
        if not own["seccompProfile"].text("type") and not profiled:
            yield own["seccompProfile"], f"{name}: type must be RuntimeDefault, here or for the pod"
        if own["allowPrivilegeEscalation"].value is not False:
            yield own["allowPrivilegeEscalation"], f"{name}: must be false"
        if "ALL" not in own["capabilities"].list("drop"):
            yield own["capabilities"]["drop"], f"{name}: must hold ALL"
