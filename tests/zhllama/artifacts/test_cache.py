"""Copies of artifacts on this machine: what was altered there, by whom ever, is never used."""

import os
from pathlib import Path

import pytest

from tests.other_user import as_stranger, root_alone
from zhllama.artifacts import cache
from zhllama.artifacts.cache import materialize, require_room
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError

CONTENT = {"weights.bin": bytes(range(256)) * 100, "folder/config.json": b"{}"}


@pytest.fixture
def artifact(s3_store: str) -> Artifact:
    out = ArtifactWriter(s3_store, "stage", "key")
    for name, content in CONTENT.items():
        out.add_bytes(name, content)
    return open_artifact(out.publish("files").reference)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read whole from now on, to be compared."""
    names: list[str] = []
    digest = cache.file_digest

    def recorded(path, algorithm):
        names.append(path.name)
        return digest(path, algorithm)

    monkeypatch.setattr(cache, "file_digest", recorded)
    return names


def of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in CONTENT}


def test_what_is_as_it_was_fetched_is_not_read_again(artifact, read):
    folder = materialize(artifact)
    assert materialize(artifact) == folder
    assert read == []
    assert of(folder) == CONTENT


def altered(path: Path) -> None:
    path.write_bytes(b"evil" + path.read_bytes()[4:])


def altered_with_its_old_times(path: Path) -> None:
    before = path.stat()
    altered(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


def a_link(path: Path) -> None:
    other = path.parents[2] / "elsewhere"
    other.write_bytes(bytes(path.stat().st_size))
    path.unlink()
    path.symlink_to(other)


@pytest.mark.parametrize("change", [altered, altered_with_its_old_times, replaced, a_link])
def test_other_content_of_the_same_size_is_found_and_fetched_again(artifact, change):
    folder = materialize(artifact)
    change(folder / "weights.bin")
    assert of(materialize(artifact)) == CONTENT
    assert not (folder / "weights.bin").is_symlink()
    elsewhere = folder.parent / "elsewhere"
    assert not elsewhere.exists() or not any(elsewhere.read_bytes())


def test_what_an_earlier_release_fetched_is_compared_once_and_used(artifact, read, monkeypatch):
    folder = materialize(artifact)
    # it noted no more than that the fetch was over
    (folder / ".complete").write_bytes(b"")
    monkeypatch.setattr(Artifact, "fetch", None)
    materialize(artifact)
    assert sorted(read) == ["config.json", "weights.bin"]
    materialize(artifact)
    assert len(read) == 2


def test_files_without_a_digest_are_used_as_they_were_noted_and_fetched_again_where_they_differ(s3_store):
    out = ArtifactWriter(s3_store, "stage", "key")
    for name, content in CONTENT.items():
        out.add_bytes(name, content)
    root = out.publish("files").root
    from zhllama import storage

    storage.delete(storage.join(root, "manifest.json"))
    plain = open_artifact(root)
    assert plain.manifest.files[0].sha256 == ""
    folder = materialize(plain)
    (folder / ".complete").write_bytes(b"")
    assert of(materialize(plain)) == CONTENT
    altered(folder / "weights.bin")
    assert of(materialize(plain)) == CONTENT


@pytest.mark.parametrize("note", [b"{", b"[]", b'{"weights.bin": 1}', b"\xff", b'{"weights.bin": [1, 2, 3, 4]}'])
def test_a_note_that_is_none_has_the_files_compared(artifact, read, note):
    folder = materialize(artifact)
    (folder / ".complete").write_bytes(note)
    assert of(materialize(artifact)) == CONTENT
    assert "weights.bin" in read


def test_a_link_at_the_locks_place_empties_nothing(artifact, tmp_path):
    folder = materialize(artifact)
    precious = tmp_path / "precious"
    precious.write_bytes(b"kept")
    lock = folder.with_name(f"{folder.name}.lock")
    lock.unlink()
    lock.symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"):
        materialize(artifact)
    assert precious.read_bytes() == b"kept"


@root_alone
def test_what_another_user_put_where_earlier_releases_looked_is_not_used(artifact, tmp_path, monkeypatch):
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o011)
    digest = artifact.digest[:24]

    def attack() -> None:
        folder = shared / "zhllama-cache" / digest
        (folder / "folder").mkdir(parents=True)
        for name, content in CONTENT.items():
            (folder / name).write_bytes(bytes(len(content)))
        (folder / ".complete").touch()

    as_stranger(attack)
    monkeypatch.setenv("TMPDIR", str(shared))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("ZHLLAMA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert of(materialize(artifact)) == CONTENT
    # and where the user names that folder
    monkeypatch.setenv("ZHLLAMA_CACHE", str(shared / "zhllama-cache"))
    assert of(materialize(artifact)) == CONTENT
    # and where it is the user's own folder for caches
    monkeypatch.delenv("ZHLLAMA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared))
    as_stranger(lambda: (shared / "zhllama-cache").rename(shared / "zhllama"))
    with pytest.raises(InputError, match="belongs to another user"):
        require_room([artifact])
