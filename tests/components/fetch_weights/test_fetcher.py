"""Fetching: every source gives the same verified files; what is missing or altered is named, and nothing published."""

import hashlib
import http.server
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.fetch_weights import fetcher, plan, sources
from components.fetch_weights.fetcher import fetch_weights
from components.fetch_weights.options import FetchWeights
from components.fetch_weights.sources import Found, StoredSource, read
from zhllama import storage
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError, StorageFault
from zhllama.stage.run import run_stage
from zhllama.tokenizer.vocabulary import Relation, contract_of, load_encoder

META = ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]


def fetch(store: str | Path, source: str | Path, size: str = "tiny", **options: str) -> Manifest:
    return run_stage(FetchWeights(store=str(store), source=str(source), size=size, **options), fetch_weights)


def published(store: str | Path) -> list[str]:
    return [item.name for item in storage.listing(str(store)) if item.name.endswith("manifest.json")]


@pytest.fixture
def weights(tmp_path, tiny_meta) -> Path:
    """A copy of the tiny Meta weights that a test may spoil."""
    return shutil.copytree(tiny_meta, tmp_path / "weights")


@pytest.fixture
def model(tmp_path, tiny_model) -> Path:
    """A copy of the tiny Hugging Face model, without its manifest."""
    folder = shutil.copytree(Path(tiny_model).parent, tmp_path / "model")
    (folder / "manifest.json").unlink()
    return folder


@pytest.fixture
def adapter(tmp_path, llama_tokenizer) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 32}')
    # a fetch never opens it
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    (folder / "tokenizer.model").write_bytes(llama_tokenizer)
    return folder


def upload(folder: Path, uri: str) -> str:
    for path in folder.iterdir():
        storage.write_bytes(storage.join(uri, path.name), path.read_bytes())
    return uri


def flip(path: Path, at: int = 1000) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# --- sources ----------------------------------------------------------------------------------------------------------


def test_metas_files_are_published_as_they_are(store, weights):
    manifest = fetch(store, weights)
    assert manifest.kind == "meta-weights"
    assert [file.path for file in manifest.files] == META
    artifact = open_artifact(manifest.reference)
    for name in META:
        assert artifact.read(name) == (weights / name).read_bytes()
    assert manifest.facts["verified"] == dict.fromkeys(META, "sha256sums.txt")
    assert manifest.vocabulary is not None
    assert manifest.vocabulary.size == 800


def test_every_source_gives_the_same_artifact(tmp_path, s3_store, http, tiny_meta):
    shutil.copytree(tiny_meta, http.folder)
    digests = {
        fetch(tmp_path / "1", tiny_meta).digest,
        fetch(tmp_path / "2", upload(tiny_meta, f"{s3_store}/weights")).digest,
        fetch(tmp_path / "3", http.address).digest,
        fetch(f"{s3_store}/store", f"file://{tiny_meta}").digest,
    }
    assert len(digests) == 1


def test_a_tokenizer_above_the_sizes_folder_is_found(tmp_path, weights):
    above = tmp_path / "llama"
    shutil.copytree(weights, above / "TINY")
    (above / "TINY" / "tokenizer.model").rename(above / "tokenizer.model")
    sums = (above / "TINY" / "sha256sums.txt").read_text()
    assert "tokenizer.model" in sums
    for source in (above, above / "TINY"):
        manifest = fetch(tmp_path / source.name, source)
        assert [file.path for file in manifest.files] == META


def test_a_hugging_face_model_carries_its_vocabulary(tmp_path, model, tiny_model):
    manifest = fetch(tmp_path / "store", model, size="")
    assert manifest.kind == "hf-model"
    assert {"config.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"} <= {
        f.path for f in manifest.files
    }
    assert manifest.vocabulary == open_artifact(tiny_model).manifest.vocabulary


def test_the_tokens_that_a_model_names_are_in_its_vocabulary(tmp_path, chatml_model):
    manifest = fetch(tmp_path / "store", chatml_model, size="")
    artifact = open_artifact(manifest.reference)
    wanted = load_encoder(open_artifact(str(chatml_model)), "").vocabulary()
    assert contract_of(artifact, load_encoder(artifact, "")).relation_to(wanted) is Relation.EQUAL
    assert manifest.vocabulary is not None
    assert manifest.vocabulary.size == wanted.size == 802


