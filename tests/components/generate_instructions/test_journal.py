"""A line is there once append returns, in both places; whatever a kill leaves behind can be read."""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.generate_instructions import journal as module
from components.generate_instructions.journal import NAME, Journal
from zhllama import storage
from zhllama.errors import InputError, StorageFault


def line(number: int) -> dict[str, Any]:
    return {"event": "answered", "request": number, "content": f"好\u2028\n\ud83d{number}"}


def append(place: str, *numbers: int) -> None:
    async def work() -> None:
        with Journal(place) as journal:
            await asyncio.gather(*(journal.append(line(number)) for number in numbers))

    asyncio.run(work())


def read(place: str) -> list[dict[str, Any]]:
    with Journal(place) as journal:
        return journal.records


def test_what_was_appended_is_read_again_in_order(store: str) -> None:
    append(store, 0, 1, 2)
    append(store, 3)
    assert read(store) == [line(number) for number in range(4)]


def test_another_machine_reads_what_is_in_s3(s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(s3_store, 0, 1)
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "another"))
    append(s3_store, 2)
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "cache"))
    assert read(s3_store) == [line(0), line(1), line(2)]


def test_what_was_killed_before_its_upload_goes_up_later(
    s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(s3_store, 0)
    (spool,) = (tmp_path / "cache").rglob(NAME)
    with open(spool, "ab") as file:
        file.write(json.dumps(line(1)).encode() + b"\n" + b'{"event": "answ')
    assert read(s3_store) == [line(0), line(1)]
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "another"))
    assert read(s3_store) == [line(0), line(1)]


@pytest.mark.parametrize("end", [b'{"event": "answered", "req', b"{", b'{"event": "x"}'], ids=str)
def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path, end: bytes) -> None:
    append(str(tmp_path), 0, 1)
    with open(tmp_path / NAME, "ab") as file:
        file.write(end)
    append(str(tmp_path), 2)
    assert read(str(tmp_path)) == [line(0), line(1), line(2)]


def test_every_cut_of_the_file_gives_the_lines_before_it(tmp_path: Path) -> None:
    append(str(tmp_path), 0, 1, 2)
    content = (tmp_path / NAME).read_bytes()
    for cut in range(len(content)):
        (tmp_path / NAME).write_bytes(content[:cut])
        assert read(str(tmp_path)) == [line(number) for number in range(content[:cut].count(b"\n"))]


def test_a_damaged_line_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    append(str(tmp_path), 0, 1)
    content = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(content.replace(b"event", b"\xff\xfent", 1))
    assert read(str(tmp_path)) == [line(1)]
    assert "line 1 is damaged" in caplog.text


def test_many_objects_become_one_and_nothing_is_lost(
    s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_OBJECTS", 3)

    async def work() -> None:
        with Journal(s3_store) as journal:
            for number in range(9):
                await journal.append(line(number))

    asyncio.run(work())
    assert len(storage.listing(s3_store)) <= 4
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "another"))
    assert read(s3_store) == [line(number) for number in range(9)]


@pytest.mark.slow
def test_objects_left_by_a_kill_while_they_were_put_together_do_not_count_twice(
    s3_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    append(s3_store, 0)
    append(s3_store, 1)
    first = storage.read_bytes(f"{s3_store}/00000000.jsonl")
    second = storage.read_bytes(f"{s3_store}/00000001.jsonl")
    storage.write_bytes(f"{s3_store}/00000002.jsonl", first + second)
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "another"))
    append(s3_store, 2)
    assert read(s3_store) == [line(0), line(1), line(2)]


def test_two_runs_on_one_machine_are_refused(tmp_path: Path) -> None:
    with Journal(str(tmp_path)), pytest.raises(InputError, match="another run is adding answers to it"):
        Journal(str(tmp_path)).__enter__()


def test_two_runs_on_two_machines_stop_at_the_second_writer(
    s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        with Journal(s3_store) as here:
            monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "another"))
            with Journal(s3_store) as there:
                await here.append(line(0))
                with pytest.raises(StorageFault, match="another run adds answers to this journal"):
                    await there.append(line(1))
                with pytest.raises(StorageFault, match="another run"):
                    await there.append(line(2))

    asyncio.run(work())


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), RuntimeError("No space for a thread")])
def test_a_disk_that_fails_ends_every_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    def full(descriptor: int) -> None:
        raise fault

    async def work() -> None:
        with Journal(str(tmp_path)) as journal:
            await journal.append(line(0))
            monkeypatch.setattr(os, "fsync", full)
            failures = await asyncio.gather(
                *(journal.append(line(number)) for number in (1, 2)), return_exceptions=True
            )
            assert failures == [fault, fault]
            with pytest.raises(type(fault), match="No space"):
                await journal.append(line(3))

    asyncio.run(work())


def test_a_line_is_on_the_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    real: Callable[[int], None] = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append((tmp_path / NAME).read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)

    async def work() -> None:
        with Journal(str(tmp_path)) as journal:
            await journal.append(line(7))
            assert json.loads(synced[-1].splitlines()[-1]) == line(7)

    asyncio.run(work())
