"""Runs on Kubeflow Pipelines, through its own client: start one, look at it, follow it, cancel it.

Three ways in: a host (with a token in ZHLLAMA_KFP_TOKEN, or in the file that ZHLLAMA_KFP_TOKEN_FILE names, which is
read again for every call, so that a mounted token may change); inside the cluster the service's own name, with the
pod's projected token where there is one; elsewhere `kubectl port-forward` for as long as the command lasts.

Certificates of a site's own are taken from SSL_CERT_FILE or REQUESTS_CA_BUNDLE, a proxy from the usual variables.

kfp 2.17's own wait_for_run_completion knows no cancelled run and would wait for ever: `follow` is ours.
"""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from components.shared.children import die_with_parent
from components.shared.errors import InputError, StorageFault
from pipelines.ir import read_package
from pipelines.plan import checked_arguments

DONE = "SUCCEEDED"
OVER = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
"""States of a run (or a task) that do not change any more."""
LOOK_EVERY = 10.0
"""Seconds between two looks at a run."""
PATIENCE = 300.0
"""Seconds that `follow` goes on without an answer from the server before it gives up."""
POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")


@dataclass(frozen=True)
class Host:
    """Where Kubeflow Pipelines is: its address, or "" for the cluster's own service, found in its namespace."""

    address: str = ""
    kfp_namespace: str = "kubeflow"


@dataclass(frozen=True)
class Task:
    """A step of a run."""

    name: str
    state: str
    started: datetime | None
    ended: datetime | None
    error: str


@dataclass(frozen=True)
class Run:
    """A run as the server shows it."""

    id: str
    name: str
    state: str
    started: datetime | None
    ended: datetime | None
    error: str
    tasks: tuple[Task, ...]

    @property
    def over(self) -> bool:
        return self.state in OVER


@contextmanager
def connected(host: Host, namespace: str | None = None) -> Iterator["Kubeflow"]:
    """A connection for the time of the block. InputError when nobody answers there."""
    if address := known_address(host):
        yield Kubeflow(address, namespace)
    else:
        with _port_forward(host.kfp_namespace) as address:
            yield Kubeflow(address, namespace)


def known_address(host: Host) -> str:
    """The address that was given, or inside a cluster the service's own; "" where a port has to be forwarded."""
    in_cluster = os.environ.get("KUBERNETES_SERVICE_HOST")
    return host.address or (f"http://ml-pipeline.{host.kfp_namespace}.svc.cluster.local:8888" if in_cluster else "")


@contextmanager
def _port_forward(namespace: str) -> Iterator[str]:
    command = [
        "kubectl",
        "port-forward",
        "--namespace",
        namespace,
        "--address",
        "127.0.0.1",
        "service/ml-pipeline",
        ":8888",
    ]
    try:
        forward = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent
        )
    except FileNotFoundError as error:
        raise InputError("kubectl is not here; give --host, or install kubectl for a port-forward") from error
    try:
        assert forward.stdout is not None
        assert forward.stderr is not None
        said = forward.stdout.readline()
        found = re.search(r"127\.0\.0\.1:(\d+)", said)
        if found is None:
            words = " ".join(forward.stderr.read().split())[:300]
            raise InputError(f"kubectl port-forward to {namespace}/ml-pipeline failed ({words}); give --host")
        yield f"http://127.0.0.1:{found[1]}"
    finally:
        forward.terminate()
        forward.wait()


def _credentials(in_cluster: bool) -> dict[str, Any]:
    """What kfp.Client is given so that it is let in; nothing where nothing is set."""
    from kfp.client import ServiceAccountTokenVolumeCredentials

    if token := os.environ.get("ZHLLAMA_KFP_TOKEN"):
        return {"existing_token": token}
    file = os.environ.get("ZHLLAMA_KFP_TOKEN_FILE", "")
    if file and not Path(file).is_file():
        raise InputError(f"ZHLLAMA_KFP_TOKEN_FILE={file}: no such file; correct or unset it")
    if not file and in_cluster and POD_TOKEN.is_file():
        file = str(POD_TOKEN)
    return {"credentials": ServiceAccountTokenVolumeCredentials(path=file)} if file else {}


def _proxy(address: str) -> str | None:
    """The proxy to that address, by HTTPS_PROXY, HTTP_PROXY and NO_PROXY; never to this machine itself."""
    found = urlsplit(address)
    host = found.hostname or ""
    if host in ("localhost", "127.0.0.1", "::1") or proxy_bypass(host):
        return None
    return getproxies().get(found.scheme)


class _NoAnswer(StorageFault):
    """Nobody answers at the address: at the first call the address is wrong, later the server is away."""


