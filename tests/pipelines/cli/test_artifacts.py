"""zhllama's commands for what the stages published, on a folder and on S3."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipelines import inventory
from pipelines.__main__ import main
from pipelines.local.runner import s3_for
from tests.faulty_proxy import Fault, FaultyProxy
from zhllama import storage
from zhllama.artifacts.blocks import BLOCK
from zhllama.artifacts.cache import materialize
from zhllama.artifacts.lineage import lineage
from zhllama.artifacts.manifest import Input, Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.stage import program


def publish(store: str, stage: str, letter: str, kind: str, summary: str = "", **inputs: Manifest | Input) -> Manifest:
    """An artifact of two files, one of them of two blocks."""
    given = {name: one if isinstance(one, Input) else Input(one.reference, one.digest) for name, one in inputs.items()}
    out = ArtifactWriter(store, stage, letter * 32, {"steps": 3}, given)
    out.add_bytes("large.bin", letter.encode() * (BLOCK + 5))
    out.add_bytes("folder/small.bin", letter.encode())
    out.facts["summary"] = summary
    return out.publish(kind)


@pytest.fixture
def chain(store) -> dict[str, Manifest]:
    """Weights, the model made of them, and an adapter that came of the model in two ways."""
    weights = publish(store, "fetch_weights", "a", "meta-weights", source=Input("hf://someone/llama", "5" * 64))
    model = publish(store, "convert_weights", "b", "hf-model", "6 parameters", weights=weights)
    packed = publish(store, "prepare_dataset", "c", "packed-dataset", tokenizer=model)
    adapter = publish(store, "pretrain", "d", "adapter", model=model, dataset=packed)
    return {"weights": weights, "model": model, "packed": packed, "adapter": adapter}


@pytest.fixture
def zhllama(capsys, tmp_path, monkeypatch):
    """Runs a command in this process: its exit code, what it printed, and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZHLLAMA_TERMINATION_LOG", str(tmp_path / "none"))
    # what a program does to its process is not done to the tests' own
    monkeypatch.setattr(program, "set_up_logging", lambda: None)
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)

    def run(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


# --- ls and show ------------------------------------------------------------------------------------------------------


def test_ls_lists_what_is_published_and_nothing_else(store, chain, zhllama):
    storage.write_bytes(f"{store}/pretrain/{'e' * 32}/model.bin", b"of a stage that was killed")
    code, out, _ = zhllama("ls", store)
    assert code == 0
    listed = [line.split()[-1] for line in out.splitlines()]
    assert sorted(listed) == sorted(one.reference for one in chain.values())
    (line,) = [line for line in out.splitlines() if "hf-model" in line]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d  hf-model +8\.4 MB  6 parameters", line)
    _, out, _ = zhllama("ls", store, "--kind", "adapter", "--json")
    (found,) = json.loads(out)
    assert (found["reference"], found["stage"]) == (chain["adapter"].reference, "pretrain")


def test_ls_says_what_manifest_is_damaged(store, chain, zhllama):
    storage.write_bytes(chain["model"].reference, chain["model"].to_json().replace(b'"steps": 3', b'"steps": 4'))
    code, out, err = zhllama("ls", store)
    assert code == 0
    assert chain["model"].reference not in out
    assert "warning:" in err
    assert "the manifest was changed after it was written" in err


def test_show_says_what_an_artifact_is_and_where_it_came_from(store, chain, zhllama):
    code, out, _ = zhllama("show", chain["adapter"].root)
    assert code == 0
    for shown in (
        "adapter",
        chain["adapter"].digest,
        "large.bin",
        "8.4 MB",
        "steps",
        *(m.root for m in chain.values()),
    ):
        assert shown in out
    assert "hf://someone/llama" in out
    assert out.count(chain["weights"].reference) == 1
    assert "(as above)" in out


def test_show_gives_figures_six_digits_and_settings_all(tmp_path, zhllama):
    out = ArtifactWriter(str(tmp_path / "store"), "pretrain", "a" * 32, {"rate": 0.12345678901})
    out.add_bytes("x", b"x")
    out.facts["proof"] = {"relative": [0.00112934364005], "count": 1234567890}
    out.metrics |= {"loss": 2.71828182845904, "tensors": 16.0}
    _, shown, _ = zhllama("show", out.publish("adapter").reference)
    found = {line.split()[0]: " ".join(line.split()[1:]) for line in shown.splitlines() if line.strip()}
    assert found["rate"] == "0.12345678901"
    assert found["proof"] == '{"relative": [0.00112934], "count": 1234567890}'
    assert (found["loss"], found["tensors"]) == ("2.71828", "16")


def test_show_json_has_the_lineage_up_to_the_weights(store, chain, zhllama):
    _, out, _ = zhllama("show", chain["adapter"].reference, "--json")
    found = json.loads(out)
    assert found["manifest"]["digest"] == chain["adapter"].digest
    (model,) = [given for given in found["lineage"]["inputs"] if given["name"] == "model"]
    (weights,) = model["inputs"]
    (source,) = weights["inputs"]
    assert [model["stage"], weights["stage"]] == ["convert_weights", "fetch_weights"]
    assert (source["reference"], source["digest"]) == ("hf://someone/llama", "5" * 64)


def test_show_says_what_has_become_of_an_input(store, chain, zhllama):
    storage.delete(chain["weights"].reference)
    publish(store, "other", "f", "hf-model")
    replaced = publish(store, "other", "e", "hf-model")
    storage.write_bytes(chain["packed"].reference, replaced.to_json())
    _, out, _ = zhllama("show", chain["adapter"].reference, "--json")
    states = {given["name"]: given for given in json.loads(out)["lineage"]["inputs"]}
    assert states["dataset"]["state"] == "replaced since"
    assert states["model"]["inputs"][0]["state"] == "gone"


@pytest.mark.parametrize("command", ["ls", "gc"])
def test_where_no_run_has_been_a_store_has_to_be_named(zhllama, tmp_path, command):
    code, _, err = zhllama(command)
    assert code == 2
    assert "no run has been here; name a store" in err
    assert not (tmp_path / ".zhllama").exists()


@pytest.mark.parametrize("command", ["ls", "gc"])
def test_a_folder_that_is_not_there_is_no_empty_store(zhllama, tmp_path, command):
    (tmp_path / "a-file").touch()
    for address in (tmp_path / "stroe", tmp_path / "a-file"):
        code, out, err = zhllama(command, address)
        assert (code, out) == (2, "")
        assert f"{address}: no such folder; give a store: a folder, or an s3:// prefix" in err


@pytest.mark.parametrize("command", ["show", "verify"])
def test_what_is_no_artifact_is_one_line_and_exit_2(store, zhllama, command):
    code, _, err = zhllama(command, store)
    assert code == 2
    assert "no manifest.json is there; give the reference that a stage wrote" in err
    assert err.count("\n") == 1


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_reads_every_block(store, chain, zhllama):
    manifest = chain["model"]
    assert zhllama("verify", manifest.reference)[0] == 0
    content = bytearray(storage.read_bytes(f"{manifest.root}/large.bin"))
    content[-1] ^= 1
    storage.write_bytes(f"{manifest.root}/large.bin", bytes(content))
    storage.write_bytes(f"{manifest.root}/folder/small.bin", b"x")
    code, out, err = zhllama("verify", manifest.reference)
    assert code == 2
    assert "2 blocks are not as the manifest says" in err
    assert re.search(rf"large\.bin: bytes {BLOCK} to {BLOCK + 5}: \w+ \w+ expected, \w+ found", out)
    assert "small.bin: bytes 0 to 1" in out


def test_verify_names_a_file_that_is_gone(store, chain, zhllama):
    storage.delete(f"{chain['model'].root}/folder/small.bin")
    code, out, _ = zhllama("verify", chain["model"].reference)
    assert code == 2
    assert "folder/small.bin: the file is gone" in out


# --- gc ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def waste(store, chain) -> dict[str, int]:
    """What killed stages left, place → bytes; and files of somebody else in the same bucket."""
    key = "0" * 32
    places = {
        f"{store}/finetune/{key}": ["model.bin", ".kept/model.bin.json"],
        f"{store}/checkpoints/pretrain/{key}/step-00000500-1f2e3d4c": ["weights.safetensors"],
        chain["model"].root: [".large.bin.parts"],
    }
    for place, names in places.items():
        for name in names:
            storage.write_bytes(f"{place}/{name}", bytes(1000))
    for name in ("corpus/a.txt", "notes.txt", f"corpus/{key}.txt", f"corpus/{key}/b.txt", "Backup/x/y.bin"):
        storage.write_bytes(f"{store}/{name}", b"mine")
    found = {place: 1000 * len(names) for place, names in places.items()}
    if storage.is_s3(store):
        storage.Upload(f"{store}/merge_adapters/{key}/model.bin").put(1, bytes(3000))
        storage.Upload(f"{store}/corpus/upload.bin").put(1, bytes(3000))
        found[f"{store}/merge_adapters/{key}"] = 3000
    return found


def everything(store: str) -> set[str]:
    uploads = {one.uri for one in storage.unfinished(store)} if storage.is_s3(store) else set()
    return {f"{store}/{item.name}" for item in storage.listing(store, hidden=True)} | uploads


def test_gc_says_what_it_would_free_and_frees_nothing(store, waste, zhllama):
    before = everything(store)
    code, out, _ = zhllama("gc", store, "--dry-run", "--older-than", "0m", "--json")
    assert code == 0
    assert {one["where"]: one["bytes"] for one in json.loads(out)["unreferenced"]} == waste
    code, out, _ = zhllama("gc", store, "--dry-run", "--older-than", "0m")
    assert f"would free {sum(waste.values()) / 1000:.1f} kB in {len(waste)} places" in out
    assert all(place in out for place in waste)
    assert everything(store) == before


def test_gc_frees_the_waste_and_nothing_that_a_manifest_names_or_that_is_not_ours(store, chain, waste, zhllama):
    before = everything(store)
    assert zhllama("gc", store, "--older-than", "0m")[0] == 0
    freed = before - everything(store)
    assert len(freed) == (5 if storage.is_s3(store) else 4)
    assert all(any(uri.startswith(f"{place}/") for place in waste) for uri in freed)
    for manifest in chain.values():
        assert open_artifact(manifest.reference).find_corruption() == []
    assert "nothing to free" in zhllama("gc", store, "--older-than", "0m")[1]


def test_gc_says_that_a_store_does_not_list_uploads_and_frees_the_rest(s3_store, zhllama, monkeypatch):
    storage.write_bytes(f"{s3_store}/finetune/{'0' * 32}/model.bin", bytes(1000))
    with FaultyProxy(os.environ["ZHLLAMA_S3_ENDPOINT"]) as proxy:
        proxy.fault = lambda request: (
            Fault("status", status=501, code="NotImplemented") if request.kind == "uploads" else None
        )
        monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", proxy.endpoint)
        storage.forget_client()
        code, out, err = zhllama("gc", s3_store, "--older-than", "0m")
    assert code == 0
    assert "freed 1.0 kB in 1 place" in out
    assert "warning: unfinished uploads are not looked at, the store does not list them: " in err
    assert "NotImplemented" in err


def test_gc_leaves_what_is_young(store, waste, zhllama):
    before = everything(store)
    assert "nothing to free that is older than 7d" in zhllama("gc", store)[1]
    assert everything(store) == before


def test_gc_takes_the_newest_file_for_a_places_age(tmp_path):
    place = tmp_path / "pretrain" / ("0" * 32)
    place.mkdir(parents=True)
    now = datetime.now(UTC)
    for name, days in (("old.bin", 30), ("newest.bin", 3)):
        (place / name).write_bytes(b"x")
        moment = (now - timedelta(days=days)).timestamp()
        os.utime(place / name, (moment, moment))
    assert inventory.unreferenced(str(tmp_path), timedelta(days=4), now)[0] == []
    (found,) = inventory.unreferenced(str(tmp_path), timedelta(days=2), now)[0]
    assert inventory.shown_age(now - found.modified) == "3 d"


def test_gc_leaves_a_place_whose_manifest_cannot_be_read(store, chain, zhllama):
    storage.write_bytes(chain["model"].reference, b"{")
    before = everything(store)
    code, _, err = zhllama("gc", store, "--older-than", "0m")
    assert code == 0
    assert "not a zhllama manifest" in err
    assert everything(store) == before


def test_gc_leaves_a_stage_that_published_after_the_look(store):
    storage.write_bytes(f"{store}/pretrain/{'0' * 32}/large.bin", b"x")
    found, _ = inventory.unreferenced(store, timedelta(0), datetime.now(UTC) + timedelta(minutes=1))
    manifest = publish(store, "pretrain", "0", "adapter")
    assert inventory.free(found) == 0
    assert open_artifact(manifest.reference).find_corruption() == []


def test_gc_takes_the_durations_that_reap_takes(store, chain, zhllama):
    for text in ("90s", "2w"):
        assert zhllama("gc", store, "--dry-run", "--older-than", text)[0] == 0
    code, _, err = zhllama("gc", store, "--dry-run", "--older-than", "7")
    assert (code, "--older-than 7: write a number and a unit" in err) == (2, True)


# --- cp ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_s3", [False, True], ids=["to a folder", "to S3"])
def test_cp_gives_the_same_artifact_at_another_place(store, chain, zhllama, s3_store, tmp_path, to_s3):
    target = f"{s3_store}/served/llama" if to_s3 else str(tmp_path / "served" / "llama")
    code, out, err = zhllama("cp", chain["model"].reference, target)
    assert code == 0, err
    assert f"{target}/manifest.json: 2 files" in out or f"{target}/manifest.json: 3 files" in out
    copied = open_artifact(target)
    assert copied.manifest.root == target
    assert copied.digest == chain["model"].digest
    assert copied.find_corruption() == []
    # again: it is there already
    assert zhllama("cp", chain["model"].reference, target)[0] == 0


def test_cp_does_not_write_over_another_artifact(store, chain, zhllama, tmp_path):
    target = str(tmp_path / "served")
    assert zhllama("cp", chain["model"].reference, target)[0] == 0
    code, _, err = zhllama("cp", chain["adapter"].reference, target)
    assert code == 2
    assert "another artifact is there" in err
    assert open_artifact(target).find_corruption() == []


def test_cp_publishes_no_damaged_copy(store, chain, zhllama, s3_store):
    storage.write_bytes(f"{chain['model'].root}/folder/small.bin", b"x")
    code, _, err = zhllama("cp", chain["model"].reference, f"{s3_store}/served")
    assert code in (1, 2)
    assert "small.bin: bytes 0 to 1" in err
    assert not storage.exists(f"{s3_store}/served/manifest.json")


# --- the program ------------------------------------------------------------------------------------------------------


def test_a_folder_needs_no_server_and_no_settings(tmp_path):
    manifest = publish(str(tmp_path), "pretrain", "a", "adapter")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    for words in (["ls", str(tmp_path)], ["show", manifest.reference], ["verify", manifest.reference]):
        command = [sys.executable, "-m", "pipelines", *words]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path.cwd())
        assert ended.returncode == 0, ended.stderr
        assert manifest.reference in ended.stdout


