"""For a cluster: `zhllama compile`, `env`, `parameters` and `render`."""

import argparse
import dataclasses
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from pipelines.cli import options
from zhllama.errors import InputError
from zhllama.kubernetes.formats import EFFECTS
from zhllama.kubernetes.job_manifest import lost_in_trainjob, pod_environment, trainjob
from zhllama.kubernetes.names import check_value
from zhllama.kubernetes.network_policy import S3Network
from zhllama.kubernetes.pod_settings import PodSettings, pod_settings, required_nodes
from zhllama.kubernetes.training_job import TrainingJob
from zhllama.storage.private import temporary_folder

_SEVERAL = "; may be given several times"
_NETWORK: tuple[options.Row, ...] = (
    ("--s3-port N", f"a port of the S3 server (default: 443, 8333, 9000){_SEVERAL}", []),
    ("--s3-cidr RANGE", f"S3 is in this range of addresses (0.0.0.0/0: anywhere; default: the cluster){_SEVERAL}", []),
    ("--s3-namespace NAME", f"S3 is in this namespace of the cluster alone{_SEVERAL}", []),
    ("--dns-cidr RANGE", f"names may be asked of this range too (default: of the cluster's DNS alone){_SEVERAL}", []),
)


def _pods(whose: str) -> tuple[options.Row, ...]:
    """What a site asks of pods: secrets, certificates, a proxy, labels, where they run, and where S3 is."""
    s3 = "secret with the S3 settings (default: zhllama-s3); none: the account's own identity"
    return (
        ("--s3-secret NAME", s3, "zhllama-s3"),
        ("--pull-secret NAME", "secret for a registry that asks for one"),
        ("--proxy-secret NAME", "secret with HTTPS_PROXY, HTTP_PROXY, NO_PROXY"),
        ("--ca-config-map NAME", "ConfigMap with certificates to trust"),
        ("--label KEY=VALUE", f"a label of {whose} and the pods{_SEVERAL}", []),
        ("--node-selector KEY=VALUE", f"a label that the nodes have to have{_SEVERAL}", []),
        ("--toleration KEY[=VALUE][:EFFECT]", f"a toleration of the pods{_SEVERAL}", []),
        *_NETWORK,
    )


_JOB: tuple[options.Row, ...] = (
    ("--nodes", "default: the size's", 0),
    ("--min-nodes", "elastic: as few nodes as this (not with ZeRO)", 0),
    ("--max-nodes", "elastic: as many nodes as this", 0),
    ("--arguments TEXT", "more options of the training, as one text"),
    ("--api", "whose job (default: pytorchjob)", ("pytorchjob", "trainjob")),
    *options.IMAGES,
)
"""What `_training_job` takes beside size, stage and addresses."""


