"""The run's Workflow, read with the caller's own kubeconfig: steps whose list the API has stopped, and why one failed.

Past 1 MiB Argo stores the nodes compressed (base64 of gzip), or in a database of its own; KFP's API shows neither. A
step's last words are in its node's message, a driver's in its pod's log alone, what a pod waits for in the pod. Nothing
here is repeated or waited for: what cannot be read is said in a line, `Unreadable`.
"""

import base64
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any

from pipelines.kubeflow.runs import DONE, FAILED, NOT_RUN, PENDING, RUNNING, Step, ordered, title, titles_of_component
from zhllama.artifacts.json_file import LARGEST, value_of
from zhllama.errors import InputError
from zhllama.kubernetes.pod_state import pending_reason

Node = Mapping[str, Any]
TIMEOUT = (5.0, 20.0)
"""Seconds to connect, and between two bytes."""
PHASES = {"Succeeded": DONE, "Failed": FAILED, "Error": FAILED, "Running": RUNNING, "Pending": PENDING,
          "Omitted": NOT_RUN, "Skipped": NOT_RUN}  # fmt: skip
RIGHTS = "list workflows.argoproj.io, list pods and get pods/log"
_EXIT = re.compile(r"(?:main: )?Error \(exit code (\d+)\)(?::\s*(.*))?", re.DOTALL)
_VERDICT = re.compile(r"(error|fault|cancelled)\b")
_GLOG = re.compile(r"^[IWEF]\d{4} [\d:.]+\s+\d+ [\w.\-]+:\d+\] ")


class Unreadable(Exception):
    """The Workflow cannot be read. The text: why, and what would be needed."""


def last_words(message: str) -> str:
    """A node's message as the step itself put it: `main: Error (exit code 1): error: …` is `error: …`."""
    found = _EXIT.fullmatch(message.strip())
    if found is None:
        return " ".join(message.removeprefix("main: ").split())
    lines = [line.strip() for line in (found[2] or "").splitlines() if line.strip()]
    verdicts = [line for line in lines if _VERDICT.match(line)]
    return (verdicts or lines or [""])[-1]