@pytest.mark.parametrize("kind", ["model", "weights"])
def test_the_terms_of_a_model_are_fetched_with_it(tmp_path, request, kind):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "source")
    for name in ("README.md", "LICENSE.txt", "USE_POLICY.md", "notes.md"):
        (folder / name).write_text("Mine.")
    found = {file.path for file in fetch(tmp_path / "store", folder, size="").files}
    assert {"README.md", "LICENSE.txt", "USE_POLICY.md"} <= found
    assert "notes.md" not in found


def test_an_adapter_is_fetched_unopened(tmp_path, adapter):
    manifest = fetch(tmp_path / "store", adapter, size="7b")
    assert manifest.kind == "adapter"
    assert [file.path for file in manifest.files] == ["adapter_config.json", "adapter_model.bin", "tokenizer.model"]


@pytest.mark.parametrize("size", [0, 1, storage.PART])
def test_a_file_of_one_part_is_fetched_whole(store, adapter, size):
    (adapter / "adapter_model.bin").write_bytes(bytes(size))
    fetched = open_artifact(fetch(store, adapter).reference)
    assert fetched.read("adapter_model.bin") == bytes(size)


def test_a_broken_connection_goes_on_where_it_broke(tmp_path, http, tiny_meta):
    shutil.copytree(tiny_meta, http.folder)
    http.break_after["/consolidated.01.pth"] = 5000
    manifest = fetch(tmp_path / "store", http.address)
    assert open_artifact(manifest.reference).read(META[1]) == (tiny_meta / META[1]).read_bytes()
    assert ("GET", "/consolidated.01.pth", "bytes=5000-") in http.asked


