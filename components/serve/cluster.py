"""The API server, as a deployment needs it: objects applied and taken back, waited for, and their new pods reached.

Objects are applied on the server's side under a field manager of our own, over the version that was looked at, and what
another manager has set is left to it (rollout.py), also what it says in the meantime.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

from kubernetes import client, watch
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from components.serve import rollout
from components.serve.options import Serve
from components.serve.port_forward import forwarded
from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.api import ACCOUNT, SAY_EVERY, call, connect, plain, short, unanswered
from zhllama.kubernetes.model_server import OURS, PORT
from zhllama.kubernetes.pod_state import matter_of
from zhllama.kubernetes.refusals import Asker, wants_room
from zhllama.secret_text import mask

log = logging.getLogger("deploy")

LOOK_EVERY = 10
"""Seconds after which the pods are looked at even if no watch said anything, and a quota is tried again."""
APPLIED_WITHIN = 20
"""Attempts to apply an object that others change at the same time: its status, mostly, which is a moment's matter."""
SERVER_SET = ("managedFields", "resourceVersion", "uid", "generation", "creationTimestamp", "selfLink")


def _plural(kind: str) -> str:
    return f"{kind.lower()}s".replace("ys", "ies")


def name_of(wanted: dict[str, Any]) -> str:
    """`Deployment namespace/name`, for people."""
    return f"{wanted['kind']} {wanted['metadata']['namespace']}/{wanted['metadata']['name']}"