class Kubeflow:
    """Kubeflow Pipelines at an address. Every call: InputError for a refusal, StorageFault when the server fails."""

    def __init__(self, address: str, namespace: str | None) -> None:
        if not address.startswith(("http://", "https://")):
            raise InputError(f"--host {address}: write the whole address, as https://{address}")
        # it tells of each of its own retries; what came of them is said once, by us
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        self.address = address.rstrip("/")
        self._namespace = namespace
        in_cluster = bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
        try:
            with self._answers(), redirect_stdout(sys.stderr), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # it warns of servers older than any it can meet
                import kfp

                self._client = kfp.Client(
                    host=self.address,
                    namespace=namespace or "kubeflow",
                    # its HTTP client reads neither from the environment
                    ssl_ca_cert=os.environ.get("SSL_CERT_FILE") or os.environ.get("REQUESTS_CA_BUNDLE"),
                    proxy=_proxy(self.address),
                    **_credentials(in_cluster),
                )
                # kfp's own first call is swallowed where it fails
                self._client.get_kfp_healthz()
        except _NoAnswer as error:
            raise InputError(str(error)) from error

    # --- starting -----------------------------------------------------------------------------------------------------

    def upload(self, package: Path, name: str) -> tuple[str, str]:
        """(pipeline id, version id) of the package under that name. A version is named after its content, so that the
        same package is uploaded once, and a changed one becomes a new version of the same pipeline."""
        version = hashlib.sha256(package.read_bytes()).hexdigest()[:16]
        with self._answers(), redirect_stdout(sys.stderr):
            # kfp's own get_pipeline_id looks among the pipelines that all share, and would miss a profile's own
            place = {"namespace": self._namespace} if self._namespace else {}
            found = self._client.list_pipelines(filter=_named(name), **place).pipelines
            if found:
                pipeline = str(found[0].pipeline_id)
            else:
                made = self._client.upload_pipeline(str(package), pipeline_name=name, **place)
                pipeline = str(made.pipeline_id)
            there = self._client.list_pipeline_versions(pipeline, filter=_named(version)).pipeline_versions
            if there:
                return pipeline, str(there[0].pipeline_version_id)
            made = self._client.upload_pipeline_version(str(package), version, pipeline_id=pipeline)
            return pipeline, str(made.pipeline_version_id)

    def start(
        self, package: Path, arguments: Mapping[str, str], *, pipeline: str, run_name: str, experiment: str
    ) -> str:
        """Starts a run of a compiled pipeline and returns its id. InputError for parameters that it does not have."""
        checked = checked_arguments(read_package(package), arguments)
        pipeline_id, version = self.upload(package, pipeline)
        with self._answers(), redirect_stdout(sys.stderr):
            place = self._client.create_experiment(experiment, namespace=self._namespace)
            started = self._client.run_pipeline(
                place.experiment_id,
                run_name,
                params={name: checked[name] for name in arguments},
                pipeline_id=pipeline_id,
                version_id=version,
                enable_caching=False,
            )
        return str(started.run_id)

    # --- looking ------------------------------------------------------------------------------------------------------

    def run(self, run_id: str) -> Run:
        with self._answers():
            found = self._client.get_run(run_id)
        tasks = [
            Task(
                str(task.display_name),
                str(task.state or "PENDING"),
                task.start_time,
                task.end_time if str(task.state) in OVER else None,
                _message(task.error),
            )
            for task in (found.run_details.task_details if found.run_details else None) or ()
            # beside every step stand its driver, which only resolves it, and the whole
            if task.display_name and task.display_name != "root" and not str(task.display_name).endswith("-driver")
        ]
        tasks.sort(key=lambda task: (task.started or datetime.max.replace(tzinfo=UTC), task.name))
        return Run(
            str(found.run_id), str(found.display_name), str(found.state or "PENDING"), found.created_at,
            found.finished_at if str(found.state) in OVER else None, _message(found.error), tuple(tasks),
        )  # fmt: skip

    def follow(self, run_id: str, look_every: float = LOOK_EVERY) -> Iterator[Run]:
        """The run each time something in it has changed, until it is over. A server that is away for a while (five
        minutes at most) is waited for."""
        last: Run | None = None
        answered = time.monotonic()
        while True:
            try:
                now = self.run(run_id)
                answered = time.monotonic()
            except StorageFault:
                if time.monotonic() - answered > PATIENCE:
                    raise
            else:
                if now != last:
                    yield now
                last = now
                if now.over:
                    return
            time.sleep(look_every)

    def cancel(self, run_id: str) -> Run:
        """Terminates a run that is not over: its exit handler then deletes its training jobs."""
        found = self.run(run_id)
        if found.over:
            return found
        with self._answers():
            self._client.terminate_run(run_id)
        return self.run(run_id)

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """Turns the client's exceptions into ours."""
        from kfp_server_api.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            answer = f"{self.address}: Kubeflow Pipelines answered {error.status} {error.reason} ({_first(error.body)})"
            if error.status is not None and 400 <= error.status < 500 and error.status != 429:
                raise InputError(f"{answer}; check the address, ZHLLAMA_KFP_TOKEN, --namespace and the run") from error
            raise StorageFault(f"{answer}; try again") from error
        except (HTTPError, OSError) as error:
            raise _NoAnswer(
                f"--host {self.address}: no Kubeflow Pipelines answers there ({error}); check the address"
            ) from error


def _named(name: str) -> str:
    """A filter of the API: what is called so."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _first(body: Any) -> str:
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    return text.strip().splitlines()[0][:200] if text.strip() else "no text"


def _message(error: Any) -> str:
    return " ".join(str(error.message or "").split()) if error is not None else ""


def failures(run: Run) -> Sequence[str]:
    """One line for each step that failed, and for the run itself."""
    lines = [f"{task.name}: {task.error or 'failed; see its log'}" for task in run.tasks if task.state == "FAILED"]
    return lines or ([run.error] if run.error else [])
