"""Datasets of the Hub, streamed from a server on loopback: the commit is found, rows come in order, faults are named.

huggingface_hub reads its settings once, when it is imported, so each test reads in a program of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.zhllama.artifacts.hub_server import commit_of, hub_server
from zhllama.artifacts.hub_dataset import HubDataset
from zhllama.errors import InputError

TEXTS = [f"第{number}行" for number in range(300)]
ITEM = {"instruction": "翻译", "input": None, "output": "你好"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Three datasets: lines of JSON, Parquet with another column and splits, Alpaca items; and one of code."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("lines", "table", "items", "code"):
        (root / "team" / name).mkdir(parents=True)
    (root / "team/lines/train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for split in ("train", "test"):
        rows = pyarrow.table({"content": [f"{split} {text}" for text in TEXTS]})
        parquet.write_table(rows, root / f"team/table/{split}-00000-of-00001.parquet")
    (root / "team/items/train.json").write_text(json.dumps([ITEM] * 3, ensure_ascii=False))
    (root / "team/code/code.py").write_text("raise SystemExit('code was run')")
    return root


def read(hub: Path, home: Path, program: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a program whose imports are there, with the server as its Hub."""
    begin = (
        "from zhllama.artifacts.open import open_artifact\n"
        "from zhllama.data.corpus import read_documents\n"
        "from zhllama.data.instructions import read_instructions\n"
    )
    with hub_server(hub) as (address, _):
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"} | environment
        return subprocess.run(
            [sys.executable, "-c", begin + program], env={**os.environ, **settings}, capture_output=True, text=True
        )


def said(hub: Path, home: Path, program: str, **environment: str) -> str:
    done = read(hub, home, program, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_texts_of_a_dataset_are_streamed_in_order(hub, tmp_path):
    program = (
        "import json\n"
        "lines = open_artifact('hf://datasets/team/lines')\n"
        "table = open_artifact('hf://datasets/team/table?split=test&column=content')\n"
        "print(json.dumps([list(read_documents(one)) for one in (lines, table)]))\n"
        "print(lines.root)\n"
    )
    found, root = said(hub, tmp_path, program).splitlines()
    assert json.loads(found) == [TEXTS, [f"test {text}" for text in TEXTS]]
    assert root == f"hf://datasets/team/lines@{commit_of(hub / 'team/lines')}"
    assert not list((tmp_path / "datasets").rglob("*.arrow"))


@pytest.mark.slow
def test_items_of_a_dataset_are_read(hub, tmp_path):
    program = "print(len(list(read_instructions(open_artifact('hf://datasets/team/items')))))"
    assert said(hub, tmp_path, program) == "3\n"


@pytest.mark.slow
def test_a_changed_dataset_and_another_split_are_other_inputs(hub, tmp_path):
    program = (
        "print(open_artifact('hf://datasets/team/lines').digest)\n"
        "print(open_artifact('hf://datasets/team/lines?split=test').digest)\n"
    )
    before = said(hub, tmp_path, program).split()
    file = hub / "team/lines/train.jsonl"
    content = file.read_text()
    file.write_text(content + content)
    after = said(hub, tmp_path, program).split()
    file.write_text(content)
    assert len({*before, *after}) == 4
    assert said(hub, tmp_path, program).split() == before


BAD = {
    "team/none": "has no such dataset or revision",
    "team/lines@v9": "has no such dataset or revision",
    "team/lines?split=dev": "Bad split: dev. Available splits: ['train']",
    "team/lines?config=zz": "BuilderConfig 'zz' not found",
    "team/lines?column=content": "row 1 has nothing where text is needed ('content')",
    "team/code": "scripts are no longer supported",
}


@pytest.mark.slow
def test_datasets_that_cannot_be_read_are_named(hub, tmp_path):
    program = (
        "from zhllama.errors import InputError\n"
        f"for address in {list(BAD)!r}:\n"
        "    try:\n"
        "        list(read_documents(open_artifact(f'hf://datasets/{address}', '--text')))\n"
        "    except InputError as error:\n"
        "        print(error)\n"
    )
    found = said(hub, tmp_path, program).splitlines()
    assert len(found) == len(BAD)
    for line, (address, complaint) in zip(found, BAD.items(), strict=True):
        assert complaint in line
        assert f"hf://datasets/{address.split('@')[0].split('?')[0]}" in line


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_a_fault_and_offline_is_input(hub, tmp_path):
    program = (
        "try:\n"
        "    open_artifact('hf://datasets/team/lines', '--text')\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    assert said(hub, tmp_path, program, HF_ENDPOINT="http://127.0.0.1:9").startswith("StorageFault --text hf://")
    assert "InputError --text hf://datasets/team/lines: HF_HUB_OFFLINE is set" in said(
        hub, tmp_path, program, HF_HUB_OFFLINE="1"
    )


@pytest.mark.parametrize(
    "address", ["hf://datasets/lonely", "hf://datasets/a/b/c", "hf://datasets/a/b?file=x", "hf://datasets/"]
)
def test_an_address_of_another_shape_is_refused(address):
    with pytest.raises(InputError, match=r"write hf://datasets/OWNER/NAME"):
        HubDataset.parse(address)


def test_an_address_says_what_differs_from_the_ordinary():
    address = "hf://datasets/a/b@v1?config=zh&column=content"
    assert HubDataset.parse(address).address == address
    assert HubDataset.parse("hf://datasets/a/b").address == "hf://datasets/a/b@main"