def add_to(commands: options.Commands) -> None:
    add = options.command(commands, "compile", compile_, "write the pipeline as a YAML file for Kubeflow Pipelines")
    options.take_compilation(add)
    explain = ("--explain", "list the steps that this leads to, and why", False)
    options.take(add, ("-o|--output FILE", None, Path), explain)

    add = options.command(commands, "env", show_environment, "the environment that a node of a training job gets")
    stage = ("--stage", "embeddings, lora or sft (default: lora)", "lora")
    options.take(add, options.size(), stage, ("--node", "the master is 0 (default: 0)", 0), *_JOB)

    note = "the pipeline's parameters, with their defaults at a size"
    options.take(options.command(commands, "parameters", parameters, note), options.size("tiny"))

    render = commands.add_parser("render", help="write manifests for kubectl apply")
    kinds = render.add_subparsers(required=True, metavar="WHAT")
    for kind, called in (("pytorchjob", "a PyTorchJob"), ("trainjob", "a TrainJob")):
        add = options.command(kinds, kind, render_pytorchjob, f"one training as {called}, to standard output")
        options.take(
            add,
            options.size(),
            ("--stage", "embeddings, lora or sft", ...),
            ("--model REF", "reference to the model that is trained", ...),
            ("--dataset|--data REF", "reference to the packed dataset", ...),
            ("--store|--output URI", "where the result is put: s3://bucket/prefix", ...),
            ("--adapter REF", "an adapter to go on from"),
            ("--name", "of the job (default: llama-<size>-<stage>)"),
            ("--namespace", None),
            ("--queue", "Kueue's local queue"),
            ("--priority-class", "Kueue's priority class for the job (with --queue)"),
            ("--grace-seconds N", "from SIGTERM to SIGKILL (default: 300)", int),
            ("--openshift", "pods name no user: OpenShift gives them one", False),
            *_pods("the job"),
            (
                "--annotation KEY=VALUE",
                "an annotation of the job, or of its pods where it is read there; several times",
                [],
            ),
            ("--pod-annotation KEY=VALUE", "an annotation of the pods; may be given several times", []),
            ("--pod-label KEY=VALUE", "a label of the pods alone; may be given several times", []),
            ("--resource NAME=NUMBER", "what each pod asks for beside its GPUs: rdma/hca=1; several times", []),
            ("--env NAME=VALUE", "a variable of the training: NCCL_IB_HCA=mlx5; may be given several times", []),
            ("--node-affinity KEY=VALUE[,VALUE]", "nodes with one of these values alone; several times", []),
            ("--pods JSON", "all of these and more, as the pipeline's setting training_pods (docs/pipeline.md)"),
            *_JOB,
        )
        add.set_defaults(api=kind)
    add = options.command(kinds, "serving", render_serving, "a served model (vLLM), to standard output")
    autoscaled = "pods (default: the size's); autoscaled: left out, for an autoscaler of your own to say"
    options.take(
        add,
        options.size(),
        ("--model REF", "the published model in S3 (default: an example)"),
        ("--kserve", "as KServe's InferenceService", False),
        ("--name", "of the objects, and what requests call the model (default: llama-<size>)"),
        ("--namespace", None),
        ("--api-key-secret NAME", "secret with the API key, under API_KEY"),
        *_pods("the objects"),
        ("--stop-first", "stop old pods first, where no GPUs are to spare", False),
        ("--openshift", "pods name no user: OpenShift gives them one", False),
        ("--istio", "with Istio's sidecar, which is opted out of by default", False),
        ("--replicas N|autoscaled", autoscaled),
    )
    options.take(
        add.add_mutually_exclusive_group(),
        ("--pod-monitor", "with a PodMonitor, where Prometheus' operator collects metrics", False),
        ("--without-pod-monitor", "without one, as it is by default", False),
    )
    options.take(add, *options.IMAGES, ("--vllm-image IMAGE", "vLLM's image, from a registry of your own, say"))
    note = "what runs need in their namespace: accounts, roles, network policies, the reaper"
    options.take(
        options.command(kinds, "base", render_base, note),
        ("--namespace", "its name (default: zhllama)"),
        ("--without-namespace", "for a namespace that others own, as a Kubeflow profile", False),
        (
            "--components NAMES",
            "of admission,deployer,kueue,open-https,open-network,quota,reaper (default: the overlay's)",
            str,
        ),
        *_NETWORK,
        ("--api-cidr RANGE", f"the API server is in this range alone{_SEVERAL}", []),
        *options.IMAGES,
    )
    note = "fresh keys for k8s/dev, where all of it is tried out"
    add = options.command(kinds, "dev-secrets", render_dev_secrets, note)
    options.take(add, ("--namespace", "default: zhllama", "zhllama"))
    options.command(kinds, "all", render_all, "k8s/pytorchjob and k8s/serving again, from pipelines/sizes")


def _training_job(given: argparse.Namespace, **addresses: Any) -> TrainingJob:
    options.use_images(given.registry, given.tag, given.digests)
    from pipelines import sizes
    from pipelines.manifests import render

    more = {name: getattr(given, name) for name in ("arguments", "nodes", "min_nodes", "max_nodes")}
    return render.training_job(sizes.load(given.size), given.stage, **addresses, **more)