# --- what others wrote ------------------------------------------------------------------------------------------------


def of_another(private: Manifest, change: str) -> bytes:
    """A manifest that says a private artifact's place for its own."""
    value = json.loads(private.to_json(private.root))
    if change == "its own":
        return json.dumps(value).encode()
    # one that agrees with itself, and whose files have those names and sizes
    files = tuple(replace(file, sha256="", content="") for file in private.files)
    mine = replace(private, files=files, blocks="", stage="mine", format=private.format)
    mine = replace(mine, digest=mine.computed_digest())
    return mine.to_json(private.root)


@pytest.mark.parametrize("change", ["its own", "another"])
@pytest.mark.parametrize("stage", ["pretrain", "launch_training"])
def test_a_manifest_that_names_another_prefix_gets_nobody_to_read_it(s3_store, zhllama, tmp_path, change, stage):
    private = publish(f"{s3_store}/private", "fetch_weights", "a", "hf-model")
    attack = f"{s3_store}/attack"
    reference = f"{attack}/{stage}/{'b' * 32}/manifest.json"
    storage.write_bytes(reference, of_another(private, change))
    before = [item.name for item in storage.listing(f"{s3_store}/private")]
    for target in (f"{s3_store}/public/x", tmp_path / "public"):
        code, out, err = zhllama("cp", reference, target)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
    assert storage.listing(f"{s3_store}/public") == []
    assert not (tmp_path / "public").exists()
    for command in (("show", reference), ("verify", reference), ("show", reference, "--json")):
        assert zhllama(*command)[:2] == (2, "")
    _, out, _ = zhllama("ls", attack, "--json")
    assert "/private/" not in "".join(one["reference"] for one in json.loads(out))
    zhllama("gc", attack, "--older-than", "0s")
    assert [item.name for item in storage.listing(f"{s3_store}/private")] == before
    with pytest.raises(InputError):
        materialize(open_artifact(reference))
    # an artifact that was made of it does not read it either
    child = publish(attack, "merge", "c", "hf-model", model=Input(reference, private.digest))
    assert lineage(child).inputs[0].state


