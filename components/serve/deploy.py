"""A model deployed to a cluster, or not at all: applied, waited for, tried through its API, taken back if it fails.

A second deployment changes what differs and leaves what others set (an autoscaler's replicas, say). Whatever goes wrong
on the way, a cancel too, what was there before comes back; what was not there is deleted. Old pods answer until new
ones do (`--stop-first` apart), and it is a new one that is tried.
"""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any

from components.serve.check import checked
from components.serve.cluster import Cluster
from components.serve.options import KEY_VARIABLE, Serve
from components.serve.smoke import reach, try_out
from zhllama import storage
from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.api import ACCOUNT
from zhllama.kubernetes.model_server import CLIENTS_LABEL, PORT, VLLM_IMAGE, ModelServer
from zhllama.kubernetes.names import LABEL, label_value
from zhllama.kubernetes.network_policy import S3Network
from zhllama.kubernetes.pods import mapping, tolerations
from zhllama.secret_text import mask

log = logging.getLogger("deploy")


def server_of(config: Serve) -> ModelServer:
    """What `--deploy` is to deploy: what an option and a field call alike is the same."""
    given = {name: value for name, value in vars(config).items() if name in ModelServer.__dataclass_fields__}
    return ModelServer(
        **given
        | {
            "s3_secret": "" if config.s3_secret == "none" else config.s3_secret,
            "labels": mapping("--labels", config.labels)
            | ({f"{LABEL}size": label_value(config.size)} if config.size else {}),
            "node_selector": mapping("--node-selector", config.node_selector),
            "tolerations": tolerations("--tolerations", config.tolerations),
            "vllm_image": config.vllm_image or VLLM_IMAGE,
        },
        s3=S3Network.at(os.environ.get("ZHLLAMA_S3_ENDPOINT", "")),
        start_seconds=config.wait_minutes * 60,
    )


def deploy(config: Serve) -> str:
    """Deploys `--model`, and returns the address at which it answered; `--output` gets what was asked and answered.
    InputError for a model that is not fit to be served, a refusal of the cluster, a server that tokenises otherwise;
    StorageFault when it does not answer in time. The cluster is then as it was."""
    server = server_of(config)
    api_key = config.api_key()
    if not api_key:
        raise InputError(
            f"serve: --deploy tries the server through its API, with the key that is in the secret "
            f"{config.api_key_secret}; set {KEY_VARIABLE} or --api-key-file to it"
        )
    artifact, encoder, chat = checked(config.model, config.context_length)
    cluster = Cluster()
    server = replace(
        server,
        namespace=server.namespace or cluster.namespace,
        # the manifest, where there is one: the init container then holds it against what is stored
        model=artifact.manifest.reference if artifact.verified else artifact.root,
        model_digest=artifact.digest,
    )
    kserve = config.deploy == "kserve"
    # a cluster that does not know PodMonitors does without, here: objects are applied one by one
    objects = server.objects(kserve, monitored=not kserve)
    with cluster.whole_or_not_at_all(objects, config.wait_minutes * 60):
        applied = cluster.apply(objects[-1], config.wait_minutes * 60)
        ask = partial(
            try_out, name=server.name, api_key=api_key, encoder=encoder, chat=chat, context_length=config.context_length
        )
        inside, answered = _tried(cluster, applied, config, ask)
        inside = inside or f"http://{server.name}.{server.namespace}.svc:{PORT}"
        if ACCOUNT.exists() and not config.address:
            # a pod was asked itself: that its Service leads to it is another thing
            reach(inside, server.name, api_key)
    log.info("%s/%s answers at %s", server.namespace, server.name, inside)
    log.info("its network policy lets in pods and namespaces with the label %s=true, and a run's steps", CLIENTS_LABEL)
    if config.output:
        tried = {"address": inside, "name": server.name, "model": server.model, "answered": answered}
        text = json.dumps(tried, ensure_ascii=False, indent=1)
        storage.write_bytes(storage.normalise(config.output), text.encode())
    if config.reference:
        storage.write_bytes(storage.normalise(config.reference), inside.encode())
    print(f'{inside}/v1 answers as "{server.name}"', flush=True)
    return inside


def _tried(
    cluster: Cluster, applied: dict[str, Any], config: Serve, ask: Callable[..., list[dict[str, str]]]
) -> tuple[str, list[dict[str, str]]]:
    """The address that the deployed object gives itself, and what a new pod of it answered: of another one, where the
    first goes away while it is asked."""
    since = monotonic()
    given_up: set[str] = set()
    while True:
        stands = cluster.wait(applied, config.wait_minutes * 60, since)
        if config.address:
            return stands.address, ask(config.address)
        pod = next((one for one in stands.pods if one["metadata"]["uid"] not in given_up), stands.pods[0])
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        try:
            with cluster.way_to(pod) as address:
                return stands.address, ask(address, there=partial(cluster.answers, pod))
        except (InputError, StorageFault) as error:
            # a pod that came back and fails again is no accident
            if cluster.answers(pod) or uid in given_up:
                raise
            given_up.add(uid)
            log.warning("pod %s went away while it was asked (%s); another one is", name, mask(str(error)))