def compile_(given: argparse.Namespace) -> None:
    if given.output is None and not given.explain:
        raise InputError("compile: give --output FILE, or --explain to see its steps alone")
    told = options.configured(given)
    from pipelines.adapt_llama import compile_pipeline

    with temporary_folder() as folder:
        made = compile_pipeline(told, given.output or Path(folder, "pipeline.yaml"))
    if given.explain:
        from rich.table import Table
        from rich.text import Text

        table = Table("step", "because", box=None, padding=(0, 2, 0, 0))
        for step, because in made:
            table.add_row(Text(step), Text(because))
        console = options.console()
        console.print(table)
        needed = [setting.name for setting, _, required in told.parameters() if required]
        console.print(f"\nEach run has to be given: {', '.join(needed)}" if needed else "\nNothing has to be given.")
    if given.output:
        print(f"{given.output}: the pipeline at size {given.size}")


def parameters(given: argparse.Namespace) -> None:
    from rich.table import Table
    from rich.text import Text

    from pipelines import sizes
    from pipelines.parameters import shown_default
    from pipelines.settings import SETTINGS

    size = sizes.load(given.size)
    table = Table("setting", "of", "type", "default", "", box=None, padding=(0, 2, 0, 0))
    for group, settings in groupby(SETTINGS.values(), lambda one: one.group):
        table.add_row(Text(f"\n{group}", "bold"))
        for one in settings:
            table.add_row(one.name, *one.described(), Text(shown_default(one, size)), Text(one.note))
    options.console().print(table)


def render_pytorchjob(given: argparse.Namespace) -> None:
    from pipelines.manifests import render

    names = ("model", "dataset", "store", "adapter", "name", "namespace", "queue")
    job = _training_job(given, **{name: getattr(given, name) for name in names})
    job = dataclasses.replace(
        job,
        **_placed(given),
        s3_secret="" if given.s3_secret == "none" else given.s3_secret,
        priority_class=given.priority_class,
        run_as_user=None if given.openshift else job.run_as_user,
        grace_seconds=job.grace_seconds if given.grace_seconds is None else given.grace_seconds,
        # what jobs are found by cannot be overwritten
        labels={**_pairs("label", given.label), **job.labels},
        annotations=_pairs("annotation", given.annotation),
        pods=_pods_of(given),
    )
    print(render.as_yaml(job, given.api, _s3(given)), end="")
    if given.api == "trainjob":
        for lost in lost_in_trainjob(job):
            print(f"not in a TrainJob: {lost}", file=sys.stderr)


def _pods_of(given: argparse.Namespace) -> PodSettings:
    """What else the pods of a job have: --pods, and over it the options for each."""
    said = dataclasses.asdict(pod_settings("--pods", given.pods))
    for option, name in (
        ("pod-annotation", "annotations"), ("pod-label", "labels"), ("resource", "resources"), ("env", "environment")
    ):  # fmt: skip
        own = _pairs(option, getattr(given, option.replace("-", "_")))
        pod_settings(f"--{option}", {name: own})
        said[name] |= own
    if nodes := _pairs("node-affinity", given.node_affinity):
        said["node_affinity"] = required_nodes({key: values.split(",") for key, values in nodes.items()})
        return pod_settings("--node-affinity", said)
    return pod_settings("--pods", said)


def _placed(given: argparse.Namespace) -> dict[str, Any]:
    """What a job and a server take in the same way of `_pods`."""
    return {
        **{name: getattr(given, name) for name in ("pull_secret", "proxy_secret", "ca_config_map")},
        "node_selector": _pairs("node-selector", given.node_selector),
        "tolerations": tuple(map(_toleration, given.toleration)),
    }


