"""For a cluster: `zhllama compile`, `env`, `parameters` and `render`."""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cli import options
from zhllama.errors import InputError
from zhllama.kubernetes.job_manifest import lost_in_trainjob, trainjob
from zhllama.kubernetes.node_environment import pod_environment

if TYPE_CHECKING:
    from pipelines.configuration import Configuration
    from pipelines.steps import Why
    from zhllama.kubernetes.network_policy import S3Network
    from zhllama.kubernetes.training_job import TrainingJob


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    add = commands.add_parser("compile", help="write the pipeline as a YAML file for Kubeflow Pipelines")
    options.size_option(add, None)
    options.image_options(add)
    options.pod_options(add)
    options.set_option(add)
    add.add_argument("-o", "--output", type=Path, metavar="FILE")
    add.add_argument("--explain", action="store_true", help="list the steps that this leads to, and why")
    add.set_defaults(command=compile_)

    add = commands.add_parser("env", help="the environment that a node of a training job gets")
    options.size_option(add, None)
    add.add_argument("--stage", default="lora", help="embeddings, lora or sft (default: lora)")
    add.add_argument("--node", type=int, default=0, help="the master is 0 (default: 0)")
    _job_options(add)
    add.set_defaults(command=show_environment)

    add = commands.add_parser("parameters", help="the pipeline's parameters, with their defaults at a size")
    options.size_option(add, "tiny")
    add.set_defaults(command=parameters)

    render = commands.add_parser("render", help="write manifests for kubectl apply")
    kinds = render.add_subparsers(required=True, metavar="WHAT")
    for kind, called in (("pytorchjob", "a PyTorchJob"), ("trainjob", "a TrainJob")):
        add = kinds.add_parser(kind, help=f"one training as {called}, to standard output")
        _render_job_options(add)
        add.set_defaults(command=render_pytorchjob, api=kind)
    add = kinds.add_parser("serving", help="a served model (vLLM), to standard output")
    options.size_option(add, None)
    add.add_argument("--model", default="", metavar="REF", help="the published model in S3 (default: an example)")
    add.add_argument("--kserve", action="store_true", help="as KServe's InferenceService")
    add.add_argument(
        "--name", default="", help="of the objects, and what requests call the model (default: llama-<size>)"
    )
    add.add_argument("--namespace", default="")
    add.add_argument("--api-key-secret", default="", metavar="NAME", help="secret with the API key, under API_KEY")
    _pod_options(add, "the objects")
    add.add_argument("--stop-first", action="store_true", help="stop old pods first, where no GPUs are to spare")
    add.add_argument("--openshift", action="store_true", help="pods name no user: OpenShift gives them one")
    add.add_argument(
        "--replicas",
        default="",
        metavar="N|autoscaled",
        help="pods (default: the size's); autoscaled: left out, for an autoscaler of your own to say",
    )
    monitor = add.add_mutually_exclusive_group()
    monitor.add_argument(
        "--pod-monitor", action="store_true", help="with a PodMonitor, where Prometheus' operator collects metrics"
    )
    monitor.add_argument("--without-pod-monitor", action="store_true", help="without one, as it is by default")
    options.image_options(add)
    add.add_argument("--vllm-image", default="", metavar="IMAGE", help="vLLM's image, from a registry of your own, say")
    add.set_defaults(command=render_serving)
    add = kinds.add_parser(
        "base", help="what runs need in their namespace: accounts, roles, network policies, the reaper"
    )
    add.add_argument("--namespace", default="", help="its name (default: zhllama)")
    add.add_argument(
        "--without-namespace", action="store_true", help="for a namespace that others own, as a Kubeflow profile"
    )
    add.add_argument(
        "--components", default=None, metavar="NAMES", help="of deployer,kueue,quota,reaper (default: the overlay's)"
    )
    options.image_options(add)
    add.set_defaults(command=render_base)
    add = kinds.add_parser("dev-secrets", help="fresh keys for k8s/dev, where all of it is tried out")
    add.add_argument("--namespace", default="zhllama", help="default: zhllama")
    add.set_defaults(command=render_dev_secrets)
    add = kinds.add_parser("all", help="k8s/pytorchjob and k8s/serving again, from pipelines/sizes")
    add.set_defaults(command=render_all)


