"""Manifests: content alone decides the digest, an artifact is read where it lies, and format 1 is read for ever."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.folders import publish_first_format
from zhllama import storage
from zhllama.artifacts.cache import materialize
from zhllama.artifacts.manifest import File, Input, Manifest, read_manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.published import copy_artifact, find_published
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError

WEIGHTS = b"weights" * 1000
KEY = "0" * 32


def publish(store: str, report: float = 0.5, given: str = "s3://bucket/model/manifest.json", **options: object):
    out = ArtifactWriter(store, "merge", KEY, {"rank": 8, **options}, {"model": Input(given, "d" * 64)})
    out.add_bytes("weights.bin", WEIGHTS)
    out.add_json("report.json", {"change": report}, beside=True)
    out.facts = {"lineage": ["d" * 64], "summary": f"changed by {report}", "proof": {"difference": report}}
    out.metrics["change"] = report
    return out.publish("hf-model")


@pytest.fixture(params=[1, 2], ids=["format 1", "format 2"])
def made(request, tmp_path: Path) -> Manifest:
    manifest = publish(str(tmp_path / "store"))
    return publish_first_format(manifest) if request.param == 1 else manifest


# --- content only -----------------------------------------------------------------------------------------------------


def test_what_was_measured_and_where_is_not_in_the_digest(tmp_path, monkeypatch):
    one = publish(str(tmp_path / "one"))
    monkeypatch.setattr("platform.node", lambda: "another-host")
    other = publish(str(tmp_path / "other"), report=0.25, given="/home/me/model/manifest.json")
    assert other.digest == one.digest
    texts = [storage.read_bytes(found.reference) for found in (one, other)]
    assert texts[0] == texts[1]
    assert set(json.loads(texts[0])["inputs"]["model"]) == {"digest"}
    assert [file["path"] for file in json.loads(texts[0])["files"]] == ["weights.bin"]


def publish_with_a_place(store: str, place: str, rank: int = 8) -> Manifest:
    out = ArtifactWriter(store, "finetune", KEY)
    said = {"r": rank, "base_model_name_or_path": place}
    out.add_bytes("adapter_config.json", json.dumps(said).encode(), says_place=True)
    return out.publish("adapter")


def test_a_place_in_a_file_is_not_in_the_digest_and_all_else_of_it_is(tmp_path):
    one = publish_with_a_place(str(tmp_path / "one"), "/a/model")
    assert publish_with_a_place(str(tmp_path / "other"), "s3://bucket/a-longer-name").digest == one.digest
    assert publish_with_a_place(str(tmp_path / "third"), "/a/model", rank=4).digest != one.digest
    # as it is read again, copied and damaged, too
    copied = copy_artifact(open_artifact(one.reference), str(tmp_path / "copied"))
    found = open_artifact(copied.reference)
    assert found.digest == one.digest
    found.verify()
    file = Path(copied.root, "adapter_config.json")
    file.write_bytes(file.read_bytes().replace(b"/a/", b"/b/"))
    with pytest.raises(InputError, match=r"adapter_config\.json: bytes 0 to \d+: sha256"):
        found.verify()


def changed_with_its_sha256(manifest: Manifest, **changes: object) -> Artifact:
    """An adapter_config.json that somebody has changed, its size and SHA-256 in the manifest put right."""
    file, place = Path(manifest.root, "adapter_config.json"), Path(manifest.root, "manifest.json")
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes), encoding="utf-8")
    value = json.loads(place.read_bytes())
    value["files"][0] |= {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    place.write_text(json.dumps(value), encoding="utf-8")
    return open_artifact(manifest.root)


def test_nothing_but_the_place_can_be_changed_unseen(tmp_path):
    made = publish_with_a_place(str(tmp_path / "store"), "/a/model")
    moved = changed_with_its_sha256(made, base_model_name_or_path="/b/model")
    assert (moved.find_corruption(), moved.digest) == ([], made.digest)
    changed = changed_with_its_sha256(made, r=64)
    readers = [changed.verify, lambda: changed.read("adapter_config.json"), lambda: changed.fetch(tmp_path / "here")]
    readers += [lambda: copy_artifact(changed, str(tmp_path / "copy")), lambda: materialize(changed)]
    for read in readers:
        with pytest.raises(InputError, match=r"adapter_config\.json: it was changed after it was published"):
            read()
    assert len(changed.find_corruption()) == 1


def test_the_same_work_twice_that_says_two_places_stays_readable(tmp_path):
    first = ArtifactWriter(str(tmp_path), "finetune", KEY)
    publish_with_a_place(str(tmp_path), "/a/model")
    for place in ("/b/model", "/a/longer/model"):
        publish_with_a_place(str(tmp_path), place)
        open_artifact(first.root).verify()


@pytest.mark.parametrize(
    "options",
    [{"source": "/home/me/x"}, {"source": "s3://bucket/x"}, {"source": "https://host/x"}, {"sources": ["/home/me/x"]}],
    ids=str,
)
def test_no_address_of_an_option_is_in_the_manifest_and_none_is_lost(options, tmp_path):
    manifest = publish(str(tmp_path), **options)
    text = storage.read_bytes(manifest.reference).decode()
    for private in ("/home/me", "s3://", "host", str(tmp_path)):
        assert private not in text
    assert open_artifact(manifest.reference).manifest.configuration == {"rank": 8, **options}


def test_an_option_that_names_the_file_of_an_input_is_an_address(tmp_path):
    out = ArtifactWriter(str(tmp_path), "pretrain", KEY, {"deepspeed": "mine.json"}, {"deepspeed": Input("/x", "1")})
    out.add_bytes("a", b"1")
    assert b"mine.json" not in storage.read_bytes(out.publish("adapter").reference)


def test_other_content_has_another_digest(tmp_path):
    digests = {publish(str(tmp_path / "one")).digest, publish(str(tmp_path / "two"), alpha=16).digest}
    assert len(digests) == 2


def test_what_lies_beside_is_read_with_it(tmp_path):
    artifact = open_artifact(publish(str(tmp_path)).reference)
    assert json.loads(artifact.read("report.json")) == {"change": 0.5}
    assert artifact.manifest.facts["summary"] == "changed by 0.5"
    assert artifact.manifest.metrics == {"change": 0.5}
    assert artifact.manifest.inputs["model"].reference == "s3://bucket/model/manifest.json"


@pytest.mark.parametrize("damage", [None, b"", b"[]", b'{"digest": "of another"}', b"[" * 100_000], ids=repr)
def test_an_artifact_is_readable_whatever_became_of_its_provenance(damage, tmp_path):
    manifest = publish(str(tmp_path))
    place = f"{manifest.root}/provenance.json"
    storage.delete(place) if damage is None else storage.write_bytes(place, damage)
    artifact = open_artifact(manifest.reference)
    assert artifact.read("weights.bin") == WEIGHTS
    assert artifact.manifest.metrics == {}
    assert artifact.digest == manifest.digest


def test_a_damaged_report_is_found(tmp_path):
    manifest = publish(str(tmp_path))
    Path(manifest.root, "report.json").write_bytes(b"{}")
    (found,) = open_artifact(manifest.reference).find_corruption()
    assert "report.json" in found


def test_work_whose_report_is_gone_is_done_again(tmp_path):
    manifest = publish(str(tmp_path))
    assert find_published(str(tmp_path), "merge", KEY) == manifest
    Path(manifest.root, "report.json").unlink()
    assert find_published(str(tmp_path), "merge", KEY) is None
    assert publish(str(tmp_path), report=0.125).digest == manifest.digest
    again = open_artifact(manifest.reference)
    assert again.find_corruption() == []
    assert json.loads(again.read("report.json")) == {"change": 0.125}


def test_a_report_of_the_same_size_that_was_written_again_is_not_taken_for_damaged(tmp_path):
    manifest = publish(str(tmp_path))
    Path(manifest.root, "report.json").write_bytes(b"?" * manifest.beside[0].size)
    publish(str(tmp_path), report=0.7)
    assert open_artifact(manifest.reference).find_corruption() == []


# --- movable ----------------------------------------------------------------------------------------------------------


def test_a_moved_artifact_is_read_where_it_lies(made, tmp_path):
    moved = shutil.copytree(made.root, tmp_path / "moved")
    assert open_artifact(str(moved)).root == str(moved)
    assert open_artifact(str(moved)).digest == made.digest
    assert open_artifact(str(moved)).find_corruption() == []
    (moved / "weights.bin").write_bytes(WEIGHTS[:-1] + b"?")
    (wrong,) = open_artifact(str(moved)).find_corruption()
    assert str(moved / "weights.bin") in wrong
    assert open_artifact(made.reference).find_corruption() == []


def test_a_moved_store_is_whole(made, tmp_path):
    store = made.root.rsplit("/", 2)[0]
    Path(store).rename(tmp_path / "other")
    found = find_published(str(tmp_path / "other"), "merge", KEY)
    assert found is not None
    assert found.root == str(tmp_path / "other" / "merge" / KEY)


def test_a_moved_artifact_is_copied_and_materialised_from_where_it_lies(made, tmp_path):
    moved = shutil.copytree(made.root, tmp_path / "moved")
    shutil.rmtree(made.root)
    assert materialize(open_artifact(str(moved))) == moved
    copied = copy_artifact(open_artifact(str(moved)), str(tmp_path / "copy"))
    assert copied.digest == made.digest
    assert open_artifact(copied.reference).find_corruption() == []
    assert (tmp_path / "copy" / "report.json").exists()


def test_a_moved_artifact_that_lost_a_file_is_not_read_at_its_old_place(tmp_path):
    out = ArtifactWriter(str(tmp_path / "store"), "merge", KEY)
    for name in ("a", "b"):
        out.add_bytes(name, name.encode())
    moved = shutil.copytree(publish_first_format(out.publish("files")).root, tmp_path / "moved")
    (moved / "b").unlink()
    with pytest.raises(InputError, match="moved/b: the file is gone"):
        open_artifact(str(moved)).read("b")


def output_of(made: Manifest, place: Path) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / "manifest.json").write_bytes(made.to_json(made.root))
    return place


def test_the_copy_at_output_leads_to_the_artifact(made, tmp_path):
    copy = output_of(made, tmp_path / "out")
    value = json.loads((copy / "manifest.json").read_bytes())
    assert value["root"] == made.root
    assert {"root", "digest", "kind", "files"} <= set(value)
    artifact = open_artifact(f"{copy}/manifest.json")
    assert artifact.root == made.root
    assert artifact.read("weights.bin") == WEIGHTS
    assert artifact.manifest.metrics == {"change": 0.5}


def test_a_published_manifest_says_no_place(tmp_path):
    assert "root" not in json.loads(storage.read_bytes(publish(str(tmp_path)).reference))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    folder = tmp_path / "private" / "prefix"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(WEIGHTS)
    return folder


def test_a_root_that_holds_no_such_artifact_is_not_read(made, secret, tmp_path):
    attack = tmp_path / "attack"
    attack.mkdir()
    value = json.loads(made.to_json(made.root)) | {"root": str(secret)}
    (attack / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"none of its files is here, and .*private/prefix is not read for it"):
        open_artifact(str(attack))
    # another artifact there is not taken for it either
    storage.write_bytes(f"{secret}/manifest.json", publish(str(tmp_path / "x"), alpha=3).to_json())
    with pytest.raises(InputError, match="is not read for it"):
        open_artifact(str(attack))


def test_in_a_store_a_root_is_followed_only_where_the_original_names_the_copy(s3_store, made):
    """Who knows another's manifest and not its files could else have them read, and published at his own place."""
    storage.write_bytes(f"{s3_store}/x/manifest.json", made.to_json(made.root))
    with pytest.raises(InputError, match="is not read for it"):
        open_artifact(f"{s3_store}/x")


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_the_copy_that_output_put_into_a_store_leads_to_the_artifact(place, s3_store, tmp_path):
    made = publish(f"{s3_store}/private" if place == "s3" else str(tmp_path))
    for name in ("one", "two"):
        read_manifest(made.reference).write_copy(f"{s3_store}/{name}/manifest.json")
    for name in ("one", "two"):
        found = open_artifact(f"{s3_store}/{name}/manifest.json")
        assert (found.root, found.read("weights.bin"), found.digest) == (made.root, WEIGHTS, made.digest)
    assert Artifact(found.manifest, verified=True).find_corruption() == []
    # the copy of a copy is not the stage's
    storage.copy(f"{s3_store}/one/manifest.json", f"{s3_store}/three/manifest.json")
    with pytest.raises(InputError, match="is not read for it"):
        open_artifact(f"{s3_store}/three")


