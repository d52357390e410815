"""Where an artifact came from, also when its store was moved or its provenance was not copied."""

import tarfile
from pathlib import Path

import pytest

from tests.stage_chain import RELEASE
from zhllama.artifacts.lineage import Ancestor, find_input, lineage, manifest_of
from zhllama.artifacts.manifest import Input, Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError


def publish(store: Path, stage: str, letter: str, **inputs: Manifest) -> Manifest:
    given = {name: Input(one.reference, one.digest) for name, one in inputs.items()}
    out = ArtifactWriter(str(store), stage, letter * 32, {}, given)
    out.add_bytes("file", stage.encode())
    return out.publish("files")


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A store of a model and its dataset, at another place than where it was written."""
    store = tmp_path / "store"
    tokenizer = publish(store, "extend", "a")
    publish(store, "prepare", "b", tokenizer=tokenizer)
    store.rename(tmp_path / "moved")
    return tmp_path / "moved"


def stages(node: Ancestor) -> list[str]:
    return [node.stage, *(name for given in node.inputs for name in stages(given))]


def test_the_inputs_of_a_store_that_was_moved_are_found_by_digest(moved):
    dataset = manifest_of(str(moved / "prepare" / ("b" * 32)))
    found = lineage(dataset)
    assert stages(found) == ["prepare", "extend"]
    assert found.inputs[0].reference == find_input(dataset, "tokenizer")
    assert find_input(dataset, "tokenizer") == str(moved / "extend" / ("a" * 32) / "manifest.json")


def test_the_inputs_are_found_without_provenance(moved):
    place = moved / "prepare" / ("b" * 32)
    (place / "provenance.json").unlink()
    assert stages(lineage(manifest_of(str(place)))) == ["prepare", "extend"]


def test_an_input_that_nobody_knows_is_said_to_be_so(moved, tmp_path):
    place = tmp_path / "alone"
    (moved / "prepare" / ("b" * 32)).rename(place)
    (place / "provenance.json").unlink()
    (given,) = lineage(manifest_of(str(place))).inputs
    assert given.state == "not in this store"
    with pytest.raises(InputError, match="the tokenizer that it was made with is not in its store"):
        find_input(manifest_of(str(place)), "tokenizer")


def test_the_store_of_a_release_is_whole_wherever_it_was_unpacked(tmp_path):
    """Its manifests name the place where they were written."""
    with tarfile.open(RELEASE) as archive:
        archive.extractall(tmp_path, filter="data")
    found = sorted(tmp_path.glob("store/**/manifest.json"))
    for path in found:
        artifact = open_artifact(str(path))
        assert artifact.root == str(path.parent)
        assert artifact.find_corruption() == []
    (merged,) = tmp_path.glob("store/merge_adapters/*/manifest.json")
    said = stages(lineage(manifest_of(str(merged))))
    made_by = {"merge_adapters", "finetune", "pretrain", "extend_tokenizer", "convert_weights", "fetch_weights"}
    assert made_by <= set(said)