def _s3(given: argparse.Namespace) -> S3Network:
    for text in given.s3_port:
        if not text.isdecimal():
            raise InputError(f"--s3-port {text}: a port is a number from 1 to 65535")
    s3 = S3Network(cidrs=tuple(given.s3_cidr), namespaces=tuple(given.s3_namespace), dns=tuple(given.dns_cidr))
    return dataclasses.replace(s3, ports=tuple(map(int, given.s3_port))) if given.s3_port else s3


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    for text in texts:
        if text.find("=") < 1:
            raise InputError(f"--{option} {text}: write KEY=VALUE")
    found = dict(text.split("=", 1) for text in texts)
    if option in _KINDS:
        check_value(_KINDS[option], found, f"--{option}")
    return found


_KINDS = {"label": "labels", "annotation": "annotations", "node-selector": "node_selector"}
"""Of pairs, what they are; what else pods have, `pod_settings` checks."""


def _toleration(text: str) -> dict[str, str]:
    """`gpu` (of any value), `gpu=a100`, `gpu:NoSchedule`, `gpu=a100:NoSchedule`."""
    taint, colon, effect = text.partition(":")
    key, equals, value = taint.partition("=")
    if not key or (colon and effect not in EFFECTS):
        raise InputError(f"--toleration {text}: write KEY, KEY=VALUE or KEY=VALUE:EFFECT; {', '.join(EFFECTS)}")
    found = {"key": key, "operator": "Equal", "value": value} if equals else {"key": key, "operator": "Exists"}
    found |= {"effect": effect} if effect else {}
    check_value("tolerations", (found,), f"--toleration {text}")
    return found


def show_environment(given: argparse.Namespace) -> None:
    where = "s3://bucket/prefix"
    job = _training_job(given, model=f"{where}/model", dataset=f"{where}/dataset", store=where)
    if not 0 <= given.node < job.nodes:
        raise InputError(f"--node {given.node}: the job has nodes 0 to {job.nodes - 1}")
    if given.api == "trainjob":
        trainjob(job)  # InputError for an elastic one
    for name, value in sorted(pod_environment(job, given.node, given.api).items()):
        print(f"{name}={value}")


def render_serving(given: argparse.Namespace) -> None:
    options.use_images(given.registry, given.tag, given.digests)
    from pipelines import sizes
    from pipelines.manifests import serving
    from pipelines.manifests.render import yaml_of
    from zhllama.kubernetes.model_server import CLIENTS_LABEL

    same = ("name", "namespace", "api_key_secret", "vllm_image", "stop_first", "openshift", "istio", "s3_secret")
    more: dict[str, Any] = {**{name: getattr(given, name) for name in same}, **serving.replicas_of(given.replicas)}
    more |= {"labels": _pairs("label", given.label), "s3": _s3(given), **_placed(given)}
    server = serving.model_server(sizes.load(given.size), given.model, **more)
    print(yaml_of(server.objects(given.kserve, given.pod_monitor)), end="")
    print(f"let in are pods and namespaces labelled {CLIENTS_LABEL}=true (docs/serving.md)", file=sys.stderr)


def render_base(given: argparse.Namespace) -> None:
    options.use_images(given.registry, given.tag, given.digests)
    from pipelines.manifests.base import base_objects
    from pipelines.manifests.render import yaml_of

    names = None if given.components is None else [name for name in given.components.split(",") if name]
    objects = base_objects(given.namespace, not given.without_namespace, names, _s3(given), given.api_cidr)
    print(yaml_of(objects), end="")


def render_dev_secrets(given: argparse.Namespace) -> None:
    from pipelines.manifests.base import dev_secrets
    from pipelines.manifests.render import yaml_of

    print(yaml_of(dev_secrets(given.namespace)), end="")


def render_all(given: argparse.Namespace) -> None:
    from pipelines import parameters as pipeline_parameters
    from pipelines.manifests.render import write_examples

    print(*write_examples(), sep="\n")
    print(pipeline_parameters.write_page())
