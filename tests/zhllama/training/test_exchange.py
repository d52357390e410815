"""What one process tells the others comes to them as it was said, over real connections, and never as a pickle."""

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as processes

from zhllama.errors import InputError, StorageFault
from zhllama.training.exchange import values_of_all

SAID = (
    ("", "s3://store/checkpoint/manifest.json", "检查点" * 3000),
    (None, None, 3),
    (True, False, True),
    (InputError("--adapter x: wrong"), None, StorageFault("S3 is away")),
    (KeyError("step"), FileNotFoundError("gone"), RuntimeError("x")),
)
"""Of each round, what each rank says."""


def told(rank: int, place: str, found: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=len(SAID[0]))
    group = dist.new_group(backend="gloo")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle")

    # by which torch's own way packs objects
    dist.distributed_c10d._object_to_tensor = refuse
    heard = [values_of_all(values[rank], group) for values in SAID]
    text = repr([[(type(one).__name__, str(one)) for one in of_all] for of_all in heard])
    Path(f"{found}-{rank}").write_text(text, encoding="utf-8")
    dist.destroy_process_group()


@pytest.mark.slow
def test_what_each_says_comes_to_all(tmp_path):
    processes.spawn(told, (str(tmp_path / "store"), str(tmp_path / "found")), nprocs=len(SAID[0]))  # type: ignore[no-untyped-call]
    kept = (InputError, StorageFault)
    wanted = [
        [
            (type(one).__name__ if not isinstance(one, Exception) or isinstance(one, kept) else "ValueError", str(one))
            for one in values
        ]
        for values in SAID
    ]
    for rank in range(len(SAID[0])):
        assert (tmp_path / f"found-{rank}").read_text("utf-8") == repr(wanted)


def test_alone_it_is_what_was_said():
    error = InputError("wrong")
    assert values_of_all(error, None) == [error]