def _render_job_options(add: argparse.ArgumentParser) -> None:
    options.size_option(add, None)
    add.add_argument("--stage", required=True, help="embeddings, lora or sft")
    add.add_argument("--model", required=True, metavar="REF", help="reference to the model that is trained")
    add.add_argument("--dataset", "--data", required=True, metavar="REF", help="reference to the packed dataset")
    add.add_argument(
        "--store", "--output", required=True, metavar="URI", help="where the result is put: s3://bucket/prefix"
    )
    add.add_argument("--adapter", default="", metavar="REF", help="an adapter to go on from")
    add.add_argument("--name", default="", help="of the job (default: llama-<size>-<stage>)")
    add.add_argument("--namespace", default="")
    add.add_argument("--queue", default="", help="Kueue's local queue")
    add.add_argument("--priority-class", default="", help="Kueue's priority class for the job (with --queue)")
    add.add_argument(
        "--grace-seconds", type=int, default=None, metavar="N", help="from SIGTERM to SIGKILL (default: 300)"
    )
    add.add_argument("--openshift", action="store_true", help="pods name no user: OpenShift gives them one")
    _pod_options(add, "the job")
    _repeated(add, ("annotation", "KEY=VALUE", "an annotation of the job"))
    _job_options(add)


def _pod_options(add: argparse.ArgumentParser, whose: str) -> None:
    """What a site asks of pods: secrets, certificates, a proxy, labels, where they run, and where S3 is."""
    add.add_argument(
        "--s3-secret",
        default="zhllama-s3",
        metavar="NAME",
        help="secret with the S3 settings (default: zhllama-s3); none: the account's own identity",
    )
    add.add_argument("--pull-secret", default="", metavar="NAME", help="secret for a registry that asks for one")
    add.add_argument("--proxy-secret", default="", metavar="NAME", help="secret with HTTPS_PROXY, HTTP_PROXY, NO_PROXY")
    add.add_argument("--ca-config-map", default="", metavar="NAME", help="ConfigMap with certificates to trust")
    _repeated(
        add,
        ("label", "KEY=VALUE", f"a label of {whose} and the pods"),
        ("node-selector", "KEY=VALUE", "a label that the nodes have to have"),
        ("toleration", "KEY[=VALUE][:EFFECT]", "a toleration of the pods"),
        ("s3-port", "N", "a port of the S3 server (default: 443, 8333, 9000)"),
        ("s3-cidr", "RANGE", "S3 is in this range of addresses alone"),
        ("s3-namespace", "NAME", "S3 is in this namespace of the cluster alone"),
    )


def _repeated(add: argparse.ArgumentParser, *options: tuple[str, str, str]) -> None:
    for name, metavar, note in options:
        add.add_argument(
            f"--{name}", action="append", default=[], metavar=metavar, help=f"{note}; may be given several times"
        )


def _job_options(add: argparse.ArgumentParser) -> None:
    """What `_training_job` takes beside size, stage and addresses."""
    add.add_argument("--nodes", type=int, default=0, help="default: the size's")
    add.add_argument("--min-nodes", type=int, default=0, help="elastic: as few nodes as this (not with ZeRO)")
    add.add_argument("--max-nodes", type=int, default=0, help="elastic: as many nodes as this")
    add.add_argument("--arguments", default="", metavar="TEXT", help="more options of the training, as one text")
    add.add_argument(
        "--api", choices=("pytorchjob", "trainjob"), default="pytorchjob", help="whose job (default: pytorchjob)"
    )
    options.image_options(add)


def _training_job(given: argparse.Namespace, **addresses: Any) -> "TrainingJob":
    options.use_images(given)
    from pipelines import sizes
    from pipelines.manifests import render

    return render.training_job(
        sizes.load(given.size),
        given.stage,
        **addresses,
        arguments=given.arguments,
        nodes=given.nodes,
        min_nodes=given.min_nodes,
        max_nodes=given.max_nodes,
    )


def compile_(given: argparse.Namespace) -> None:
    if given.output is None and not given.explain:
        raise InputError("compile: give --output FILE, or --explain to see its steps alone")
    told = options.configured(given)
    from pipelines.adapt_llama import compile_pipeline

    with tempfile.TemporaryDirectory(prefix="zhllama-") as folder:
        made = compile_pipeline(told, given.output or Path(folder, "pipeline.yaml"))
    if given.explain:
        _explain(told, made)
    if given.output:
        print(f"{given.output}: the pipeline at size {given.size}")


