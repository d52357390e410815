"""A model deployed to a cluster, or not at all: applied, waited for, tried through its API, taken back if it fails.

Objects are applied on the server's side under a field manager of our own, so that a second deployment changes what
differs and leaves what others set (an autoscaler's replicas, say). Whatever goes wrong on the way, a cancel too, what
was there before comes back; what was not there is deleted. Old pods answer until new ones do (`--stop-first` apart).
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import monotonic, sleep
from typing import Any

from kubernetes import client, watch
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from components.serve.check import checked
from components.serve.port_forward import forwarded
from components.serve.rollout import Progress, State, is_ready, judge_deployment, judge_inference_service
from components.serve.serve import KEY_VARIABLE, Serve
from components.serve.smoke import try_out
from components.shared import storage
from components.shared.errors import InputError, StorageFault
from components.shared.kubernetes_api import ACCOUNT, call, connect, plain, short, unanswered
from components.shared.log import mask
from components.shared.model_server import OURS, PORT, VERSION_LABEL, VLLM_IMAGE, ModelServer
from components.shared.network_policy import S3Network
from components.shared.placement import mapping, tolerations
from components.shared.training_job import LABEL, label_value

log = logging.getLogger("deploy")

MANAGER = "zhllama"
LOOK_EVERY = 10
"""Seconds after which the pods are looked at even if no watch said anything."""
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


def server_of(config: Serve) -> ModelServer:
    """What `--deploy` is to deploy."""
    return ModelServer(
        name=config.name,
        model=config.model,
        namespace=config.namespace,
        replicas=config.replicas,
        gpus=config.gpus,
        gpu_resource=config.gpu_resource,
        cpu=config.cpu,
        memory=config.memory,
        shared_memory=config.shared_memory,
        ephemeral_storage=config.ephemeral_storage,
        context_length=config.context_length,
        s3_secret="" if config.s3_secret == "none" else config.s3_secret,
        api_key_secret=config.api_key_secret,
        pull_secret=config.pull_secret,
        proxy_secret=config.proxy_secret,
        ca_config_map=config.ca_config_map,
        labels=mapping("--labels", config.labels) | ({f"{LABEL}size": label_value(config.size)} if config.size else {}),
        s3=S3Network.at(os.environ.get("ZHLLAMA_S3_ENDPOINT", "")),
        node_selector=mapping("--node-selector", config.node_selector),
        tolerations=tolerations("--tolerations", config.tolerations),
        start_seconds=config.wait_minutes * 60,
        stop_first=config.stop_first,
        openshift=config.openshift,
        vllm_image=config.vllm_image or VLLM_IMAGE,
    )


def deploy(config: Serve) -> str:
    """Deploys `--model`, and returns the address at which it answered; `--output` gets what was asked and answered.

    InputError for a model that is not fit to be served, a refusal of the cluster, a server that tokenises otherwise;
    StorageFault when it does not answer in time. The cluster is then as it was.
    """
    server = server_of(config)
    api_key = config.api_key()
    if not api_key:
        raise InputError(
            f"serve: --deploy tries the server through its API, with the key that is in the secret "
            f"{config.api_key_secret}; set {KEY_VARIABLE} or --api-key-file to it"
        )
    artifact, encoder = checked(config.model, config.context_length)
    cluster = Cluster()
    server = replace(
        server,
        namespace=server.namespace or cluster.namespace,
        # the manifest, where there is one: the init container then holds it against what is stored
        model=artifact.manifest.reference if artifact.verified else artifact.root,
        model_digest=artifact.digest,
    )
    kserve = config.deploy == "kserve"
    objects = server.objects(kserve)
    with cluster.whole_or_not_at_all(objects, config.wait_minutes * 60):
        applied = cluster.apply(objects[-1])
        found = cluster.wait(applied, server.version, config.wait_minutes * 60)
        inside = found or f"http://{server.name}.{server.namespace}.svc:{PORT}"
        with cluster.reached(config.address, inside, server) as address:
            answered = try_out(address, server.name, api_key, encoder, config.context_length)
    log.info("%s/%s answers at %s", server.namespace, server.name, inside)
    if config.output:
        tried = {"address": inside, "name": server.name, "model": server.model, "answered": answered}
        text = json.dumps(tried, ensure_ascii=False, indent=1)
        storage.write_bytes(storage.normalise(config.output), text.encode())
    if config.reference:
        storage.write_bytes(storage.normalise(config.reference), inside.encode())
    print(f'{inside}/v1 answers as "{server.name}"', flush=True)
    return inside


class Cluster:
    """The API server, as a deployment needs it."""

    def __init__(self) -> None:
        self.namespace = connect()
        self._api = client.ApiClient()
        self._pods = client.CoreV1Api(self._api)

    @contextmanager
    def whole_or_not_at_all(self, objects: Sequence[dict[str, Any]], seconds: float) -> Iterator[None]:
        """Applies all but the last of the objects, runs the block, and takes everything back if that fails."""
        before = [Before(wanted, self._own(wanted)) for wanted in objects]
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
        """Creates the object, or makes it as it is wanted; what the server made of it."""
        try:
            made: dict[str, Any] = self._ask(
                "PATCH", wanted, wanted, query_params=[("fieldManager", MANAGER), ("force", "true")]
            )
        except ApiException as error:
            if error.status == 404 and wanted["kind"] in OPTIONAL:
                log.warning("this cluster has no %s: its metrics are not collected by that", wanted["kind"])
                return wanted
            raise _refused(wanted, error) from error
        return made

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

    def wait(self, applied: dict[str, Any], version: str, seconds: float) -> str:
        """Until the object's new pods are ready; its address where it says one.

        InputError when a pod says that its input is wrong, StorageFault when it fails or the time is over.
        """
        until = monotonic() + seconds
        said = ""
        while True:
            seen = self._read(applied)
            if seen is None:
                raise StorageFault(f"{name_of(applied)} was deleted while it was waited for")
            progress = self._judge(seen, version)
            if progress.reason != said:
                said = progress.reason
                log.info("%s: %s", name_of(applied), said or progress.state.value)
            if progress.state is State.READY:
                return progress.address
            if progress.state is State.WRONG_INPUT:
                raise InputError(progress.reason)
            left = until - monotonic()
            if progress.state is State.FAILED or left <= 0:
                why = "failed" if progress.state is State.FAILED else f"is not ready after {seconds / 60:.0f} minutes"
                raise StorageFault(f"{name_of(applied)} {why}: {progress.reason or 'no pod says why'}")
            self._until_changed(seen, min(left, LOOK_EVERY))

    def _judge(self, seen: dict[str, Any], version: str) -> Progress:
        pods = self._pods_of(seen["metadata"]["namespace"], version)
        if seen["kind"] == "InferenceService":
            return judge_inference_service(seen, pods)
        return judge_deployment(seen, pods)

    def _pods_of(self, namespace: str, version: str) -> list[dict[str, Any]]:
        try:
            selector = f"{VERSION_LABEL}={version}"
            listed = call(plain, call=self._pods.list_namespaced_pod, namespace=namespace, label_selector=selector)
        except ApiException as error:
            raise unanswered(error) from error
        pods: list[dict[str, Any]] = listed["items"]
        return pods

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

    @contextmanager
    def reached(self, given: str, inside: str, server: ModelServer) -> Iterator[str]:
        """Where the server is reached from here: as given, by its name in a pod, else through the API server."""
        if given or ACCOUNT.exists():
            yield given or inside
            return
        ready = [pod for pod in self._pods_of(server.namespace, server.version) if is_ready(pod)]
        if not ready:
            raise StorageFault(f"{server.namespace}/{server.name}: its new pods are gone again")
        with forwarded(server.namespace, ready[0]["metadata"]["name"], PORT) as address:
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
            version = str(_template_of(last.found).get("labels", {}).get(VERSION_LABEL, ""))
            try:
                self.wait(last.wanted, version, seconds)
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


def _template_of(found: dict[str, Any]) -> dict[str, Any]:
    """The metadata of the pods that an object makes."""
    spec = found["spec"]
    return dict(spec["predictor"] if "predictor" in spec else spec.get("template", {}).get("metadata", {}))


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
