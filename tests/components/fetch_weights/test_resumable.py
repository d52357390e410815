"""Files written by parts: whole or not at all, and a killed writer's parts are not put again."""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.fetch_weights.resumable import extents, open_parts
from zhllama import storage
from zhllama.artifacts.blocks import BLOCK
from zhllama.storage.s3_session import current_session

CONTENT = random.Random(1).randbytes(2 * storage.PART + 12_345)


def part(number: int) -> bytes:
    return CONTENT[number * storage.PART : (number + 1) * storage.PART]


def uploads(uri: str) -> list[str]:
    bucket, key = storage.split_s3(uri)
    found = current_session().client.list_multipart_uploads(Bucket=bucket, Prefix=key)
    return [upload["UploadId"] for upload in found.get("Uploads", [])]


def leftovers(uri: str) -> list[str]:
    """What an unfinished writer of `uri` holds: names of files, or of uploads."""
    if storage.is_s3(uri):
        return uploads(uri)
    return [path.name for path in Path(uri).parent.iterdir() if path.name != Path(uri).name]


def test_parts_may_be_put_in_any_order_from_any_thread(store):
    uri = f"{store}/x.bin"
    writer = open_parts(uri, len(CONTENT))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda number: writer.put(number, part(number)), (2, 0, 1)))
    assert storage.listing(store) == []
    writer.commit()
    assert storage.read_bytes(uri) == CONTENT
    assert leftovers(uri) == []


def test_the_parts_of_a_writer_that_is_gone_are_kept(store):
    uri = f"{store}/x.bin"
    open_parts(uri, len(CONTENT)).put(2, part(2))
    second = open_parts(uri, len(CONTENT))
    assert second.kept == {2}
    second.put(0, part(0))
    second.suspend()
    third = open_parts(uri, len(CONTENT))
    assert third.kept == {0, 2}
    third.put(1, part(1))
    third.commit()
    assert storage.read_bytes(uri) == CONTENT
    assert leftovers(uri) == []


def test_a_writer_that_begins_anew_keeps_nothing(store):
    uri = f"{store}/x.bin"
    open_parts(uri, len(CONTENT)).put(0, bytes(storage.PART))
    writer = open_parts(uri, len(CONTENT), anew=True)
    assert not writer.kept
    for number in range(3):
        writer.put(number, part(number))
    writer.commit()
    assert storage.read_bytes(uri) == CONTENT


def test_a_writer_that_is_given_up_leaves_nothing(store):
    uri = f"{store}/x.bin"
    writer = open_parts(uri, len(CONTENT))
    writer.put(0, part(0))
    writer.abort()
    assert leftovers(uri) == []
    assert storage.listing(store) == []


def test_a_journal_that_was_cut_short_counts_for_what_is_whole_in_it(tmp_path):
    uri = str(tmp_path / "x.bin")
    writer = open_parts(uri, len(CONTENT))
    writer.put(0, part(0))
    writer.put(1, part(1))
    writer.suspend()
    journal = tmp_path / ".x.bin.parts.txt"
    journal.write_bytes(journal.read_bytes() + b"2")
    assert open_parts(uri, len(CONTENT)).kept == {0, 1}
    # the bytes of a part that the journal has are gone
    (tmp_path / ".x.bin.parts").write_bytes(part(0) + part(1)[:-1])
    assert open_parts(uri, len(CONTENT)).kept == {0}


def test_a_journal_that_another_run_ends_just_now_is_read_all_the_same(tmp_path, monkeypatch):
    opened = os.open

    def open_what_goes(path, *flags):
        found = opened(path, *flags)
        Path(path).unlink()
        return found

    monkeypatch.setattr(os, "open", open_what_goes)
    assert open_parts(str(tmp_path / "x.bin"), len(CONTENT)).kept == set()


def test_a_file_is_not_committed_before_it_is_whole(tmp_path):
    writer = open_parts(str(tmp_path / "x.bin"), len(CONTENT))
    writer.put(2, part(2))
    with pytest.raises(ValueError, match="before all its parts were put"):
        writer.commit()
    assert not (tmp_path / "x.bin").exists()


@given(st.integers(0, 400 * 10**9))
def test_parts_cover_a_file_in_whole_blocks(size):
    parts = extents(size)
    assert sum(length for _, length in parts) == size
    assert all(start + length == following for (start, length), (following, _) in pairwise(parts))
    assert all(start % BLOCK == 0 for start, _ in parts)
    assert len(parts) <= 10_000
