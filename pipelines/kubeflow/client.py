"""Runs on Kubeflow Pipelines, through its own client: start one, look at it, follow it, cancel it.

Three ways in: a host (with a token in ZHLLAMA_KFP_TOKEN, or in the file that ZHLLAMA_KFP_TOKEN_FILE names, which is
read again for every call, so that a mounted token may change); inside the cluster the service's own name, with the
pod's projected token where there is one; elsewhere `kubectl port-forward` for as long as the command lasts. kfp 2.17's
own wait_for_run_completion knows no cancelled run and would wait for ever: `follow` is ours.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipelines.kubeflow.answers import Deleted, Gone, NoAnswer, NotThere, Server, beyond_latin1
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.environment import authorities_for, credentials, proxy_to
from pipelines.kubeflow.runs import CANCELING, DONE, FAILED, QUIET, Run, run_of, settled, titles_of, word
from pipelines.kubeflow.workflow import Unreadable, Workflows
from pipelines.local.placeholders import Value
from zhllama.errors import InputError, StorageFault
from zhllama.kubernetes.names import check_namespace
from zhllama.stage.child_processes import die_with_parent

LOOK_EVERY = 10.0
"""Seconds between two looks at a run."""
WORKFLOW_EVERY = 60.0
"""Seconds after which the Workflow is read again where the API shows no change."""
STILL_LOOKS = 60
"""Looks without a change of any step after which `follow` says what would be needed to see more."""
PATIENCE = 300.0
"""Seconds that `follow` goes on without an answer from the server before it gives up."""
STOPS = "the API stops listing steps where a Workflow is past 1 MiB"
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""Where there are profiles, a pod's runs are its own's, unless --namespace says otherwise."""


@contextmanager
def connected(address: str = "", kfp_namespace: str = "kubeflow", namespace: str | None = None) -> Iterator["Kubeflow"]:
    """A connection for the time of the block. InputError when nobody answers there."""
    for option, name in (("--kfp-namespace", kfp_namespace), ("--namespace", namespace)):
        if name:
            check_namespace(option, name)
    known = known_address(address, kfp_namespace)
    with nullcontext(known) if known else _port_forward(kfp_namespace) as reached:
        yield Kubeflow(reached, namespace, kfp_namespace)


def known_address(address: str, kfp_namespace: str) -> str:
    """The address that was given, or inside a cluster the service's own; "" where a port has to be forwarded."""
    in_cluster = os.environ.get("KUBERNETES_SERVICE_HOST")
    return address or (f"http://ml-pipeline.{kfp_namespace}.svc.cluster.local:8888" if in_cluster else "")


@contextmanager
def _port_forward(namespace: str) -> Iterator[str]:
    command = ["kubectl", "port-forward", "--namespace", namespace]
    command += ["--address", "127.0.0.1", "service/ml-pipeline", ":8888"]
    try:
        forward = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent
        )
    except FileNotFoundError as error:
        raise InputError("kubectl is not here; give --host, or install kubectl for a port-forward") from error
    try:
        assert forward.stdout is not None
        assert forward.stderr is not None
        found = re.search(r"127\.0\.0\.1:(\d+)", forward.stdout.readline())
        if found is None:
            words = " ".join(forward.stderr.read().split())[:300]
            raise InputError(f"kubectl port-forward to {namespace}/ml-pipeline failed ({words}); give --host")
        yield f"http://127.0.0.1:{found[1]}"
    finally:
        forward.terminate()
        forward.wait()


