"""Nobody of another machine reaches the processes of a training that is on this one alone."""

import json
import os
import subprocess
import sys

import pytest

from pipelines.local.s3_server import free_ports

PROGRAM = """
import json, os, sys, tempfile

def work():
    import psutil
    import torch.distributed as dist
    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == 0:
        agent = psutil.Process(os.getppid())
        found = [one for tree in (agent, *agent.children(recursive=True)) for one in tree.net_connections("inet")]
        listening = [one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN]
        with open(sys.argv[1] + "/found", "w") as file:
            json.dump(listening, file)
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    from torch.distributed.launcher.api import elastic_launch
    from zhllama.training.elastic import _launch_config
    before = os.listdir(tempfile.gettempdir())
    config = _launch_config(sys.argv[1])
    assert os.listdir(tempfile.gettempdir()) == before
    elastic_launch(config, work)()
"""


@pytest.mark.parametrize(
    "place",
    [
        pytest.param({}, id="nobody said where"),
        pytest.param(
            {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "{}", "PET_NODE_RANK": "0"},
            id="as a job here",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "127.0.0.1:{}", "PET_RDZV_ID": "x"},
            id="as an elastic job here",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_listener_of_a_training_on_one_machine_is_on_loopback(tmp_path, place):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "tmp").mkdir()
    (port,) = free_ports(1)
    given = {name: value.format(port) for name, value in place.items()}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "MASTER_", "GLOO_"))}
    around = {**kept, **given, "PET_NPROC_PER_NODE": "2", "PET_NNODES": "1", "TMPDIR": str(tmp_path / "tmp")}
    around["PYTHONPATH"] = os.getcwd()
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    ended = subprocess.run(command, env=around, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "found").read_text())
    assert found
    assert set(found) == {"127.0.0.1"}
