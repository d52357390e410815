"""Starts a run of the pipeline on Kubeflow Pipelines, through its own client."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.shared.errors import InputError, StorageFault
from pipelines.ir import read_package
from pipelines.plan import checked_arguments


def submit_run(
    package: Path,
    arguments: Mapping[str, str],
    *,
    host: str,
    run_name: str,
    namespace: str | None = None,
    experiment: str = "zhllama",
    token: str = "",
) -> str:
    """Starts a run of a compiled pipeline and returns the run's address in the UI.

    InputError for wrong parameters, an unreachable host or a refusal; StorageFault when the server fails.
    """
    host = host.rstrip("/")
    checked = checked_arguments(read_package(package), arguments)
    given = {name: checked[name] for name in arguments}
    return f"{host}/#/runs/details/{_start(host, token, package, given, run_name, experiment, namespace)}"


def _start(
    host: str,
    token: str,
    package: Path,
    arguments: Mapping[str, Any],
    run_name: str,
    experiment: str,
    namespace: str | None,
) -> str:
    import kfp
    from kfp_server_api.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        client = kfp.Client(host=host, existing_token=token or None, namespace=namespace or "kubeflow")
        started = client.create_run_from_pipeline_package(
            str(package),
            arguments=dict(arguments),
            run_name=run_name,
            experiment_name=experiment,
            namespace=namespace,
            enable_caching=False,
        )
    except ApiException as error:
        answer = f"{host}: Kubeflow Pipelines answered {error.status} {error.reason} ({_first_line(error.body)})"
        if error.status is not None and 400 <= error.status < 500:
            raise InputError(f"{answer}; check the address, ZHLLAMA_KFP_TOKEN and --namespace") from error
        raise StorageFault(f"{answer}; try again") from error
    except (HTTPError, OSError) as error:
        raise InputError(f"--host {host}: no Kubeflow Pipelines answers there ({error}); check the address") from error
    return str(started.run_id)


def _first_line(body: Any) -> str:
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    return text.strip().splitlines()[0][:200] if text.strip() else "no text"