def test_the_copy_that_release_0_1_put_into_a_store_leads_to_the_artifact(s3_store):
    made = publish_first_format(publish(f"{s3_store}/private"))
    storage.write_bytes(f"{s3_store}/x/manifest.json", made.to_json())
    assert open_artifact(f"{s3_store}/x/manifest.json").read("weights.bin") == WEIGHTS


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "", 5, None])
def test_a_file_outside_of_the_artifact_is_refused(name, made):
    value = json.loads(storage.read_bytes(made.reference))
    value["files"][0]["path"] = name
    with pytest.raises(InputError, match="not a zhllama manifest"):
        Manifest.from_json(json.dumps(value).encode(), "here")


@pytest.mark.parametrize("change", [{"size": -1}, {"size": "3"}, {"size": True}, {"sha256": None}], ids=str)
def test_a_file_that_is_none_is_refused(change, made):
    value = json.loads(storage.read_bytes(made.reference))
    value["files"][0] |= change
    with pytest.raises(InputError, match="not a zhllama manifest"):
        Manifest.from_json(json.dumps(value).encode(), "here")


@pytest.mark.parametrize(
    ("at", "value"),
    [(("kind",), 5), (("root",), ["x"]), (("inputs", "model", "digest"), {}), (("configuration",), [])],
    ids=lambda one: str(one),
)
def test_a_manifest_of_other_types_is_refused_though_its_digest_is_right(at, value, made):
    given = json.loads(made.to_json("/x"))
    *above, last = at
    place = given
    for name in above:
        place = place[name]
    place[last] = value
    with pytest.raises(InputError, match="not a zhllama manifest"):
        Manifest.from_json(json.dumps(given).encode(), "here")