def _explain(told: "Configuration", made: "list[Why]") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("step", "because", box=None, padding=(0, 2, 0, 0))
    for one in made:
        table.add_row(Text(one.step), Text(one.because))
    console = options.console()
    console.print(table)
    needed = [setting.name for setting, _, required in told.parameters() if required]
    console.print(f"\nEach run has to be given: {', '.join(needed)}" if needed else "\nNothing has to be given.")


def parameters(given: argparse.Namespace) -> None:
    from rich.table import Table
    from rich.text import Text

    from pipelines import sizes
    from pipelines.parameters import shown_default
    from pipelines.settings import SETTINGS

    size = sizes.load(given.size)
    table = Table("setting", "of", "type", "default", "", box=None, padding=(0, 2, 0, 0))
    group = ""
    for one in SETTINGS.values():
        if one.group != group:
            group = one.group
            table.add_row(f"\n[bold]{group}")
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
    )
    print(render.as_yaml(job, given.api, _s3(given)), end="")
    if given.api == "trainjob":
        for lost in lost_in_trainjob(job):
            print(f"not in a TrainJob: {lost}", file=sys.stderr)


def _placed(given: argparse.Namespace) -> dict[str, Any]:
    """What a job and a server take in the same way of `_pod_options`."""
    return {
        "pull_secret": given.pull_secret,
        "proxy_secret": given.proxy_secret,
        "ca_config_map": given.ca_config_map,
        "node_selector": _pairs("node-selector", given.node_selector),
        "tolerations": tuple(map(_toleration, given.toleration)),
    }


def _s3(given: argparse.Namespace) -> "S3Network":
    from zhllama.kubernetes.network_policy import S3Network

    s3 = S3Network(cidrs=tuple(given.s3_cidr), namespaces=tuple(given.s3_namespace))
    return dataclasses.replace(s3, ports=tuple(map(_port, given.s3_port))) if given.s3_port else s3


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise InputError(f"--{option} {text}: write KEY=VALUE")
        found[key] = value
    return found


_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


def _toleration(text: str) -> dict[str, str]:
    """`gpu` (of any value), `gpu=a100`, `gpu:NoSchedule`, `gpu=a100:NoSchedule`."""
    taint, colon, effect = text.partition(":")
    key, equals, value = taint.partition("=")
    if not key or (colon and effect not in _EFFECTS):
        raise InputError(f"--toleration {text}: write KEY, KEY=VALUE or KEY=VALUE:EFFECT; {', '.join(_EFFECTS)}")
    found = {"key": key, "operator": "Equal", "value": value} if equals else {"key": key, "operator": "Exists"}
    return found | ({"effect": effect} if effect else {})


def _port(text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"--s3-port {text}: a port is a number from 1 to 65535")
    return int(text)


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
    options.use_images(given)
    from pipelines import sizes
    from pipelines.manifests import serving

    server = serving.model_server(
        sizes.load(given.size),
        given.model,
        name=given.name,
        labels=_pairs("label", given.label),
        s3=_s3(given),
        **_placed(given),
        namespace=given.namespace,
        api_key_secret=given.api_key_secret,
        vllm_image=given.vllm_image,
        stop_first=given.stop_first,
        openshift=given.openshift,
        s3_secret=given.s3_secret,
        **serving.replicas_of(given.replicas),
    )
    print(serving.as_yaml(server, given.kserve, given.pod_monitor), end="")


def render_base(given: argparse.Namespace) -> None:
    options.use_images(given)
    from pipelines.manifests.base import base_objects
    from pipelines.manifests.render import yaml_of

    names = None if given.components is None else [name for name in given.components.split(",") if name]
    print(yaml_of(base_objects(given.namespace, not given.without_namespace, names)), end="")


def render_dev_secrets(given: argparse.Namespace) -> None:
    from pipelines.manifests.base import dev_secrets
    from pipelines.manifests.render import yaml_of

    print(yaml_of(dev_secrets(given.namespace)), end="")


def render_all(given: argparse.Namespace) -> None:
    from pipelines import parameters as pipeline_parameters
    from pipelines.manifests import render, serving

    for module in (render, serving):
        print(*render.replace_files(module.FOLDER, module.examples()), sep="\n")
    print(pipeline_parameters.write_page())
