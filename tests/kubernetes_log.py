"""What a real API server makes of a request for a pod's log: its options, which container, which lines."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.kubernetes_request import Address, invalid, refused, true


@dataclass
class LogQuery:
    pod: str
    container: str
    previous: bool
    timestamps: bool
    since: str
    """Seconds: what the API server passes on of a time."""
    tail: int | None
    left: int
    """Bytes that may still be told; below 0, any number."""

    @classmethod
    def of(cls, at: Address, query: Mapping[str, str]) -> "LogQuery":
        since = query.get("sinceTime", "")
        if since:
            try:
                datetime.fromisoformat(since)
            except ValueError as error:
                layout = "2006-01-02T15:04:05Z07:00"
                told = f'parsing time "{since}" as "{layout}": cannot parse "{since}" as "2006"'
                raise refused(400, "BadRequest", told) from error
            if "sinceSeconds" in query:
                told = "Forbidden: at most one of `sinceTime` or `sinceSeconds` may be specified"
                raise invalid("PodLogOptions", "", at.name, ("FieldValueForbidden", "[]", told))
        if "sinceSeconds" in query:
            since = (datetime.now(UTC) - timedelta(seconds=int(query["sinceSeconds"]))).strftime("%Y-%m-%dT%H:%M:%S")
        tail = int(query["tailLines"]) if "tailLines" in query else None
        if tail is not None and tail < 0:
            told = f"Invalid value: {tail}: must be greater than or equal to 0"
            raise invalid("PodLogOptions", "", at.name, ("FieldValueInvalid", "tailLines", told))
        return cls(
            at.name, query.get("container", ""), true(query.get("previous")), true(query.get("timestamps")),
            since.removesuffix("Z"), tail, int(query.get("limitBytes", -1)),
        )  # fmt: skip

    def container_of(self, pod: dict[str, Any]) -> str:
        """The one that is meant. Of a pod that a test has put without containers, any."""
        spec, told = pod.get("spec") or {}, pod.get("status") or {}
        names = [one["name"] for one in spec.get("containers") or told.get("containerStatuses") or () if "name" in one]
        others = [one["name"] for one in spec.get("initContainers") or () if "name" in one]
        if not self.container and len(names) > 1:
            why = f"a container name must be specified for pod {self.pod}, choose one of: [{' '.join(names)}]"
            raise refused(400, "BadRequest", why)
        if self.container and names and self.container not in (*names, *others):
            raise refused(400, "BadRequest", f"container {self.container} is not valid for pod {self.pod}")
        return self.container or (names[0] if names else "main")

    def first(self, lines: list[str]) -> int:
        """The number of the first line that is told."""
        return 0 if self.tail is None else max(0, len(lines) - self.tail)

    def shown(self, lines: list[str]) -> Iterator[bytes]:
        for line in lines:
            stamp, _, text = line.partition(" ")
            if not (stamp[:2] == "20" and stamp.endswith("Z")):
                text = line  # the kubelet's own words have no time
            elif stamp[: len(self.since)] < self.since:
                continue
            told = (line if self.timestamps else text).encode()
            if self.left >= 0:
                told = told[: self.left]
                self.left -= len(told)
            if told:
                yield told


def waits(pod: dict[str, Any], container: str) -> str | None:
    """Why a container has not started yet, "" where its pod has no node; None once it has started."""
    told = pod.get("status") or {}
    if any(one["type"] == "PodScheduled" and one["status"] == "False" for one in told.get("conditions") or ()):
        return ""
    for one in (*(told.get("initContainerStatuses") or ()), *(told.get("containerStatuses") or ())):
        if one.get("name") == container and not one.get("lastState"):
            waiting: dict[str, str] | None = (one.get("state") or {}).get("waiting")
            return None if waiting is None else waiting.get("reason", "")
    return None