def test_a_file_too_large_for_a_manifest_is_not_read(tmp_path):
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(10**10)
    with pytest.raises(InputError, match=r"manifest\.json: it has 10,000,000,000 bytes, and 268,435,456 are read"):
        open_artifact(str(tmp_path))


def test_provenance_that_leads_out_of_the_artifact_is_left_aside(tmp_path):
    manifest = publish(str(tmp_path))
    value = json.loads(manifest.provenance_json())
    value["files"][0]["path"] = "../../../x"
    storage.write_bytes(f"{manifest.root}/provenance.json", json.dumps(value).encode())
    assert open_artifact(manifest.reference).beside == {}


def test_what_a_manifest_names_is_never_taken_from_its_provenance(tmp_path):
    manifest = publish(str(tmp_path))
    value = json.loads(manifest.provenance_json())
    value["files"][0] |= {"path": "weights.bin"}
    storage.write_bytes(f"{manifest.root}/provenance.json", json.dumps(value).encode())
    assert open_artifact(manifest.reference).read("weights.bin") == WEIGHTS


def test_what_the_digest_is_of_is_never_added_by_provenance(tmp_path):
    """A fact that says on which model an adapter may be used, say, or an option that says what was packed."""
    manifest = publish(str(tmp_path / "store"))
    value = json.loads(manifest.provenance_json())
    value["facts"] |= {"base_weights": "f" * 64}
    value["configuration"] |= {"packing": "blocks"}
    value["files"] += [{"path": "manifest.json", "size": 1, "sha256": ""}]
    storage.write_bytes(f"{manifest.root}/provenance.json", json.dumps(value).encode())
    found = open_artifact(manifest.reference)
    assert set(found.manifest.facts) == {"lineage", "summary", "proof"}
    assert found.manifest.configuration == {"rank": 8}
    assert set(found.beside) == {"report.json"}
    assert open_artifact(copy_artifact(found, str(tmp_path / "copy")).reference).digest == manifest.digest


