"""Artifacts: published whole or not at all, verified on every read, found again by their input key."""

import gc
import json
import os
import random
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.folders import add_folder
from zhllama import storage
from zhllama.artifacts import blocks
from zhllama.artifacts import open as open_module
from zhllama.artifacts.blocks import BLOCK, BlockHasher, block_digests
from zhllama.artifacts.cache import materialize
from zhllama.artifacts.manifest import File
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.published import copy_artifact, find_published
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError, StorageFault

SMALL = b"abc" * 1000
LARGE = bytes(range(256)) * (BLOCK // 256 * 2 + 77)


@pytest.fixture
def published(store: str):
    out = ArtifactWriter(store, "stage", "key", {"option": 1}, {})
    out.add_bytes("small.txt", SMALL)
    with out.writer("folder/large.bin") as stream:
        for start in range(0, len(LARGE), 1_000_003):
            stream.write(LARGE[start : start + 1_000_003])
    out.metrics["figure"] = 1.5
    return out.publish("files")


@pytest.fixture(scope="module")
def in_a_folder(tmp_path_factory: pytest.TempPathFactory):
    out = ArtifactWriter(str(tmp_path_factory.mktemp("store")), "stage", "key")
    out.add_bytes("folder/large.bin", LARGE)
    return out.publish("files")


def corrupt(root: str, name: str, at: int) -> None:
    uri = storage.join(root, name)
    content = bytearray(storage.read_bytes(uri))
    content[at] ^= 1
    storage.write_bytes(uri, bytes(content))


def test_what_was_written_is_read_back(published):
    artifact = open_artifact(published.reference)
    assert artifact.read("small.txt") == SMALL
    assert artifact.read("folder/large.bin") == LARGE
    assert artifact.manifest == published


@pytest.mark.parametrize("start", [0, 5, BLOCK - 3, BLOCK, 2 * BLOCK - 1, len(LARGE) - 9])
def test_a_range_is_read_across_block_borders(published, start):
    length = min(BLOCK + 10, len(LARGE) - start)
    assert open_artifact(published.root).read_range("folder/large.bin", start, length) == LARGE[start : start + length]


def test_a_stream_reads_and_seeks(published):
    with open_artifact(published.reference).open("folder/large.bin") as stream:
        assert stream.read(10) == LARGE[:10]
        stream.seek(-10, 2)
        assert stream.read() == LARGE[-10:]


def test_the_blocks_of_a_stream_go_with_it(in_a_folder):
    gc.disable()
    try:
        with open_artifact(in_a_folder.reference).open("folder/large.bin") as stream:
            stream.read(1)
        left = weakref.ref(stream.raw)
        del stream
        assert left() is None
    finally:
        gc.enable()


def test_a_flipped_byte_is_named_with_both_digests(published):
    corrupt(published.root, "folder/large.bin", BLOCK + 7)
    artifact = open_artifact(published.reference)
    assert artifact.read_range("folder/large.bin", 0, 100) == LARGE[:100]
    with pytest.raises(InputError, match=rf"large\.bin: bytes {BLOCK} to .*expected, .* found"):
        artifact.read_range("folder/large.bin", BLOCK, 10)


def test_a_changed_manifest_is_refused(published):
    value = json.loads(storage.read_bytes(published.reference))
    value["configuration"]["option"] = 99
    storage.write_bytes(published.reference, json.dumps(value).encode())
    with pytest.raises(InputError, match="changed after it was written"):
        open_artifact(published.reference)


def test_nothing_is_visible_before_publication(store):
    out = ArtifactWriter(store, "stage", "key")
    out.add_bytes("a", b"1")
    assert find_published(store, "stage", "key") is None


def test_finished_work_is_found_unless_a_file_is_gone(published, store):
    assert find_published(store, "stage", "key") == published
    storage.delete(storage.join(published.root, "small.txt"))
    assert find_published(store, "stage", "key") is None


def test_equal_content_has_an_equal_digest_wherever_it_lies(published, store):
    other = ArtifactWriter(f"{store}/elsewhere", "stage", "key", {"option": 1}, {})
    source = open_artifact(published.reference)
    other.copy(source, "small.txt")
    other.copy(source, "folder/large.bin")
    other.metrics["figure"] = 1.5
    assert other.publish("files").digest == published.digest
    assert open_artifact(other.root).read("folder/large.bin") == LARGE


def test_a_local_copy_is_whole_and_verified(published, tmp_path: Path):
    folder = materialize(open_artifact(published.reference))
    assert (folder / "folder/large.bin").read_bytes() == LARGE


def test_a_local_copy_of_a_damaged_artifact_is_refused(published):
    corrupt(published.root, "small.txt", 5)
    with pytest.raises(InputError, match=r"small\.txt: bytes 0 to 3000: sha256 .* expected, .* found"):
        materialize(open_artifact(published.reference))


@pytest.fixture
def cached(s3_store: str):
    """An artifact in S3 and its copy in the node's cache."""
    out = ArtifactWriter(s3_store, "stage", "key")
    out.add_bytes("small.txt", SMALL)
    out.add_bytes("folder/large.bin", LARGE)
    artifact = open_artifact(out.publish("files").reference)
    return artifact, materialize(artifact)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are fetched from now on."""
    names: list[str] = []
    fetch = Artifact.fetch

    def recorded(self, folder, chosen=None):
        names.extend(chosen)
        return fetch(self, folder, chosen)

    monkeypatch.setattr(Artifact, "fetch", recorded)
    return names


def test_what_the_node_has_is_not_fetched_again(cached, fetched):
    artifact, _ = cached
    materialize(artifact, recheck=True)
    assert fetched == []


def test_an_interrupted_fetch_goes_on_where_it_stopped(cached, fetched):
    artifact, folder = cached
    (folder / ".complete").unlink()
    (folder / "small.txt").unlink()
    assert materialize(artifact) == folder
    assert fetched == ["small.txt"]
    assert (folder / "small.txt").read_bytes() == SMALL


def test_a_cached_file_that_was_damaged_is_found_and_fetched_again(cached, fetched):
    artifact, folder = cached
    damaged = bytearray(LARGE)
    damaged[BLOCK] ^= 1
    (folder / "folder/large.bin").write_bytes(damaged)
    materialize(artifact, recheck=True)
    assert fetched == ["folder/large.bin"]
    assert (folder / "folder/large.bin").read_bytes() == LARGE


def test_a_cache_without_room_is_refused_before_anything_is_fetched(cached, fetched, monkeypatch):
    artifact, folder = cached
    (folder / "folder/large.bin").unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=len(LARGE) - 1))
    with pytest.raises(InputError, match=r"ZHLLAMA_CACHE .* will be needed and .* are free"):
        materialize(artifact)
    assert fetched == []


def test_several_processes_publish_one_artifact(tmp_path: Path):
    writers = [ArtifactWriter(str(tmp_path), "stage", "key") for _ in range(2)]
    for rank, writer in enumerate(writers):
        writer.add_bytes(f"rank-{rank}.bin", LARGE)
    writers[0].merge_part(json.loads(json.dumps(writers[1].part())))
    published = open_artifact(writers[0].publish("files").reference)
    assert published.names == ["blocks.json", "rank-0.bin", "rank-1.bin"]
    published.verify()


def test_a_fetched_file_is_verified_and_a_damaged_one_not_left_behind(published, tmp_path: Path):
    corrupt(published.root, "folder/large.bin", 2 * BLOCK + 1)
    with pytest.raises(InputError, match="corrupt"):
        open_artifact(published.reference).fetch(tmp_path / "copy", ["folder/large.bin"])
    assert [path for path in (tmp_path / "copy").rglob("*") if path.is_file()] == []


def test_damaged_block_digests_are_refused(published):
    corrupt(published.root, "blocks.json", 5)
    with pytest.raises(InputError, match=r"blocks\.json: bytes 0 to .* sha256 .* expected, .* found"):
        open_artifact(published.reference).read_range("folder/large.bin", 0, 10)


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """Over a terabyte of zeros, which is written nowhere: its blocks.json is itself larger than a block."""
    root = tmp_path_factory.mktemp("huge")
    out = ArtifactWriter(str(root / "store"), "stage", "key")
    count = BLOCK // 64
    size = (count - 1) * BLOCK + 5
    digests = [*[blake3(bytes(BLOCK)).hexdigest()] * (count - 1), blake3(bytes(5)).hexdigest()]
    out.add_stored(File("zeros", size, "0" * 64), digests)
    Path(out.root).mkdir(parents=True)
    Path(out.root, "zeros").touch()
    os.truncate(Path(out.root, "zeros"), size)
    return out.publish("files")


def test_an_artifact_is_verified_whose_block_digests_are_larger_than_a_block(huge, tmp_path):
    artifact = open_artifact(huge.reference)
    assert artifact.file("blocks.json").size > BLOCK
    size = artifact.file("zeros").size
    assert artifact.read_range("zeros", size - 9, 9) == bytes(9)
    # the digests of its own blocks are in no file: what verifies and copies the whole artifact needs them
    assert artifact.read("blocks.json") == Path(huge.root, "blocks.json").read_bytes()

    copy = tmp_path / "copy"
    shutil.copytree(huge.root, copy, ignore=lambda folder, names: ["zeros"])
    corrupt(str(copy), "blocks.json", BLOCK + 1)
    artifact = Artifact(replace(huge, root=str(copy)), verified=True)
    with pytest.raises(InputError, match=r"blocks\.json: bytes 0 to \d+: sha256 .* expected"):
        artifact.read_range("zeros", 0, 1)


def test_block_digests_without_end_are_not_read(huge, monkeypatch):
    monkeypatch.setattr(blocks, "LARGEST", BLOCK)
    with pytest.raises(InputError, match=r"blocks\.json: it has .* bytes, and 8,388,608 are read at most"):
        open_artifact(huge.reference).read_range("zeros", 0, 1)


def test_a_file_that_is_gone_is_named(published):
    storage.delete(storage.join(published.root, "small.txt"))
    with pytest.raises(InputError, match=r"small\.txt: the file is gone; run its stage again"):
        open_artifact(published.reference).read("small.txt")


def test_a_file_that_was_cut_short_is_no_success(published):
    uri = storage.join(published.root, "small.txt")
    storage.write_bytes(uri, storage.read_bytes(uri)[:-1])
    with pytest.raises(StorageFault, match=r"small\.txt: 2999 bytes .* truncated"):
        open_artifact(published.reference).read("small.txt")
    (damage,) = open_artifact(published.reference).find_corruption()
    assert "small.txt: 2999 bytes" in damage


def test_a_server_that_fails_is_no_damage_whatever_the_place_is_called(tmp_path, monkeypatch):
    out = ArtifactWriter(str(tmp_path / "truncated"), "stage", "key")
    out.add_bytes("small.txt", SMALL)
    artifact = open_artifact(out.publish("files").reference)

    def fails(uri: str, *_: object) -> None:
        raise StorageFault(f"{uri}: no S3 server answers")

    monkeypatch.setattr(storage, "read_piece", fails)
    with pytest.raises(StorageFault, match="no S3 server answers"):
        artifact.find_corruption()


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"format": 99}'], ids=str)
def test_a_damaged_manifest_is_refused_and_its_work_done_again(published, store, damage):
    storage.write_bytes(published.reference, damage)
    with pytest.raises(InputError, match=r"manifest"):
        open_artifact(published.reference)
    assert find_published(store, "stage", "key") is None


@given(st.integers(0, 2**34), st.integers(0, 2**24))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_is_the_slice_or_refused(in_a_folder, start, length):
    start %= len(LARGE) + 10
    artifact = open_artifact(in_a_folder.reference)
    if start + length > len(LARGE):
        with pytest.raises(InputError, match="truncated"):
            artifact.read_range("folder/large.bin", start, length)
    else:
        assert artifact.read_range("folder/large.bin", start, length) == LARGE[start : start + length]


def test_ranges_that_are_read_side_by_side_are_each_the_slice(tmp_path):
    """What is kept of the last blocks is memory that is used again."""
    content = random.Random(0).randbytes(5 * BLOCK + 77)
    out = ArtifactWriter(str(tmp_path), "stage", "key")
    out.add_bytes("large.bin", content)
    artifact = open_artifact(out.publish("files").reference)

    def read(seed: int) -> bool:
        chance = random.Random(seed)
        starts = [chance.randrange(len(content) - 2 * BLOCK) for _ in range(12)]
        lengths = [chance.choice([1, 1000, BLOCK, 2 * BLOCK]) for _ in starts]
        return all(
            artifact.read_range("large.bin", at, count) == content[at : at + count]
            for at, count in zip(starts, lengths)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


def test_a_kind_that_does_not_fit_is_refused_by_its_option(published):
    with pytest.raises(InputError, match=r"--model .*: this is of kind files; hf-model or adapter is needed"):
        open_artifact(published.reference).require_kind("hf-model", "adapter", option="--model")


def test_a_failed_stream_leaves_no_file(store):
    out = ArtifactWriter(store, "stage", "key")

    def fail():
        with out.writer("a") as stream:
            stream.write(b"1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not storage.exists(storage.join(out.root, "a"))


def test_a_plain_folder_is_read_as_it_is(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one")
    artifact = open_artifact(str(tmp_path))
    assert not artifact.verified
    before = artifact.digest
    (tmp_path / "a.txt").write_text("two")
    assert open_artifact(str(tmp_path)).digest != before


def test_a_plain_folder_that_has_not_changed_is_hashed_once(tmp_path: Path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("one")
    os.utime(file, (1_000_000_000, 1_000_000_000))
    hashed = []
    whole = open_module.file_digest
    monkeypatch.setattr(open_module, "file_digest", lambda path, kind: hashed.append(path) or whole(path, kind))
    first = open_artifact(str(tmp_path)).digest
    assert open_artifact(str(tmp_path)).digest == first
    assert hashed == [file]
    file.write_text("two")
    assert open_artifact(str(tmp_path)).digest != first
    assert len(hashed) == 2


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "a//b", "a\\b", ""])
def test_names_that_leave_the_prefix_are_refused(name):
    with pytest.raises(InputError, match="leads out of its folder"):
        storage.join("s3://bucket/prefix", name)


@pytest.mark.parametrize("reference", ["/nowhere/at/all", "/nowhere/manifest.json"])
def test_an_absent_reference_says_so(reference):
    with pytest.raises(InputError, match=r"nothing is there|no such manifest"):
        open_artifact(reference, "--model")


# --- work that is killed and started again ----------------------------------------------------------------------------


def test_a_kept_file_counts_as_written_in_the_next_run(store):
    killed = ArtifactWriter(store, "merge", "key")
    killed.add_bytes("large.bin", LARGE)
    killed.record_complete("large.bin", {"changed": 3})

    again = ArtifactWriter(store, "merge", "key")
    assert again.resume_record("large.bin") == {"changed": 3}
    manifest = again.publish("files")
    assert open_artifact(manifest.reference).read("large.bin") == LARGE
    assert not storage.exists(f"{manifest.root}/.kept/large.bin.json")


def test_a_kept_file_of_another_size_is_written_anew(tmp_path):
    killed = ArtifactWriter(str(tmp_path), "merge", "key")
    killed.add_bytes("a", b"whole")
    killed.record_complete("a", {})
    Path(killed.root, "a").write_bytes(b"cut")
    again = ArtifactWriter(str(tmp_path), "merge", "key")
    assert again.resume_record("a") is None
    assert again.resume_record("never written") is None


def test_a_folder_is_verified_once_and_again_when_it_was_changed(in_a_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "cache"))
    reads: list[str] = []
    read_piece = storage.read_piece
    monkeypatch.setattr(storage, "read_piece", lambda *given: reads.append(given[0]) or read_piece(*given))
    path = Path(in_a_folder.root) / "folder/large.bin"
    assert materialize(open_artifact(in_a_folder.reference)) == Path(in_a_folder.root)
    assert any(read.endswith("large.bin") for read in reads)
    reads.clear()
    materialize(open_artifact(in_a_folder.reference))
    assert reads == []
    materialize(open_artifact(in_a_folder.reference), recheck=True)
    assert reads != []
    whole = path.read_bytes()
    path.write_bytes(bytes(len(LARGE)))
    with pytest.raises(InputError, match="corrupt"):
        materialize(open_artifact(in_a_folder.reference))
    path.write_bytes(whole)


@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 7])
def test_digests_of_what_comes_in_pieces_are_those_of_its_blocks_however_it_comes(size):
    content = memoryview(LARGE)[:size]
    for seed in range(3):
        hashed = BlockHasher()
        # begun anew in the middle, with other bytes before
        hashed.update(memoryview(bytes(size // 2)))
        hashed.begin()
        cuts = sorted(random.Random(seed).choices(range(size + 1), k=5))
        for begin, end in pairwise([0, *(cut for cut in sorted(set(cuts)) if 0 < cut < size), size]):
            hashed.update(content[begin:end])
        assert hashed.digests() == (block_digests(content) or [blake3(b"").hexdigest()])


def test_every_damage_is_named_at_once(published):
    assert open_artifact(published.reference).find_corruption() == []
    corrupt(published.root, "folder/large.bin", BLOCK + 7)
    corrupt(published.root, "small.txt", 1)
    first, second = open_artifact(published.reference).find_corruption()
    assert f"large.bin: bytes {BLOCK} to {2 * BLOCK}: blake3" in first
    assert "small.txt: bytes 0 to 3000: sha256" in second


def test_a_copy_elsewhere_is_the_same_artifact(published, store):
    copied = copy_artifact(open_artifact(published.reference), f"{store}/elsewhere")
    assert copied.digest == published.digest
    artifact = open_artifact(f"{store}/elsewhere")
    assert artifact.read("folder/large.bin") == LARGE
    assert artifact.root == storage.normalise(f"{store}/elsewhere")
    # a copy that was interrupted after its end is only found again
    assert copy_artifact(open_artifact(published.reference), f"{store}/elsewhere") == copied


def test_a_damaged_artifact_is_not_copied_from_a_folder(in_a_folder, tmp_path):
    other = tmp_path / "other"
    copy_artifact(open_artifact(in_a_folder.reference), str(other))
    corrupt(str(other), "folder/large.bin", 3)
    with pytest.raises(InputError, match="corrupt"):
        copy_artifact(open_artifact(str(other)), str(tmp_path / "third"))
    names = [item.name for item in storage.listing(str(tmp_path / "third"))]
    assert "folder/large.bin" not in names
    assert "manifest.json" not in names


def test_many_small_files_are_stored_and_fetched(store, tmp_path):
    for number in range(200):
        path = tmp_path / "many" / f"{number % 7}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(str(number).encode() * number)
    out = ArtifactWriter(store, "stage", "key")
    add_folder(out, tmp_path / "many")
    open_artifact(out.publish("files").reference).fetch(tmp_path / "copy")
    for item in storage.listing(str(tmp_path / "many")):
        assert (tmp_path / "copy" / item.name).read_bytes() == (tmp_path / "many" / item.name).read_bytes()