HOSTILE = "evil\x1b[2J\r\n\u202e\x9b1m\x07"
MARKUP = "[/x] [red]a[/red] :bus:"


def test_control_characters_of_a_manifest_are_shown_and_not_printed(store, zhllama):
    out = ArtifactWriter(store, "stage", "a" * 32, {"note": HOSTILE, HOSTILE: 3}, {})
    out.add_bytes("a.bin", b"1")
    out.facts |= {"summary": HOSTILE, "title": [HOSTILE]}
    made = out.publish(HOSTILE.replace("\n", ""))
    storage.write_bytes(f"{store}/stage/{'b' * 32}/manifest.json", json.dumps({"kind": HOSTILE}).encode())
    for command in (
        ("show", made.reference), ("show", made.reference, "--json"), ("ls", store), ("ls", store, "--json"),
        ("verify", made.reference), ("cp", made.reference, f"{store}/\x1b[31mcopy"), ("gc", store, "--dry-run"),
        ("verify", f"{store}/stage/{'b' * 32}"), ("show", f"{store}/\x1b[2Jnothing"),
    ):  # fmt: skip
        _, printed, said = zhllama(*command)
        raw = [one for one in printed + said if one in "\x1b\r\x07\x9b\u202e"]
        assert raw == [], command
    assert json.loads(zhllama("show", made.reference, "--json")[1])["manifest"]["facts"]["summary"] == HOSTILE