class Cluster:
    def __init__(self) -> None:
        self.namespace = connect()
        self._api = client.ApiClient()
        self._pods = client.CoreV1Api(self._api)
        self._apps = client.AppsV1Api(self._api)

    @contextmanager
    def whole_or_not_at_all(self, objects: Sequence[dict[str, Any]], seconds: float) -> Iterator[None]:
        """Applies all but the last of the objects, runs the block, and takes everything back if that fails. InputError
        for what is not ours, and for a Deployment that another has scaled to nothing: no pod could be tried."""
        before = []
        for wanted in objects:
            found = self._asked("GET", wanted)
            before.append((wanted, found))
            if found is None:
                continue
            labels, name = found["metadata"].get("labels", {}), name_of(wanted)
            if "deletionTimestamp" in found["metadata"]:
                # it takes what is applied, and goes nevertheless
                holders = ", ".join(found["metadata"].get("finalizers", ())) or "nothing that it names"
                raise StorageFault(f"{name} is being deleted ({holders} keeps it); try again when it has gone")
            if not OURS.items() <= labels.items():
                raise InputError(f"{name} is there and is not zhllama's; give another --name")
            if found["kind"] == "Deployment" and found["spec"].get("replicas", 1) < 1:
                by = "".join(f" by {one}" for one in rollout.managers(found, ["spec", "replicas"])[:1])
                raise InputError(
                    f"{name} is scaled to 0{by}: no pod of it could be tried; scale it up first "
                    f"(kubectl scale deployment {found['metadata']['name']} --replicas 1)"
                )
        try:
            for wanted in objects[:-1]:
                self.apply(wanted, seconds)
            yield
        except BaseException as error:
            log.warning("taking the deployment back: %s", mask(str(error) or type(error).__name__))
            self._take_back(before, seconds)
            raise

    def _take_back(self, before: Sequence[tuple[dict[str, Any], dict[str, Any] | None]], seconds: float) -> None:
        """As it was: what was found is applied, the rest deleted. What fails is logged, and the rest is done."""
        for wanted, found in reversed(before):
            try:
                if found is not None:
                    self.apply(as_it_was(found))
                    log.info("%s is as it was", name_of(wanted))
                elif self._asked("DELETE", wanted, {"propagationPolicy": "Background"}) is not None:
                    log.info("%s deleted", name_of(wanted))
            except (ApiException, InputError, StorageFault) as error:
                log.error("%s could not be taken back: %s", name_of(wanted), error)
        if found := before[-1][1]:
            try:
                self.wait(found, seconds)
                log.info("%s answers again as before", name_of(found))
            except (InputError, StorageFault) as error:
                log.error("%s is as it was, but not ready: %s", name_of(found), error)

    def apply(self, wanted: dict[str, Any], seconds: float = 0.0) -> dict[str, Any]:
        """Creates the object, or makes it as it is wanted, but for what is another's; what the server made of it.
        seconds: for how long a quota may have no room for it."""
        until, attempts, said_at = monotonic() + seconds, APPLIED_WITHIN, float("-inf")
        while True:
            try:
                return self._applied(wanted)
            except ApiException as error:
                if error.status == 404 and wanted["kind"] == "PodMonitor":
                    log.warning("this cluster has no PodMonitor: its metrics are not collected by that")
                    return wanted
                now, waits = monotonic(), wants_room(error)
                if waits and now < until:
                    if now - said_at >= SAY_EVERY:
                        said_at = now
                        log.warning("%s waits: %s", name_of(wanted), short(error))
                    sleep(min(LOOK_EVERY, max(0.0, until - now)))
                    continue
                attempts -= 1
                # where it is another than it was a moment ago
                if waits or error.status != 409 or attempts < 1:
                    raise _refused(wanted, error) from error

    def _applied(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """One attempt. ApiException as it is."""
        found = self._asked("GET", wanted)
        autoscaler = ""
        if wanted["kind"] == "Deployment":
            # KServe makes its own from what it is told
            listing = client.AutoscalingV2Api(self._api).list_namespaced_horizontal_pod_autoscaler
            scaling = self._items(listing, namespace=wanted["metadata"]["namespace"])
            autoscaler = next((one["metadata"]["name"] for one in scaling if rollout.targets(one, wanted)), "")
        asked, said = rollout.with_anothers_scale(wanted, found, autoscaler)
        if found is not None:
            version = {"resourceVersion": found["metadata"]["resourceVersion"]}
            asked = asked | {"metadata": asked["metadata"] | version}
        options, told = [("fieldManager", rollout.MANAGER)], [said] if said else []
        try:
            made = self._ask("PATCH", wanted, asked, query_params=options)
        except ApiException as error:
            theirs = rollout.conflicts(error.body)
            if found is None or not theirs:
                raise
            # over the very version that was looked at
            asked, left = rollout.without_others(asked, theirs)
            told += left
            made = self._ask("PATCH", wanted, asked, query_params=[*options, ("force", "true")])
        for line in told:
            log.info("%s: %s", name_of(wanted), line)
        return dict(made)

    def _asked(self, method: str, about: dict[str, Any], body: Any = None) -> dict[str, Any] | None:
        """The answer; None where there is no such object."""
        try:
            return self._ask(method, about, body)
        except ApiException as error:
            if error.status == 404:
                return None
            raise _refused(about, error) from error

    def _ask(self, method: str, about: dict[str, Any], body: Any = None, **more: Any) -> Any:
        """One request about an object, by its path: the client has no methods for server-side apply."""
        name, namespace = about["metadata"]["name"], about["metadata"]["namespace"]
        root = "apis" if "/" in about["apiVersion"] else "api"
        kind = "application/apply-patch+yaml" if method == "PATCH" else "application/json"
        return call(
            plain,
            call=self._api.call_api,
            resource_path=f"/{root}/{about['apiVersion']}/namespaces/{namespace}/{_plural(about['kind'])}/{name}",
            method=method,
            header_params={"Accept": "application/json", "Content-Type": kind},
            body=body,
            auth_settings=["BearerToken"],
            _return_http_data_only=True,
            response_type="object",
            **more,
        )

    def wait(self, applied: dict[str, Any], seconds: float, since: float | None = None) -> rollout.Progress:
        """Until the object's new pods are ready: which, and its address where it says one. At most so many seconds,
        from now or from `since` (of time.monotonic) on. InputError when a pod says that its input is wrong,
        StorageFault when it fails or the time is over."""
        until = (monotonic() if since is None else since) + seconds
        said = set[str]()
        while True:
            seen = self._asked("GET", applied)
            if seen is None:
                raise StorageFault(f"{name_of(applied)} was deleted while it was waited for")
            if seen["kind"] == "Deployment":
                progress = rollout.judge_deployment(seen, self._new_pods(seen))
            else:
                listing = self._apps.list_namespaced_deployment
                deployments = self._items(listing, namespace=seen["metadata"]["namespace"])
                own = rollout.controlled_by(deployments, seen["metadata"]["uid"])
                progress = rollout.judge_inference_service(seen, [(one, self._new_pods(one)) for one in own])
            if (matter := matter_of(progress.reason)) not in said:
                said.add(matter)
                log.info("%s: %s", name_of(applied), progress.reason)
            if progress.pods:
                return progress
            left = until - monotonic()
            if progress.late or left <= 0:
                why = "failed" if progress.late else f"is not ready after {seconds / 60:.0f} minutes"
                raise StorageFault(f"{name_of(applied)} {why}: {progress.reason}")
            self._until_changed(seen, min(left, LOOK_EVERY))

    def _new_pods(self, deployment: dict[str, Any]) -> list[dict[str, Any]]:
        """Those of the Deployment's newest ReplicaSet, ready or not."""
        labels = deployment["spec"]["selector"].get("matchLabels", {})
        where = {
            "namespace": deployment["metadata"]["namespace"],
            "label_selector": ",".join(f"{key}={value}" for key, value in labels.items()),
        }
        newest = rollout.newest_replica_set(deployment, self._items(self._apps.list_namespaced_replica_set, **where))
        if newest is None:
            return []
        return rollout.controlled_by(self._items(self._pods.list_namespaced_pod, **where), newest["metadata"]["uid"])

    def _items(self, listing: Any, **where: str) -> list[dict[str, Any]]:
        try:
            return call(plain, call=listing, **where)["items"]
        except ApiException as error:
            if error.status == 403:
                raise InputError(
                    f"the Kubernetes API server refused: {short(error)}; give this account the Role zhllama-deployer "
                    "of this release"
                ) from error
            raise unanswered(error) from error

    def _until_changed(self, seen: dict[str, Any], seconds: float) -> None:
        """Until the object is another than it was seen, or the time is over."""
        group, _, version = seen["apiVersion"].partition("/")
        try:
            changes = watch.Watch(return_type="object").stream(
                client.CustomObjectsApi(self._api).list_namespaced_custom_object,
                group=group,
                version=version,
                plural=_plural(seen["kind"]),
                namespace=seen["metadata"]["namespace"],
                field_selector=f"metadata.name={seen['metadata']['name']}",
                resource_version=seen["metadata"]["resourceVersion"],
                timeout_seconds=max(1, round(seconds)),
                _request_timeout=(10, seconds + 10),
            )
            next(iter(changes), None)
        except (ApiException, HTTPError, OSError, ValueError) as error:
            # a watch only saves time: the next look tells
            log.debug("watch: %s", error)
            sleep(1)

    def answers(self, pod: dict[str, Any]) -> bool:
        """Whether that very pod is still there, ready, and not about to go."""
        now = self._asked("GET", {**pod, "apiVersion": "v1", "kind": "Pod"})
        return now is not None and now["metadata"]["uid"] == pod["metadata"]["uid"] and rollout.answers(now)

    @contextmanager
    def way_to(self, pod: dict[str, Any]) -> Iterator[str]:
        """Where the pod is reached from here: at its own address in a pod, else through the API server."""
        if ACCOUNT.exists():
            address = pod["status"]["podIP"]
            yield f"http://[{address}]:{PORT}" if ":" in address else f"http://{address}:{PORT}"
        else:
            with forwarded(pod["metadata"]["namespace"], pod["metadata"]["name"], PORT) as address:
                yield address


def as_it_was(found: dict[str, Any]) -> dict[str, Any]:
    """A live object as it can be applied again: without what the server sets."""
    metadata = {name: value for name, value in found["metadata"].items() if name not in SERVER_SET}
    annotations = metadata.get("annotations", {}).items()
    metadata["annotations"] = {k: v for k, v in annotations if not k.startswith("deployment.kubernetes.io/")}
    return {**{name: value for name, value in found.items() if name != "status"}, "metadata": metadata}


_ASKER = Asker("zhllama-deployer", "install KServe, or check --namespace", Serve)


def _refused(wanted: dict[str, Any], error: ApiException) -> Exception:
    if error.status == 409:
        return InputError(f"{name_of(wanted)} was refused: {short(error)}; somebody else is changing it; try again")
    return _ASKER.refusal(name_of(wanted), error)