def last_line(log: str) -> str:
    """The last line of a container's log that is its own; Argo's executor adds lines of `argo=true`."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and "argo=true" not in line]
    return _GLOG.sub("", lines[-1]) if lines else ""


def nodes_of(status: Mapping[str, Any]) -> dict[str, Node]:
    """Node id → node. Unreadable where they are not in the Workflow, or not as Argo writes them."""
    if status.get("offloadNodeStatusVersion"):
        raise Unreadable("its nodes are in Argo's own database (offloaded): ask Argo's server for them")
    if not (packed := status.get("compressedNodes")):
        return dict(status.get("nodes") or {})
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(base64.b64decode(packed, validate=True))) as stream:
            content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"more than {LARGEST:,} bytes")
        found = value_of(content)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise Unreadable(f"its compressed nodes are damaged ({error})") from error
    if not isinstance(found, dict):
        raise Unreadable("its compressed nodes are damaged (no table of nodes)")
    return found


def steps_of(nodes: Mapping[str, Node], titles: Mapping[str, str]) -> list[tuple[Step, Node]]:
    """Each step, and the node of its last pod ({} where it has none)."""
    by_task: dict[str, dict[str, Node]] = {}
    for node in nodes.values():
        template, shown = str(node.get("templateName", "")), str(node.get("displayName", ""))
        if re.search(r"\(\d+\)$", shown):
            continue
        if template.endswith("system-container-executor"):
            by_task.setdefault(shown, {})["step"] = node
        elif template.endswith("system-container-driver"):
            by_task.setdefault(shown.removesuffix("-driver"), {})["driver"] = node
    return [_step(task, of, nodes.values(), titles) for task, of in by_task.items()]


def _step(task: str, of: Mapping[str, Node], nodes: Iterable[Node], titles: Mapping[str, str]) -> tuple[Step, Node]:
    began = _phase(of.get("driver", {}))
    if "driver" in of and ("step" not in of or began == FAILED):
        shown = of["driver"]
        pod = _last_pod(nodes, str(shown["name"]), r"(\(\d+\))?")
        state = began if began in (FAILED, NOT_RUN) else PENDING
    else:
        shown = of["step"]
        pod = _last_pod(nodes, str(shown["name"]), r"(\(\d+\))?\.executor(\(\d+\))?")
        state = PENDING if _phase(shown) == RUNNING and _phase(pod or shown) == PENDING else _phase(shown)
    message = str(pod.get("message") or "")
    said = ""
    if state == FAILED:
        said = last_words(message or str(shown.get("message") or ""))
    elif state == PENDING and ": " in message:
        said = " ".join(message.split())
    started = _time(shown.get("startedAt")) if state != NOT_RUN else None
    ended = _time(shown.get("finishedAt")) if state in (DONE, FAILED) else None
    return Step(task, title(task, titles), state, started, ended, said), pod


def _phase(node: Node) -> str:
    return PHASES.get(str(node.get("phase", "")), PENDING)


def _time(text: Any) -> datetime | None:
    return datetime.fromisoformat(text) if isinstance(text, str) and text else None


def _last_pod(nodes: Iterable[Node], name: str, rest: str) -> Node:
    wanted = re.compile(re.escape(name) + rest)
    pods = [node for node in nodes if node.get("type") == "Pod" and wanted.fullmatch(str(node.get("name", "")))]
    return max(pods, key=lambda node: str(node.get("startedAt") or ""), default={})


class Workflows:
    """The Workflows of a namespace, with the rights of whoever asks."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._connected = False

    def of(self, run_id: str, titles: Mapping[str, str]) -> tuple[tuple[Step, ...], str]:
        """The run's steps, with the words of what failed and of what waits, and the Workflow's own of a failure."""
        found = self._asked(
            "list_namespaced_custom_object", group="argoproj.io", version="v1alpha1", plural="workflows",
            label_selector=f"pipeline/runid={run_id}",
        ).get("items")  # fmt: skip
        if not found:
            raise Unreadable(
                f"the current kubeconfig's cluster has no Workflow of it in the namespace {self.namespace} (it "
                "goes some time after its run; or set KUBECONFIG, --kfp-namespace or --namespace)"
            )
        workflow = found[0]
        name, status = str(workflow["metadata"]["name"]), workflow.get("status") or {}
        titles = {**_titles(workflow), **titles}
        steps = [self._told(name, step, pod) for step, pod in steps_of(nodes_of(status), titles)]
        said = " ".join(str(status.get("message") or "").split()) if status.get("phase") in ("Failed", "Error") else ""
        return tuple(ordered(steps)), said

    def _told(self, workflow: str, step: Step, node: Node) -> Step:
        """With the words that stand in no node: in the log of a pod that failed, in the state of one that waits."""
        if step.said or step.state not in (FAILED, PENDING) or not node:
            return step
        try:
            found = self._asked("list_namespaced_pod", label_selector=f"workflows.argoproj.io/workflow={workflow}")
            pods = [pod for pod in found.get("items") or () if _node_of(pod) == node.get("id")]
            if not pods:
                raise Unreadable("its pod, whose log would say it, is gone")
            if step.state == FAILED:
                name = pods[0]["metadata"]["name"]
                said = last_line(self._asked("read_namespaced_pod_log", name=name, container="main", tail_lines=60))
            else:
                said = " ".join(pending_reason(pods[0]).split())
        except Unreadable as error:
            said = f"why it failed is not known: {error}" if step.state == FAILED else ""
        code = _EXIT.fullmatch(str(node.get("message") or "").strip())
        return replace(step, said=said or (f"exit code {code[1]}" if code else ""))

    def _asked(self, call: str, **options: Any) -> Any:
        """What the API answered: a log as text, all else as it is in JSON."""
        from kubernetes import client
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        from zhllama.kubernetes.api import connect, short

        try:
            if not self._connected:
                connect()
                self._connected = True
            api: Any = client.CustomObjectsApi() if "custom" in call else client.CoreV1Api()
            ask = getattr(api, call)
            answer = ask(namespace=self.namespace, _request_timeout=TIMEOUT, _preload_content=False, **options)
            return answer.data.decode(errors="replace") if call.endswith("_log") else value_of(answer.data)
        except (InputError, HTTPError, ApiException, OSError, ValueError) as error:
            needed = f"reading it needs {RIGHTS} in the namespace {self.namespace}"
            raise Unreadable(f"{needed} ({short(error)})") from error


def _node_of(pod: Mapping[str, Any]) -> Any:
    return (pod["metadata"].get("annotations") or {}).get("workflows.argoproj.io/node-id")


def _titles(workflow: Mapping[str, Any]) -> dict[str, str]:
    """From the components that the Workflow carries as its arguments."""
    found: dict[str, str] = {}
    for parameter in ((workflow.get("spec") or {}).get("arguments") or {}).get("parameters") or ():
        if str(parameter.get("name", "")).startswith("components-"):
            with suppress(ValueError, AttributeError):
                found |= titles_of_component(value_of(parameter.get("value") or "{}"))
    return found