# --- format 1 ---------------------------------------------------------------------------------------------------------


def test_an_artifact_of_format_1_keeps_its_digest_and_its_format_when_it_is_copied(tmp_path):
    first = publish_first_format(publish(str(tmp_path / "store")))
    copied = copy_artifact(open_artifact(first.reference), str(tmp_path / "copy"))
    value = json.loads(storage.read_bytes(copied.reference))
    assert (value["format"], value["digest"]) == (1, first.digest)
    assert Artifact(copied, verified=True).find_corruption() == []


def test_a_launchers_manifest_leads_to_the_training_in_its_own_store(made, tmp_path):
    store = tmp_path / "store"
    (store / "launch_training" / KEY).mkdir(parents=True)
    (store / "launch_training" / KEY / "manifest.json").write_bytes(made.to_json(made.root))
    store.rename(tmp_path / "other")
    artifact = open_artifact(str(tmp_path / "other" / "launch_training" / KEY))
    assert artifact.root == str(tmp_path / "other" / "merge" / KEY)


# --- what others put in the place of our own notes --------------------------------------------------------------------

STRANGE = [b"", b"\0", b"[" * 200_000, b'{"a":' * 200_000, b"[]", b"5", b'{"a": "\xff"}', b'{"part": {"files": 5}}']
STRANGE_NAMES = ["empty", "NUL", "deep lists", "deep objects", "a list", "a number", "no UTF-8", "another object"]