def test_names_of_others_are_no_markup(store, zhllama):
    store = f"{store}/{MARKUP}"
    out = ArtifactWriter(store, "fetch_weights", "a" * 32, {MARKUP: MARKUP}, {})
    out.add_bytes(f"{MARKUP}.bin", b"1")
    out.facts |= {"summary": MARKUP}
    made = out.publish("samples")
    storage.write_bytes(f"{store}/fetch_weights/{'b' * 32}/x.bin", b"2")
    for command in (("show", made.reference), ("ls", store), ("gc", store, "--dry-run", "--older-than", "0s")):
        code, printed, said = zhllama(*command)
        assert (code, said) == (0, ""), command
        assert MARKUP in printed, command


def test_ls_and_show_work_while_a_run_has_the_store(zhllama, tmp_path, monkeypatch):
    for name in ("ZHLLAMA_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    with s3_for(tmp_path / "work", "") as run_store:
        made = publish(run_store, "pretrain", "a", "adapter")
        # another shell knows nothing of the run's
        monkeypatch.delenv("ZHLLAMA_S3_ENDPOINT")
        storage.forget_client()
        for command in (("ls",), ("show", made.reference), ("verify", made.reference), ("gc", "--dry-run")):
            code, out, err = zhllama(*command, "--work", tmp_path / "work")
            assert (code, err) == (0, ""), command
            assert command[0] == "gc" or made.reference in out
        code, _, err = zhllama("gc", "--work", tmp_path / "work")
        assert code == 2
        assert "in use by another command" in err