class Kubeflow:
    """Kubeflow Pipelines at an address. Every call: InputError for a refusal, StorageFault when the server fails."""

    def __init__(self, address: str, namespace: str | None, kfp_namespace: str = "kubeflow") -> None:
        if not address.startswith(("http://", "https://")):
            raise InputError(f"--host {address}: write the whole address, as https://{address}")
        # as a browser shows it: what is behind # is the page's own
        self.address = address.partition("#")[0].rstrip("/")
        self._namespace = namespace
        self._workflows = Workflows(namespace or kfp_namespace)
        self._titles: dict[str, dict[str, str]] = {}
        self._started: set[str] = set()
        given, whose = credentials()
        proxy = proxy_to(self.address)
        self._server = Server(self.address, whose, namespace, proxy.shown if proxy else "")
        authorities = authorities_for(self.address)
        with self._answers(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it warns of servers older than any it can meet
            import kfp

            class Client(kfp.Client):
                def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
                    # kfp's own asks five times, five seconds apart, with a traceback each; it is asked below
                    return SimpleNamespace(multi_user=None)

            self._client = Client(
                host=self.address,
                namespace=namespace or "kubeflow",
                # its HTTP client reads neither from the environment
                ssl_ca_cert=authorities,
                proxy=proxy.address if proxy else None,
                **given,
            )
            rest = self._client._healthz_api.api_client.rest_client
            if proxy and proxy.headers:
                rest.pool_manager.proxy_headers.update(proxy.headers)
                rest.pool_manager.connection_pool_kw["_proxy_headers"] = proxy.headers
            rest.pool_manager = Connection(rest.pool_manager, self._server)
        try:
            with self._answers():
                healthy = self._client._healthz_api.healthz_service_get_healthz()
        except NoAnswer as error:
            raise InputError(str(error)) from error
        except NotThere:
            if (old := self._old_version()) is None:
                raise
            said = f"what answers there is Kubeflow Pipelines {old}, and its API is older than v2beta1"
            raise InputError(f"--host {self.address}: {said}; version 2 is needed") from None
        if healthy.multi_user is None and healthy.pipeline_store is None:
            self._server.named(healthy, "multi_user")
        if healthy.multi_user and not namespace and POD_NAMESPACE.is_file():
            self._client._context_setting["namespace"] = POD_NAMESPACE.read_text(encoding="utf-8").strip()

    def _old_version(self) -> str | None:
        """The version of a server that answers as Kubeflow Pipelines 1 did; None where none does."""
        try:
            with self._answers():
                asked = self._client._healthz_api.api_client.call_api
                found = asked("/apis/v1beta1/healthz", "GET", response_type="object", auth_settings=["Bearer"])[0]
        except (InputError, StorageFault):
            return None
        known = found.keys() & {"multi_user", "commit_sha", "tag_name"}
        return str(found.get("tag_name") or "1") if known else None

    # --- starting -----------------------------------------------------------------------------------------------------

    def upload(self, package: Path, name: str) -> tuple[str, str]:
        """(pipeline id, version id) of the package under that name. A version is named after its content: the same
        package is uploaded once."""
        # kfp's own get_pipeline_id looks among the pipelines that all share, and would miss a profile's own
        place = {"namespace": self._namespace} if self._namespace else {}
        version = hashlib.sha256(package.read_bytes()).hexdigest()[:16]
        client = self._client

        def make_pipeline() -> Any:
            import kfp_server_api

            wanted = kfp_server_api.V2beta1Pipeline(display_name=name, name=name, **place)
            return client._pipelines_api.pipeline_service_create_pipeline(wanted)

        pipeline = self._there(
            "pipeline_id", name, lambda: client.list_pipelines(filter=_named(name), **place).pipelines, make_pipeline
        )
        try:
            return pipeline, self._there(
                "pipeline_version_id",
                version,
                lambda: client.list_pipeline_versions(pipeline, filter=_named(version)).pipeline_versions,
                # not upload_pipeline, which makes a version of its own, named after the pipeline
                lambda: client.upload_pipeline_version(str(package), version, pipeline_id=pipeline),
            )
        except (InputError, StorageFault) as error:
            if (text := beyond_latin1(package)) and "to create a pipeline version)" in str(error):
                raise InputError(
                    f"{str(error).removesuffix('; try again')}. The server does not say why; the pipeline holds "
                    f"{text!r}, which a database in latin1 refuses: the log of ml-pipeline says so (1366 Incorrect "
                    "string value)"
                ) from error
            raise

    def _there(self, field: str, name: str, find: Callable[[], Any], make: Callable[[], Any]) -> str:
        """The id of what is found, or made now, or was made at the same time by another submit."""

        def found() -> str:
            with self._answers():
                # a server that knows no filters lists all
                those = [one for one in find() or () if one.display_name == name]
                return self._server.named(those[0], field) if those else ""

        if there := found():
            return there
        try:
            with self._answers():
                return self._server.named(make(), field)
        except (InputError, StorageFault):
            if there := found():
                return there
            raise

    def start(
        self, package: Path, arguments: Mapping[str, Value], *, pipeline: str, run_name: str, experiment: str
    ) -> str:
        """Starts a run of a compiled pipeline, with values of its parameters' types, and returns its id."""
        pipeline_id, version = self.upload(package, pipeline)
        with self._answers():
            place = self._client.create_experiment(experiment, namespace=self._namespace)
            started = self._client.run_pipeline(
                self._server.named(place, "experiment_id"),
                run_name,
                params=dict(arguments),
                pipeline_id=pipeline_id,
                version_id=version,
                enable_caching=False,
            )
        run_id = self._server.named(started, "run_id")
        self._started.add(run_id)
        return run_id

    # --- looking ------------------------------------------------------------------------------------------------------

    def run(self, run_id: str) -> Run:
        """The run as the API shows it. Gone where there is none of that id."""
        with self._answers():
            found = self._client.get_run(run_id)
            self._server.named(found, "run_id", run_id)
            return run_of(found, self._titles_of(found))

    def whole(self, run: Run, still: bool = False) -> Run:
        """With steps and last words from the Workflow, where the API's list may lack them, or else a note of why they
        still do. still: whether the list has not changed for several looks."""
        if run.state == DONE and not run.stopped:
            return run
        try:
            steps, said = self._workflows.of(run.id, self._titles.get(run.id, {}))
        except Unreadable as error:
            note = ""
            if run.stopped:
                note = "the steps are not known to the end: the API stopped listing them"
            elif run.state == FAILED:
                note = "why it failed stands in its Workflow"
            elif run.quiet(datetime.now(UTC)):
                note = f"no step is listed as running for {QUIET.seconds // 60} minutes: {STOPS}"
            elif still and not run.over:
                note = f"the steps stand as they did for a while: it is a long one, or {STOPS}"
            return replace(run, note=f"{note}; {error}") if note else run
        return settled(replace(run, steps=steps or run.steps, said=said, stopped=False))

    def _titles_of(self, answer: Any) -> dict[str, str]:
        """Task → name, by the pipeline's specification: the run's own, or its version's. None where that is gone."""
        run_id = str(answer.run_id)
        if run_id not in self._titles:
            spec, version = answer.pipeline_spec, answer.pipeline_version_reference
            if not spec and version is not None and version.pipeline_version_id:
                with suppress(InputError), self._answers():
                    asked = version.pipeline_id, version.pipeline_version_id
                    spec = self._client.get_pipeline_version(*asked).pipeline_spec
            self._titles[run_id] = titles_of(spec)
        return self._titles[run_id]

    def follow(self, run_id: str, look_every: float = LOOK_EVERY) -> Iterator[Run]:
        """The run each time something in it has changed, until it is over. A server that is away for a while (five
        minutes at most) is waited for. The Workflow is read when the API shows a change, else once a minute."""
        last: Run | None = None
        shown: Run | None = None
        answered, read, unchanged = time.monotonic(), 0.0, 0
        while True:
            try:
                now = self.run(run_id)
                known = now.known or time.monotonic() - answered < PATIENCE
                answered = time.monotonic() if now.known else answered
            except Gone:
                if last is None and run_id not in self._started:
                    raise
                raise Deleted(f"the run was deleted ({run_id})") from None
            except StorageFault:
                if time.monotonic() - answered > PATIENCE:
                    raise
            else:
                unchanged = unchanged + 1 if last is not None and now.steps == last.steps else 0
                if now != last or unchanged == STILL_LOOKS or time.monotonic() - read > WORKFLOW_EVERY:
                    whole, read = self.whole(now, unchanged >= STILL_LOOKS), time.monotonic()
                    if whole != shown:
                        yield whole
                    shown = whole
                last = now
                if now.over or not known:
                    return
            time.sleep(look_every)

    def cancel(self, run_id: str) -> Run:
        """Terminates a run that is not over: its exit handler then deletes its training jobs. What it returns is over
        or being cancelled, by the server's own word; StorageFault where that does not say so."""
        found = self.run(run_id)
        if found.over:
            return found
        try:
            with self._answers():
                self._client.terminate_run(run_id)
        except InputError:
            # it may have ended meanwhile
            if (found := self.run(run_id)).over:
                return found
            raise
        found = self.run(run_id)
        if not found.over and found.state != CANCELING:
            said = f"run {run_id}: it was told to end, and is still {word(found.state)}"
            raise StorageFault(f"{said}; look again with zhllama status, and try again")
        return found

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """Turns what the client's classes make of an answer that is not as KFP's into our error, and what it prints
        away from the standard output."""
        from kfp_server_api.exceptions import ApiException, OpenApiException

        try:
            with redirect_stdout(sys.stderr):
                yield
        except (OpenApiException, ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
            said = error.reason if isinstance(error, ApiException) else error
            raise InputError(
                f"--host {self.address}: it does not answer as Kubeflow Pipelines 2 does ({said}); check the address"
            ) from error


def _named(name: str) -> str:
    """A filter of the API: what is called so."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})
