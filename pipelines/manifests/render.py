"""Training jobs as manifests for `kubectl apply`, for teams that run no pipeline: from the sizes, through TrainingJob.

A job comes with its NetworkPolicy, without which the base's denial leaves its pods no network. `k8s/pytorchjob/
<size>/<stage>.yaml` are such manifests with example addresses; a test keeps them as this module writes them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from components.launch_training.command import command_line
from pipelines import sizes
from pipelines.configuration import configure
from pipelines.machines import launch_options, training_arguments, training_text
from pipelines.sizes import Size
from zhllama import storage
from zhllama.errors import InputError
from zhllama.kubernetes.job_manifest import job_manifest
from zhllama.kubernetes.names import LABEL
from zhllama.kubernetes.network_policy import S3Network, network_policy
from zhllama.kubernetes.training_job import TrainingJob

FOLDER = Path(__file__).parents[2] / "k8s" / "pytorchjob"
EXAMPLE_STORE = "s3://zhllama/artifacts"
EXAMPLE_MODELS = {"embeddings": "extended", "lora": "stage-1", "sft": "stage-2"}
EXAMPLE_DATASETS = {"embeddings": "text", "lora": "text", "sft": "instructions"}


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
    words = training_arguments(size, stage, addresses, arguments)
    settings: dict[str, str | int] = {f"{stage}_{option}": count for option, count in nodes.items()}
    settings |= {"namespace": namespace, "queue": queue}
    # what a pipeline's namespace may have for all of its pods (k8s/base), a job by itself has to be told
    plain: dict[str, str | int] = {"pull_secret": "", "proxy_secret": "", "ca_config_map": ""}
    told = configure(size.name, defaults=plain | {name: value for name, value in settings.items() if value})
    launch = launch_options(told, stage, training_text(size, stage, arguments), **addresses)
    # nodes: what is put to a job's Master and Workers (k8s/components) has to know whether it has them
    elastic = launch.min_nodes or launch.max_nodes
    labels = {"size": size.name, "stage": stage, "nodes": "elastic" if elastic else str(launch.nodes)}
    labels = {f"{LABEL}{name}": value for name, value in labels.items()}
    return launch.job(name or f"llama-{size.name}-{stage}", command_line(stage, words), labels)


def as_yaml(job: TrainingJob, api: str = "pytorchjob", s3: S3Network | None = None) -> str:
    """The job's manifest and its network policy; `api`: pytorchjob or trainjob."""
    return yaml_of([job_manifest(job, api), network_policy(job, s3)])


def yaml_of(objects: Iterable[Mapping[str, Any]]) -> str:
    """The objects as YAML documents, in their own order of fields, without anchors for what they share."""
    import yaml

    plain = type("Plain", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    return str(yaml.dump_all(objects, Dumper=plain, sort_keys=False, width=120))


def examples() -> dict[str, str]:
    """The manifests below k8s/pytorchjob: `<size>/<stage>.yaml` → text, for every size that trains on GPUs."""
    found = {}
    for size in map(sizes.load, sizes.names()):
        trained = [stage for stage in sizes.STAGES if size.training(stage).gpu]
        if trained:
            found[f"{size.name}/kustomization.yaml"] = kustomization(f"{stage}.yaml" for stage in trained)
        for stage in trained:
            model = f"{EXAMPLE_STORE}/models/{size.name}-{EXAMPLE_MODELS[stage]}"
            dataset = f"{EXAMPLE_STORE}/datasets/{EXAMPLE_DATASETS[stage]}"
            job = training_job(size, stage, model=model, dataset=dataset, store=EXAMPLE_STORE)
            found[f"{size.name}/{stage}.yaml"] = f"{_HEAD.format(size=size.name, stage=stage)}{as_yaml(job)}"
    return found


_HEAD = """\
# Written by `zhllama render all`. With your own addresses:
# zhllama render pytorchjob --size {size} --stage {stage} --model REF --dataset REF --store s3://bucket/prefix
"""


def kustomization(files: Iterable[str]) -> str:
    """A folder of rendered manifests as something that a kustomization can name (k8s/overlays)."""
    listed = "".join(f"  - {name}\n" for name in files)
    return (
        "# Written by `zhllama render all`, for kustomizations that put their own to it (k8s/overlays).\n"
        f"apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n{listed}"
    )


def replace_files(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Makes `<size>/<name>.yaml` below the folder these texts and no others; InputError where it cannot be written."""
    if not folder.parent.is_dir():
        raise InputError(f"{folder.parent}: not there in an installed package; run it from a clone of the repository")
    wanted = {folder / name: text for name, text in texts.items()}
    try:
        for old in folder.glob("*/*.yaml"):
            if old not in wanted:
                old.unlink()
        for path, text in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; run it from a clone that can be written") from error
    return list(wanted)
