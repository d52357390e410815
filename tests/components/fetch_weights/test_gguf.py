"""A GGUF fetched: by its own address, with its parts and its terms; refused by its header before a weight is copied."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.fetch_weights.fetcher import fetch_weights
from components.fetch_weights.options import FetchWeights
from components.fetch_weights.plan import split_address
from tests.gguf_models import sentencepiece_fields, write_gguf
from zhllama import storage
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError
from zhllama.stage.run import run_stage
from zhllama.tokenizer.vocabulary import Relation

gguf = pytest.importorskip("gguf")
CONFIG = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
}  # fmt: skip


def fetch(store: str | Path, source: str | Path, **options: Any) -> Manifest:
    return run_stage(FetchWeights(store=str(store), source=str(source), **options), fetch_weights)


@pytest.fixture
def folder(tmp_path: Path, tiny_state: dict[str, Any], llama_tokenizer: bytes) -> Path:
    """A GGUF of the tiny model, another one beside it, and the terms of both."""
    path = tmp_path / "served"
    path.mkdir()
    fields = sentencepiece_fields(llama_tokenizer)
    write_gguf(path / "tiny.Q8_0.gguf", tiny_state, CONFIG, fields, "Q8_0")
    write_gguf(path / "tiny.Q4_0.gguf", tiny_state, CONFIG, fields, "Q4_0")
    (path / "LICENSE").write_text("Apache License, Version 2.0")
    return path


def test_one_file_is_published_as_it_is(store, folder, tiny_model):
    manifest = fetch(store, folder / "tiny.Q8_0.gguf")
    assert (manifest.kind, sorted(file.path for file in manifest.files)) == ("gguf", ["LICENSE", "tiny.Q8_0.gguf"])
    artifact = open_artifact(manifest.reference)
    assert artifact.read("tiny.Q8_0.gguf") == (folder / "tiny.Q8_0.gguf").read_bytes()
    contract = open_artifact(tiny_model).manifest.vocabulary
    assert manifest.vocabulary.relation_to(contract) is Relation.EQUAL


def test_every_source_gives_the_same(tmp_path, folder, http, s3_store, monkeypatch):
    name = "tiny.Q8_0.gguf"
    storage.write_bytes(f"{s3_store}/models/{name}", (folder / name).read_bytes())
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / name, alone)
    monkeypatch.chdir(alone)
    sources = [name, str(alone), f"{s3_store}/models/{name}", f"http://127.0.0.1:{http.server_port}/{name}"]
    made = [fetch(tmp_path / f"store-{number}", source) for number, source in enumerate(sources)]
    assert len({manifest.digest for manifest in made}) == 1


@pytest.mark.slow
def test_one_file_of_a_repository_of_the_hub(tmp_path, hub, folder):
    shutil.copytree(folder, hub.folder / "someone" / "model")
    command = [sys.executable, "-m", "components.fetch_weights", "--store", str(tmp_path / "store")]
    command += ["--source", "hf://someone/model/tiny.Q8_0.gguf", "--output", str(tmp_path / "manifest.json")]
    env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(command, check=True, env=env, capture_output=True)
    manifest = Manifest.from_json((tmp_path / "manifest.json").read_bytes(), "there")
    assert sorted(file.path for file in manifest.files) == ["LICENSE", "tiny.Q8_0.gguf"]


def test_sums_count(tmp_path, folder):
    path = folder / "tiny.Q8_0.gguf"
    (folder / "sha256sums.txt").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    assert fetch(tmp_path / "store", path).facts["verified"] == {path.name: "sha256sums.txt"}
    (folder / "sha256sums.txt").write_text(f"{'0' * 64}  {path.name}\n")
    with pytest.raises(InputError, match=r"tiny\.Q8_0\.gguf: sha256 0{64} expected"):
        fetch(tmp_path / "other", path)
    (tmp_path / "expected").write_text(f"{'0' * 64}  another.gguf\n")
    with pytest.raises(InputError, match=r"no line for tiny\.Q8_0\.gguf"):
        fetch(tmp_path / "other", path, expect=str(tmp_path / "expected"))


def test_parts_come_together(tmp_path, tiny_state, llama_tokenizer):
    (tmp_path / "parts").mkdir()
    fields = sentencepiece_fields(llama_tokenizer)
    write_gguf(tmp_path / "parts" / "m.gguf", tiny_state, CONFIG, fields, "F16", split=12)
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert names == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    manifest = fetch(tmp_path / "store", tmp_path / "parts" / names[1])
    assert [file.path for file in manifest.files] == names
    (tmp_path / "parts" / names[0]).unlink()
    with pytest.raises(InputError, match="the part m-00001-of-00002.gguf is missing".replace(".", r"\.")):
        fetch(tmp_path / "store", tmp_path / "parts")


def test_of_several_one_must_be_named(tmp_path, folder):
    said = r"several models in it \(tiny\.Q4_0\.gguf, tiny\.Q8_0\.gguf\); give one, by its own address"
    with pytest.raises(InputError, match=said):
        fetch(tmp_path / "store", folder)
    with pytest.raises(InputError, match=r"/tiny\.Q2_K\.gguf: nothing is there"):
        fetch(tmp_path / "store", folder / "tiny.Q2_K.gguf")


def test_a_model_with_a_gguf_beside_it_is_that_model(tmp_path, tiny_model, folder):
    model = shutil.copytree(Path(tiny_model).parent, tmp_path / "model")
    (model / "manifest.json").unlink()
    shutil.copy(folder / "tiny.Q4_0.gguf", model)
    assert fetch(tmp_path / "store", model).kind == "hf-model"
    assert fetch(tmp_path / "store", model / "tiny.Q4_0.gguf").kind == "gguf"


def test_what_is_not_converted_is_refused_before_it_is_copied(tmp_path, folder):
    writer = gguf.GGUFWriter(str(tmp_path / "phi.gguf"), "phi3")
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"--source .*/phi\.gguf is of a phi3 model"):
        fetch(tmp_path / "store", tmp_path / "phi.gguf")
    content = (folder / "tiny.Q8_0.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"does not lie in it, at .*: it is cut short"):
        fetch(tmp_path / "store", tmp_path / "cut.gguf")
    (tmp_path / "page.gguf").write_bytes(b"<!doctype html><html>" + bytes(100))
    with pytest.raises(InputError, match="it is a page"):
        fetch(tmp_path / "store", tmp_path / "page.gguf")
    assert not [one for one in storage.listing(str(tmp_path / "store")) if one.name.endswith((".gguf", ".json"))]


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("hf://owner/name@main/a.gguf", ("hf://owner/name@main", "a.gguf")),
        ("a.gguf", (".", "a.gguf")),
        ("/a.gguf", ("/", "a.gguf")),
        ("s3://bucket/x/a.gguf", ("s3://bucket/x", "a.gguf")),
        ("s3://bucket/x", ("s3://bucket/x", "")),
    ],
)
def test_an_address_names_a_folder_and_a_file(address, wanted):
    assert split_address(address) == wanted


def test_llama_3s_tokenizer_gives_its_contract(tmp_path, tiny_meta, english_text):
    from tests.zhllama.tokenizer.byte_level_models import trained
    from tests.zhllama.tokenizer.test_tiktoken_file import file_of, ranks_in
    from zhllama.tokenizer.gguf_tokenizer import PRE

    weights = shutil.copytree(tiny_meta, tmp_path / "weights")
    fast = trained(english_text[:300], PRE["llama-bpe"], 544, [])
    (weights / "tokenizer.model").write_bytes(file_of(ranks_in(fast)))
    (weights / "sha256sums.txt").unlink()
    manifest = fetch(tmp_path / "store", weights, size="tiny")
    assert (manifest.kind, manifest.vocabulary.size, manifest.vocabulary.bos) == ("meta-weights", 800, 544)
    (weights / "tokenizer.model").write_bytes(file_of(ranks_in(fast))[:500])
    with pytest.raises(InputError, match=re.escape("tokenizer.model: no tokenizer of Llama 3's kind")):
        fetch(tmp_path / "store", weights, size="tiny")
