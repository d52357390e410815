"""The API server, as a deployment needs it: objects applied and taken back, waited for, and their new pods reached.

Objects are applied on the server's side under a field manager of our own, over the version that was looked at: what
another manager says in the meantime (an autoscaler, how many pods) is seen before anything is applied, not overridden.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from kubernetes import client, watch
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from components.serve.port_forward import forwarded
from components.serve.rollout import (
    Progress,
    Rollout,
    State,
    answers,
    controlled_by,
    judge_deployment,
    judge_inference_service,
    newest_replica_set,
)
from components.serve.scale import MANAGER, check_not_at_zero, left, targets, without_anothers_scale
from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.api import ACCOUNT, call, connect, plain, short, unanswered
from zhllama.kubernetes.model_server import OURS, PORT
from zhllama.stage.log import mask

log = logging.getLogger("deploy")

LOOK_EVERY = 10
"""Seconds after which the pods are looked at even if no watch said anything."""
APPLIED_WITHIN = 20
"""Attempts to apply an object that others change at the same time: its status, mostly, which is a moment's matter."""
SERVER_SET = ("managedFields", "resourceVersion", "uid", "generation", "creationTimestamp", "selfLink")
PLURALS = {
    "Deployment": "deployments",
    "Service": "services",
    "NetworkPolicy": "networkpolicies",
    "PodMonitor": "podmonitors",
    "InferenceService": "inferenceservices",
}
OPTIONAL = ("PodMonitor",)
"""Kinds that a cluster may do without."""


@dataclass(frozen=True)
class Before:
    """An object that is to be applied, and what stood there before (None: nothing)."""

    wanted: dict[str, Any]
    found: dict[str, Any] | None

    @property
    def name(self) -> str:
        return name_of(self.wanted)


def name_of(wanted: dict[str, Any]) -> str:
    """`Deployment namespace/name`, for people."""
    return f"{wanted['kind']} {wanted['metadata']['namespace']}/{wanted['metadata']['name']}"


