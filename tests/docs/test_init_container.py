"""The init container that docs/kubernetes.md gives to the training operator of a restricted namespace."""

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kubernetes.md"


@pytest.fixture(scope="module")
def container() -> dict[str, Any]:
    """As the operator renders it."""
    (block,) = (
        text for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL) if "init-pytorch" in text
    )
    template = yaml.safe_load(block)["data"]["initContainer.yaml"]
    values = {"InitContainerImage": "alpine:3", "MasterAddr": "no-such-master.invalid", "MaxTries": "100"}
    (found,) = yaml.safe_load(re.sub(r"\{\{\.(\w+)\}\}", lambda match: values[match[1]], template))
    return found


def test_it_passes_the_restricted_standard(container):
    context = container["securityContext"]
    assert context["allowPrivilegeEscalation"] is False
    assert (context["runAsNonRoot"], context["runAsUser"]) == (True, 65532)
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}


def looks_up(folder: Path, ends: str) -> dict[str, str]:
    """An environment in which every look-up ends so, and says that it was made."""
    program = folder / "nslookup"
    program.write_text(f"#!/bin/sh\necho looked up\nexit {ends}\n")
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_it_ends_when_it_is_told_to(container, tmp_path):
    """The stock one's shell ignores SIGTERM: a cancelled Worker stays for its whole 300 seconds."""
    waiting = subprocess.Popen(
        container["command"], env=looks_up(tmp_path, "1"), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert waiting.stdout is not None
        while waiting.stdout.readline() != "waiting for the master\n":
            assert waiting.poll() is None
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(60) == 143
    finally:
        # its sleep, where it had begun one
        with contextlib.suppress(ProcessLookupError):
            os.killpg(waiting.pid, signal.SIGKILL)


def test_it_is_done_when_the_master_is_there(container, tmp_path):
    assert subprocess.run(container["command"], env=looks_up(tmp_path, "0"), timeout=60).returncode == 0