def run_command(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "components.fetch_weights", *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_the_command_fetches_a_repository_of_the_hub(tmp_path, hub, model):
    shutil.copytree(model, hub.folder / "someone" / "model")
    ended = run_command(
        "--store", str(tmp_path / "store"), "--source", "someone/model", "--size=",
        "--reference", str(tmp_path / "ref"),
        HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    manifest = open_artifact((tmp_path / "ref").read_text()).manifest
    assert manifest.kind == "hf-model"
    assert manifest.facts["verified"]["model-00002-of-00002.safetensors"] == "the hub"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("someone/told-otherwise", r"tokenizer.model: sha256 \w+ expected \(by the hub\)"),
        ("someone/nothing", "no such repository or revision"),
    ],
)
def test_a_repository_that_is_wrong_ends_the_command_with_2(tmp_path, hub, model, name, line):
    shutil.copytree(model, hub.folder / "someone" / "told-otherwise")
    ended = run_command(
        "--store", str(tmp_path / "store"), "--source", f"hf://{name}",
        HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert re.search(line, ended.stderr)
    assert "Traceback" not in ended.stderr
    assert not published(tmp_path / "store")


def test_a_second_run_fetches_nothing_and_a_changed_source_is_fetched_again(tmp_path, weights, write_sums, monkeypatch):
    first = fetch(tmp_path / "store", weights)
    flip(weights / "consolidated.00.pth")
    write_sums(weights)
    second = fetch(tmp_path / "store", weights)
    assert second.digest != first.digest
    monkeypatch.setattr(fetcher, "transfer", None)
    assert fetch(tmp_path / "store", weights) == second


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", META)
def test_a_flipped_byte_is_named_and_nothing_is_published(store, weights, name):
    path = weights / name
    flip(path, path.stat().st_size // 2)
    wanted = next(line[:64] for line in (weights / "sha256sums.txt").read_text().splitlines() if line.endswith(name))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(InputError, match=rf"{name}: sha256 {wanted} expected .*sha256sums\.txt.*, {found} found"):
        fetch(store, weights)
    assert not published(store)


def test_expect_wins_over_the_sums_beside_the_files(tmp_path, weights, write_sums):
    right = tmp_path / "right.txt"
    right.write_bytes((weights / "sha256sums.txt").read_bytes())
    flip(weights / "consolidated.01.pth")
    write_sums(weights)
    fetch(tmp_path / "store", weights)
    with pytest.raises(InputError, match=r"consolidated\.01\.pth: sha256 .* expected \(by --expect\)"):
        fetch(tmp_path / "store", weights, expect=str(right))


def test_expect_may_be_anywhere(tmp_path, s3_store, http, tiny_meta):
    shutil.copytree(tiny_meta, http.folder)
    in_s3 = upload(tiny_meta, f"{s3_store}/weights")
    places = (str(tiny_meta), f"{in_s3}/sha256sums.txt", f"{http.address}/sha256sums.txt")
    for number, place in enumerate(places):
        manifest = fetch(tmp_path / str(number), tiny_meta, expect=place)
        assert set(manifest.facts["verified"].values()) == {"--expect"}


class Presigned(http.server.BaseHTTPRequestHandler):
    """An object store that answers one signed GET: HEAD and other signatures are refused."""

    QUERY = "X-Amz-Credential=AKIA%2F2026&X-Amz-Signature=0123abcd&sums=a/b"
    sums = b""

    def do_GET(self) -> None:
        right = self.path == f"/a%20folder/my%20sums.txt?{self.QUERY}"
        self.send_response(200 if right else 403)
        self.send_header("Content-Length", str(len(self.sums) if right else 0))
        self.end_headers()
        self.wfile.write(self.sums if right else b"")

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_expect_may_be_a_signed_address_which_nobody_is_shown(tmp_path, tiny_meta, monkeypatch, caplog):
    monkeypatch.setattr(Presigned, "sums", (tiny_meta / "sha256sums.txt").read_bytes())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Presigned) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a%20folder/my%20sums.txt?{Presigned.QUERY}"
        with caplog.at_level("DEBUG"):
            manifest = fetch(tmp_path / "store", tiny_meta, expect=address)
        assert set(manifest.facts["verified"].values()) == {"--expect"}
        said = [caplog.text, storage.read_bytes(manifest.reference).decode()]
        monkeypatch.setattr(Presigned, "sums", b"no line of sums")
        for wrong, line in ((address, "line 1 is no"), (f"{address}0", "403 .*; a signed address may be over")):
            with pytest.raises(InputError, match=rf"--expect http://127\.0\.0\.1.*my%20sums\.txt: .*{line}") as caught:
                fetch(tmp_path / "other", tiny_meta, expect=wrong)
            said.append(str(caught.value))
        server.shutdown()
    assert not any("0123abcd" in text or "AKIA" in text for text in said)


def test_expect_for_several_sizes_is_read_for_this_one(tmp_path, weights):
    lines = (weights / "sha256sums.txt").read_text().splitlines()
    (weights / "sha256sums.txt").unlink()
    listed = tmp_path / "all.txt"
    listed.write_text("".join(f"{line[:64]}  TINY/{line[66:]}\n{'0' * 64}  LARGE/{line[66:]}\n" for line in lines))
    assert set(fetch(tmp_path / "store", weights, expect=str(listed)).facts["verified"]) == set(META)


def test_published_weights_are_checked_against_the_table(tmp_path, weights):
    (weights / "consolidated.01.pth").unlink()
    with pytest.raises(InputError, match=r"params\.json: sha256 7e89e242\w+ expected \(by the published table\)"):
        fetch(tmp_path / "store", weights, size="7B")


def test_published_adapters_are_checked_against_the_table(tmp_path, adapter):
    mirror = shutil.copytree(adapter, tmp_path / "ziqingyang" / "chinese-alpaca-plus-lora-13b")
    with pytest.raises(InputError, match=r"adapter_model\.bin: sha256 a1fcdcb6\w+ expected"):
        fetch(tmp_path / "store", mirror, size="13b")


def write_checklists(folder: Path) -> None:
    """Meta's own: MD5 lines of the weights, and of the tokenizer in a list of its own."""
    lines = {
        name: f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in META
        if (folder / name).exists()
    }
    (folder / "checklist.chk").write_text("".join(line for name, line in lines.items() if name != "tokenizer.model"))
    (folder / "tokenizer_checklist.chk").write_text(lines.get("tokenizer.model", ""))


@pytest.mark.parametrize("name", META)
def test_a_checklist_beside_the_files_is_checked(store, weights, name):
    (weights / "sha256sums.txt").unlink()
    write_checklists(weights)
    assert set(fetch(store, weights).facts["verified"].values()) == {"checklist.chk", "tokenizer_checklist.chk"}
    path = weights / name
    wanted = hashlib.md5(path.read_bytes()).hexdigest()
    flip(path, path.stat().st_size // 2)
    found = hashlib.md5(path.read_bytes()).hexdigest()
    with pytest.raises(InputError, match=rf"{name}: md5 {wanted} expected \(by \w*checklist\.chk\), {found} found"):
        fetch(store, weights)


def test_a_checklist_is_checked_beside_sha256_and_not_where_expect_has_spoken(tmp_path, weights, write_sums):
    write_checklists(weights)
    assert fetch(tmp_path / "store", weights).facts["verified"]["params.json"] == "sha256sums.txt, checklist.chk"
    flip(weights / "consolidated.00.pth")
    write_sums(weights)
    with pytest.raises(InputError, match=r"consolidated\.00\.pth: md5 "):
        fetch(tmp_path / "store", weights)
    fetch(tmp_path / "store", weights, expect=str(weights))


def test_the_tokenizers_checklist_may_lie_above_with_the_tokenizer(tmp_path, weights):
    above = tmp_path / "llama"
    write_checklists(weights)
    shutil.copytree(weights, above / "TINY")
    for name in ("tokenizer.model", "tokenizer_checklist.chk"):
        (above / "TINY" / name).rename(above / name)
    (above / "TINY" / "sha256sums.txt").unlink()
    assert fetch(tmp_path / "store", above).facts["verified"]["tokenizer.model"] == "tokenizer_checklist.chk"


def test_a_shard_that_only_the_checklist_names_is_missed(tmp_path, weights):
    write_checklists(weights)
    (weights / "sha256sums.txt").unlink()
    (weights / "consolidated.01.pth").unlink()
    with pytest.raises(InputError, match=r"consolidated\.01\.pth missing"):
        fetch(tmp_path / "store", weights)


def test_weights_of_no_published_size_need_no_size(tmp_path, weights):
    assert fetch(tmp_path / "store", weights, size="").facts["size"] == ""


def test_a_published_size_is_known_by_its_params(tmp_path, weights, monkeypatch):
    params = hashlib.sha256((weights / "params.json").read_bytes()).hexdigest()
    shards = {name: "0" * 64 for name in META if name.endswith(".pth")}
    known = {"meta": {"13b": {"params.json": params, **shards}}, "adapters": {}}
    monkeypatch.setattr(plan, "table", lambda: known)
    with pytest.raises(InputError, match=r"consolidated\.00\.pth: sha256 0{64} expected \(by the published table\)"):
        fetch(tmp_path / "store", weights, size="")


def test_files_without_a_known_sum_are_taken_and_said(tmp_path, weights, caplog):
    (weights / "sha256sums.txt").unlink()
    assert fetch(tmp_path / "store", weights).facts["verified"] == {}
    assert "no sum is known for params.json, consolidated.00.pth" in caplog.text


def test_the_table_has_every_published_shard():
    from components.fetch_weights.sums import table

    shards = {size: sum(name.endswith(".pth") for name in files) for size, files in table()["meta"].items()}
    assert shards == {"7b": 1, "13b": 2, "30b": 4, "65b": 8}
    digests = [digest for part in table().values() for files in part.values() for digest in files.values()]
    assert all(len(bytes.fromhex(digest)) == 32 for digest in digests)
    # one tokenizer for all sizes, everything else its own
    assert len(set(digests)) == len(digests) - 3


# --- what is missing or wrong, before a weight is copied --------------------------------------------------------------


def without(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def unsummed(name: str, content: str):
    return lambda folder: [(folder / "sha256sums.txt").unlink(), (folder / name).write_text(content)]


MISSING = {
    "a shard that the sums name": (without("consolidated.01.pth"), {}, r"consolidated\.01\.pth missing"),
    "the first shard": (without("consolidated.00.pth", "sha256sums.txt"), {}, r"consolidated\.00\.pth missing"),
    "params.json": (without("params.json"), {}, r"params\.json missing"),
    "the tokenizer": (without("tokenizer.model"), {}, r"tokenizer\.model missing"),
    "everything": (without(*META), {}, "missing"),
    "a shard of the published size": (
        without("sha256sums.txt"),
        {"size": "30b"},
        r"consolidated\.02\.pth, cons.*missing",
    ),
    "a size with fewer shards": (without("sha256sums.txt"), {"size": "7b"}, "2 shards are there and 7b has 1"),
    "a size that is no name": (without(), {"size": "../7b"}, "not a name"),
    "params.json that is none": (unsummed("params.json", "{}"), {}, r"not LLaMA's params\.json"),
    "a tokenizer that is none": (unsummed("tokenizer.model", "x"), {}, "not a SentencePiece model"),
    "sums that are none": (
        lambda folder: (folder / "sha256sums.txt").write_text("abc  params.json"),
        {},
        "line 1 is no",
    ),
    "--expect without a shard": (without(), {"expect": "short.txt"}, r"no line for consolidated\.00\.pth"),
    "a checklist that is none": (
        lambda folder: (folder / "checklist.chk").write_text("abc  params.json"),
        {},
        "line 1 is no `<32 hex digits>",
    ),
    "--expect that is not there": (without(), {"expect": "nowhere.txt"}, "--expect nowhere.txt: nothing is there"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_said_before_a_weight_is_copied(tmp_path, weights, monkeypatch, name):
    spoil, options, message = MISSING[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text(f"{'0' * 64}  params.json\n")
    spoil(weights)
    monkeypatch.setattr(fetcher, "transfer", lambda *_: pytest.fail("a file was copied"))
    with pytest.raises(InputError, match=message):
        fetch(tmp_path / "store", weights, **options)


def test_a_missing_shard_is_missed_over_http_too(tmp_path, http, tiny_meta):
    shutil.copytree(tiny_meta, http.folder)
    (http.folder / "consolidated.00.pth").unlink()
    with pytest.raises(InputError, match=r"consolidated\.00\.pth missing"):
        fetch(tmp_path / "store", http.address)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: (m / "model-00002-of-00002.safetensors").unlink(),
            r"model-00002-of-00002\.safetensors named by .*, but missing",
        ),
        (lambda m: (m / "model.safetensors.index.json").write_text("[]"), r"index\.json is damaged"),
        (lambda m: (m / "config.json").unlink(), "neither Meta's files"),
        (
            lambda m: (m / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 700})),
            "has 800 pieces and .* says 700",
        ),
        (
            lambda m: (m / "config.json").write_text(json.dumps({"model_type": "gemma2"})),
            "is of a gemma2 model .* only LLaMA, Mistral, Qwen2 and Qwen3",
        ),
    ],
    ids=["shard", "index", "config", "vocabulary", "architecture"],
)
def test_an_incomplete_model_is_refused(tmp_path, model, change, message):
    change(model)
    with pytest.raises(InputError, match=message):
        fetch(tmp_path / "store", model, size="")


def test_pickled_models_are_fetched_and_not_opened(tmp_path, model):
    for path in model.glob("model*"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"x")
    found = fetch(tmp_path / "store", model, size="")
    assert [file.path for file in found.files if file.path.endswith(".bin")] == ["pytorch_model.bin"]


def test_an_adapter_without_weights_is_refused(tmp_path, adapter):
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        fetch(tmp_path / "store", adapter)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://example.org/llama", "by https:// only"),
        ("https://user:secret@example.org/llama", "without user, query"),
        ("https://example.org/llama?token=secret", "without user, query"),
        ("ftp://example.org/llama", "unknown kind of address"),
        ("hf://onlyaname", "no repository"),
        ("nobody/nothing", "HF_HUB_OFFLINE"),
        ("/nowhere/at/all", "neither Meta's files"),
        ("", "--source: empty"),
    ],
)
def test_a_source_that_cannot_be_is_refused(tmp_path, source, message):
    with pytest.raises(InputError, match=message) as error:
        fetch(tmp_path / "store", source)
    assert "secret" not in str(error.value)


def test_a_server_that_is_gone_is_a_fault(tmp_path, http, monkeypatch):
    monkeypatch.setattr(sources, "PAUSE", 0.01)
    address = http.address
    http.server_close()
    with pytest.raises(StorageFault, match="no answer after"):
        fetch(tmp_path / "store", address)


class Endless(StoredSource):
    """A server that says no length, and never ends."""

    def stat(self, name: str) -> Found | None:
        return Found(name, None, "")

    def chunks(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        return itertools.repeat(b"{" * 2**20)


def test_a_small_file_that_does_not_end_is_given_up(tmp_path):
    with pytest.raises(InputError, match=r"/params.json: over 67,108,864 bytes; fetch another copy"):
        read(Endless(str(tmp_path)), "params.json")
    with open(tmp_path / "params.json", "wb") as file:
        file.truncate(2**27)
    with pytest.raises(InputError, match=r"/params.json: over 67,108,864 bytes"):
        read(StoredSource(str(tmp_path)), "params.json")


def test_room_is_asked_for_before_anything_is_written(tmp_path, tiny_meta, full_disk):
    with pytest.raises(InputError, match=r"--store .* will be needed and 1\.0 kB are free"):
        fetch(tmp_path / "store", tiny_meta)
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