class Cluster:
    """The API server, as a deployment needs it."""

    def __init__(self) -> None:
        self.namespace = connect()
        self._api = client.ApiClient()
        self._pods = client.CoreV1Api(self._api)
        self._apps = client.AppsV1Api(self._api)

    @contextmanager
    def whole_or_not_at_all(self, objects: Sequence[dict[str, Any]], seconds: float) -> Iterator[None]:
        """Applies all but the last of the objects, runs the block, and takes everything back if that fails."""
        before = [Before(wanted, self._own(wanted)) for wanted in objects]
        check_not_at_zero(before[-1].name, before[-1].found)
        try:
            for one in before[:-1]:
                self.apply(one.wanted)
            yield
        except BaseException as error:
            log.warning("taking the deployment back: %s", mask(str(error) or type(error).__name__))
            self._take_back(before, seconds)
            raise

    def _own(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        found = self._read(wanted)
        labels = (found or {}).get("metadata", {}).get("labels", {})
        if found is not None and any(labels.get(name) != value for name, value in OURS.items()):
            raise InputError(f"{name_of(wanted)} is there and is not zhllama's; give another --name")
        return found

    def apply(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Creates the object, or makes it as it is wanted, but for what of its scale is another's; what the server made
        of it."""
        for attempt in range(1, APPLIED_WITHIN + 1):
            found = self._read(wanted)
            autoscaler = self._autoscaler(wanted)
            asked = without_anothers_scale(wanted, found, autoscaler)
            options = [("fieldManager", MANAGER)]
            if found is not None:
                asked = asked | {
                    "metadata": asked["metadata"] | {"resourceVersion": found["metadata"]["resourceVersion"]}
                }
                options.append(("force", "true"))
            try:
                made: dict[str, Any] = self._ask("PATCH", wanted, asked, query_params=options)
            except ApiException as error:
                if error.status == 409 and attempt < APPLIED_WITHIN:
                    # it is another than it was a moment ago
                    continue
                if error.status == 404 and wanted["kind"] in OPTIONAL:
                    log.warning("this cluster has no %s: its metrics are not collected by that", wanted["kind"])
                    return wanted
                raise _refused(wanted, error) from error
            if said := left(wanted, found, autoscaler):
                log.info("%s: %s", name_of(wanted), said)
            return made
        raise AssertionError("unreachable")

    def _autoscaler(self, wanted: dict[str, Any]) -> str:
        """The name of a HorizontalPodAutoscaler that targets the object; KServe makes its own from what it is told."""
        if wanted["kind"] != "Deployment":
            return ""
        api = client.AutoscalingV2Api(self._api)
        namespace = wanted["metadata"]["namespace"]
        scaling = self._items(api.list_namespaced_horizontal_pod_autoscaler, namespace=namespace)
        return next((one["metadata"]["name"] for one in scaling if targets(one, wanted)), "")

    def _read(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self._ask("GET", wanted)
        except ApiException as error:
            if error.status == 404:
                return None
            raise _refused(wanted, error) from error
        return found

    def _ask(self, method: str, about: dict[str, Any], body: Any = None, **more: Any) -> Any:
        """One request about an object, by its path: the client has no methods for server-side apply."""
        name, namespace = about["metadata"]["name"], about["metadata"]["namespace"]
        version = about["apiVersion"]
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if method == "PATCH":
            headers["Content-Type"] = "application/apply-patch+yaml"
        return call(
            plain,
            call=self._api.call_api,
            resource_path=f"{root}/namespaces/{namespace}/{PLURALS[about['kind']]}/{name}",
            method=method,
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
            _return_http_data_only=True,
            response_type="object",
            **more,
        )

    # --- until it stands ----------------------------------------------------------------------------------------------

    def wait(self, applied: dict[str, Any], seconds: float, since: float | None = None) -> Progress:
        """Until the object's new pods are ready: which, and its address where it says one. At most so many seconds,
        from now or from `since` (of time.monotonic) on.

        InputError when a pod says that its input is wrong, StorageFault when it fails or the time is over.
        """
        until = (monotonic() if since is None else since) + seconds
        said = ""
        while True:
            seen = self._read(applied)
            if seen is None:
                raise StorageFault(f"{name_of(applied)} was deleted while it was waited for")
            progress = self._judge(seen)
            if progress.reason != said:
                said = progress.reason
                log.info("%s: %s", name_of(applied), said or progress.state.value)
            if progress.state is State.READY:
                return progress
            if progress.state is State.WRONG_INPUT:
                raise InputError(progress.reason)
            left_seconds = until - monotonic()
            if progress.state is State.FAILED or left_seconds <= 0:
                late = f"is not ready after {seconds / 60:.0f} minutes"
                why = "failed" if progress.state is State.FAILED else late
                raise StorageFault(f"{name_of(applied)} {why}: {progress.reason or 'no pod says why'}")
            self._until_changed(seen, min(left_seconds, LOOK_EVERY))

    def _judge(self, seen: dict[str, Any]) -> Progress:
        if seen["kind"] == "Deployment":
            return judge_deployment(seen, self._new_pods(seen))
        deployments = self._items(self._apps.list_namespaced_deployment, namespace=seen["metadata"]["namespace"])
        own = controlled_by(deployments, seen["metadata"]["uid"])
        return judge_inference_service(seen, [Rollout(one, self._new_pods(one)) for one in own])

    def _new_pods(self, deployment: dict[str, Any]) -> list[dict[str, Any]]:
        """Those of the Deployment's newest ReplicaSet, ready or not."""
        where = {
            "namespace": deployment["metadata"]["namespace"],
            "label_selector": ",".join(f"{key}={value}" for key, value in _match_labels(deployment).items()),
        }
        newest = newest_replica_set(deployment, self._items(self._apps.list_namespaced_replica_set, **where))
        if newest is None:
            return []
        return controlled_by(self._items(self._pods.list_namespaced_pod, **where), newest["metadata"]["uid"])

    def _items(self, listing: Any, **where: str) -> list[dict[str, Any]]:
        try:
            items: list[dict[str, Any]] = call(plain, call=listing, **where)["items"]
        except ApiException as error:
            if error.status == 403:
                raise InputError(
                    f"the Kubernetes API server refused: {short(error)}; give this account the Role zhllama-deployer "
                    "of this release"
                ) from error
            raise unanswered(error) from error
        return items

    def _until_changed(self, seen: dict[str, Any], seconds: float) -> None:
        """Until the object is another than it was seen, or the time is over."""
        group, _, version = seen["apiVersion"].partition("/")
        try:
            changes = watch.Watch(return_type="object").stream(
                client.CustomObjectsApi(self._api).list_namespaced_custom_object,
                group=group,
                version=version,
                plural=PLURALS[seen["kind"]],
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
        metadata = pod["metadata"]
        try:
            now = call(
                plain, call=self._pods.read_namespaced_pod, name=metadata["name"], namespace=metadata["namespace"]
            )
        except ApiException as error:
            if error.status == 404:
                return False
            raise unanswered(error) from error
        return bool(now["metadata"]["uid"] == metadata["uid"]) and answers(now)

    @contextmanager
    def way_to(self, pod: dict[str, Any]) -> Iterator[str]:
        """Where the pod is reached from here: at its own address in a pod, else through the API server."""
        if ACCOUNT.exists():
            address = pod["status"]["podIP"]
            yield f"http://[{address}]:{PORT}" if ":" in address else f"http://{address}:{PORT}"
            return
        with forwarded(pod["metadata"]["namespace"], pod["metadata"]["name"], PORT) as address:
            yield address

    # --- back ---------------------------------------------------------------------------------------------------------

    def _take_back(self, before: Sequence[Before], seconds: float) -> None:
        """As it was: the objects of before applied, the others deleted. What fails is logged, and the rest is done."""
        for one in reversed(before):
            try:
                if one.found is None:
                    self._delete(one)
                else:
                    self.apply(as_it_was(one.found))
                    log.info("%s is as it was", one.name)
            except (ApiException, InputError, StorageFault) as error:
                log.error("%s could not be taken back: %s", one.name, error)
        last = before[-1]
        if last.found is not None:
            try:
                self.wait(last.wanted, seconds)
                log.info("%s answers again as before", last.name)
            except (InputError, StorageFault) as error:
                log.error("%s is as it was, but not ready: %s", last.name, error)

    def _delete(self, one: Before) -> None:
        try:
            self._ask("DELETE", one.wanted, {"propagationPolicy": "Background"})
            log.info("%s deleted", one.name)
        except ApiException as error:
            if error.status != 404:
                raise _refused(one.wanted, error) from error


def as_it_was(found: dict[str, Any]) -> dict[str, Any]:
    """A live object as it can be applied again: without what the server sets."""
    metadata = {name: value for name, value in found["metadata"].items() if name not in SERVER_SET}
    annotations = metadata.get("annotations", {})
    metadata["annotations"] = {
        name: value for name, value in annotations.items() if not name.startswith("deployment.kubernetes.io/")
    }
    kept = {name: value for name, value in found.items() if name not in ("metadata", "status")}
    return {**kept, "metadata": metadata}


def _match_labels(deployment: dict[str, Any]) -> dict[str, str]:
    return dict(deployment["spec"]["selector"].get("matchLabels", {}))


def _refused(wanted: dict[str, Any], error: ApiException) -> Exception:
    name = name_of(wanted)
    if error.status in (400, 403, 404, 409, 422):
        mend = {
            403: "give this account the Role zhllama-deployer",
            404: "install KServe, or check --namespace",
            409: "it is being changed by somebody else; try again",
        }.get(error.status, "mend the options")
        return InputError(f"{name} was refused: {short(error)}; {mend}")
    return unanswered(error)
