"""Training jobs as manifests for `kubectl apply`, for teams that run no pipeline: from the sizes, through TrainingJob.

A job comes with its NetworkPolicy, without which the base's denial leaves its pods no network. `k8s/pytorchjob/
<size>/<stage>.yaml` and `k8s/serving/<size>/{vllm,kserve}.yaml` are such manifests, of jobs and of served models
(serving.py), with example addresses; a test keeps them as this module writes them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from components.launch_training.command import command_line
from pipelines import sizes
from pipelines.configuration import configure
from pipelines.machines import launch_options, training_arguments, training_text
from pipelines.manifests.check.go_yaml import quoted
from pipelines.manifests.serving import model_server
from pipelines.sizes import Size
from zhllama import storage
from zhllama.errors import InputError
from zhllama.kubernetes.job_manifest import job_manifest
from zhllama.kubernetes.names import LABEL
from zhllama.kubernetes.network_policy import S3Network, network_policy
from zhllama.kubernetes.training_job import TrainingJob

FOLDER = Path(__file__).parents[2] / "k8s"
_STORE = "s3://zhllama/artifacts"
_MODELS = {"embeddings": "extended", "lora": "stage-1", "sft": "stage-2"}


def training_job(
    size: Size,
    stage: str,
    *,
    model: str,
    dataset: str,
    store: str,
    adapter: str = "",
    name: str = "",
    namespace: str = "",
    queue: str = "",
    arguments: str = "",
    **nodes: int,
) -> TrainingJob:
    """A stage's training as a job on the size's machines; `nodes`, `min_nodes`, `max_nodes`: other numbers of them."""
    addresses = {"store": store, "model": model, "dataset": dataset, "adapter": adapter}
    for option, address in addresses.items():
        if address and not storage.is_s3(storage.normalise(address)):
            raise InputError(f"--{option} {address}: pods of a cluster reach S3 alone; give an s3:// address")
    settings: dict[str, Any] = {f"{stage}_{option}": count for option, count in nodes.items()}
    settings |= {"namespace": namespace, "queue": queue}
    # what a pipeline's namespace may have for all of its pods (k8s/base), a job by itself has to be told
    plain = {"pull_secret": "", "proxy_secret": "", "ca_config_map": ""}
    told = configure(size.name, defaults=plain | {name: value for name, value in settings.items() if value})
    words = training_arguments(size, stage, addresses, arguments, told.values)
    launch = launch_options(told, stage, training_text(size, stage, arguments, told.values), **addresses)
    # nodes: what is put to a job's Master and Workers (k8s/components) has to know whether it has them
    of_nodes = "elastic" if launch.min_nodes or launch.max_nodes else str(launch.nodes)
    labels = {f"{LABEL}size": size.name, f"{LABEL}stage": stage, f"{LABEL}nodes": of_nodes}
    return launch.job(name or f"{size.served_as}-{stage}", command_line(stage, words), labels)


def as_yaml(job: TrainingJob, api: str = "pytorchjob", s3: S3Network | None = None) -> str:
    """The job's manifest and its network policy; `api`: pytorchjob or trainjob."""
    return yaml_of([job_manifest(job, api), network_policy(job, s3)])


def yaml_of(objects: Iterable[Mapping[str, Any]]) -> str:
    """The objects as YAML documents, in their own order of fields, without anchors for what they share; a text of
    several lines stands as such."""
    import yaml

    def lines(dumper: Any, text: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if text.count("\n") > 1 else None)

    plain: Any = type("Plain", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    plain.add_representer(str, lines)
    return quoted(yaml.dump_all(objects, Dumper=plain, sort_keys=False, width=120))


def examples() -> dict[str, str]:
    """Below k8s/: `pytorchjob/<size>/<stage>.yaml` → text, for every size that trains on GPUs, and
    `serving/<size>/<kind>.yaml`, for every size that is served on them."""
    jobs, servers = {}, {}
    for size in map(sizes.load, sizes.names()):
        kept = size.tokenizer == "keep"
        stages = [stage for stage in sizes.STAGES if not kept or stage != "embeddings"]
        trained = [stage for stage in stages if size.training(stage).gpu]
        if trained:
            jobs[f"pytorchjob/{size.name}/kustomization.yaml"] = kustomization(f"{stage}.yaml" for stage in trained)
        for stage in trained:
            begins = "base" if kept and stage == "lora" else _MODELS[stage]
            model = f"{_STORE}/models/{size.name}-{begins}"
            dataset = f"{_STORE}/datasets/{'instructions' if stage == 'sft' else 'text'}"
            job = training_job(size, stage, model=model, dataset=dataset, store=_STORE)
            head = f"{_HEAD}pytorchjob --size {size.name} --stage {stage} --model REF --dataset REF --store "
            jobs[f"pytorchjob/{size.name}/{stage}.yaml"] = f"{head}s3://bucket/prefix\n{as_yaml(job)}"
        if size.serving.gpu:
            # the two kinds have objects of the same names: one of them at a time
            servers[f"serving/{size.name}/kustomization.yaml"] = kustomization(["vllm.yaml"])
            for kind, more in (("vllm", ""), ("kserve", " --kserve")):
                text = yaml_of(model_server(size).objects(kind == "kserve"))
                head = f"{_HEAD}serving --size {size.name}{more} --model s3://bucket/prefix\n{_SECRETS}"
                servers[f"serving/{size.name}/{kind}.yaml"] = head + text
    return jobs | servers


_HEAD = """\
# Written by `zhllama render all`. With your own addresses:
# zhllama render """
_SECRETS = """\
# It needs the secrets zhllama-s3 (k8s/base/s3-secret.example.yaml) and zhllama-api-key, with the key API_KEY.
"""


def kustomization(files: Iterable[str]) -> str:
    """A folder of rendered manifests as something that a kustomization can name (k8s/overlays)."""
    listed = "".join(f"  - {name}\n" for name in files)
    return (
        "# Written by `zhllama render all`, for kustomizations that put their own to it (k8s/overlays).\n"
        f"apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n{listed}"
    )


def write_examples(folder: Path = FOLDER) -> list[Path]:
    """Writes the examples below the folder, and takes away those that are no more; InputError where it cannot."""
    if not folder.is_dir():
        raise InputError(f"{folder}: not there in an installed package; run it from a clone of the repository")
    wanted = {folder / name: text for name, text in examples().items()}
    try:
        for old in {*folder.glob("pytorchjob/*/*.yaml"), *folder.glob("serving/*/*.yaml")} - wanted.keys():
            old.unlink()
        for path, text in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; run it from a clone that can be written") from error
    return list(wanted)