@pytest.mark.parametrize("content", STRANGE, ids=STRANGE_NAMES)
def test_block_digests_that_are_none_are_refused(content, tmp_path):
    out = ArtifactWriter(str(tmp_path), "merge", KEY)
    out.add_bytes("large.bin", bytes(9 * 2**20))
    made = out.publish("files")
    Path(made.root, "blocks.json").write_bytes(content)
    given = File("blocks.json", len(content), hashlib.sha256(content).hexdigest())
    changed = replace(made, files=tuple(given if file.path == given.path else file for file in made.files))
    storage.write_bytes(made.reference, replace(changed, digest=changed.computed_digest()).to_json())
    with pytest.raises(InputError, match=r"blocks\.json: no block digests"):
        open_artifact(made.reference).read_range("large.bin", 0, 5)


@pytest.mark.parametrize("content", STRANGE, ids=STRANGE_NAMES)
def test_a_note_of_a_killed_run_that_is_none_is_left_aside(content, tmp_path):
    out = ArtifactWriter(str(tmp_path), "merge", KEY)
    out.add_bytes("a", b"a")
    out.record_complete("a", {"rows": 3})
    again = ArtifactWriter(str(tmp_path), "merge", KEY)
    assert again.resume_record("a") == {"rows": 3}
    Path(out.root, ".kept", "a.json").write_bytes(content)
    again = ArtifactWriter(str(tmp_path), "merge", KEY)
    assert again.resume_record("a") is None
    assert again.files == []


@pytest.mark.parametrize("content", STRANGE, ids=STRANGE_NAMES)
def test_a_note_of_the_cache_that_is_none_has_the_artifact_read_again(content, tmp_path, monkeypatch):
    monkeypatch.setenv("ZHLLAMA_CACHE", str(tmp_path / "cache"))
    made = publish(str(tmp_path / "store"))
    materialize(open_artifact(made.reference))
    (note,) = (tmp_path / "cache").glob("*.verified.json")
    note.write_bytes(content)
    Path(made.root, "weights.bin").write_bytes(bytes(len(WEIGHTS)))
    with pytest.raises(InputError, match="is corrupt"):
        materialize(open_artifact(made.reference))
