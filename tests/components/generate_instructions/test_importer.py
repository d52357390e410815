"""Public data sets in their usual forms give the same items; what is broken in them is counted, not fatal."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from components.generate_instructions.catalogue import load_catalogue
from components.generate_instructions.dedup import Seen
from components.generate_instructions.generator import generate_instructions
from components.generate_instructions.harvest import Harvest
from components.generate_instructions.importer import alpaca_of, import_items
from components.generate_instructions.options import GenerateInstructions
from tests.zhllama.artifacts.hub_server import hub_server
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.data.instructions import read_instructions
from zhllama.errors import InputError
from zhllama.stage.run import run_stage

ITEMS = [
    {"instruction": "写一首关于春天的诗", "input": "", "output": "春风吹绿了江南岸。"},
    {"instruction": "把句子翻译成英文", "input": "今天天气很好", "output": "The weather is fine today. 仅供参考。"},
    {"instruction": "列出五个省的名字", "input": "", "output": "河北、山西、江苏、浙江、安徽。"},
]
PAIRS = [{"prompt": one["instruction"], "context": one["input"], "response": one["output"]} for one in ITEMS]
SHAREGPT = [
    {
        "id": str(number),
        "conversations": [
            {"from": "system", "value": "你是助手"},
            {"from": "human", "value": one["instruction"]},
            {"from": "gpt", "value": one["output"]},
            {"from": "human", "value": "再来一个"},
            {"from": "gpt", "value": "好的，再来一个。"},
        ],
    }
    for number, one in enumerate(ITEMS)
]
MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": one["instruction"]},
            {"role": "assistant", "content": one["output"]},
        ]
    }
    for one in ITEMS
]


def imported(source: Path | str, store: Path | str, **more: Any) -> Manifest:
    return run_stage(GenerateInstructions(store=str(store), import_from=str(source), **more), generate_instructions)


def items_of(manifest: Manifest) -> list[dict[str, str]]:
    return list(read_instructions(open_artifact(manifest.reference)))


def card_of(manifest: Manifest) -> dict[str, Any]:
    return json.loads(open_artifact(manifest.reference).read("card.json"))  # type: ignore[no-any-return]


def lines(records: list[Any]) -> bytes:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()


def parquet(records: list[Any]) -> bytes:
    import io

    import pyarrow
    from pyarrow import parquet as format

    made = io.BytesIO()
    format.write_table(pyarrow.Table.from_pylist(records), made)
    return made.getvalue()


def damaged(content: bytes) -> bytes:
    """The first page's bytes are overwritten; the footer says nothing of it."""
    return content[:4] + b"\xff" * 300 + content[304:]


def listed(records: Any) -> bytes:
    return json.dumps(records, ensure_ascii=False).encode()


FORMS = {
    "alpaca.json": listed(ITEMS),
    "alpaca.jsonl": lines(ITEMS),
    "lines-in.json": lines(ITEMS),
    "bom.json": b"\xef\xbb\xbf" + listed(ITEMS),
    "wrapped.json": listed({"version": 1, "data": ITEMS}),
    "pairs.json": listed(PAIRS),
    "alpaca.jsonl.gz": gzip.compress(lines(ITEMS)),
    "alpaca.json.gz": gzip.compress(listed(ITEMS)),
    "alpaca.parquet": parquet(ITEMS),
    "sharegpt.json": listed(SHAREGPT),
    "sharegpt.jsonl": lines(SHAREGPT),
    "messages.jsonl": lines(MESSAGES),
    "sharegpt.parquet": parquet(SHAREGPT),
    "messages.parquet": parquet(MESSAGES),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_items(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source" / name
    source.parent.mkdir()
    source.write_bytes(FORMS[name])
    manifest = imported(source, tmp_path / "store")
    with_input = not name.startswith(("sharegpt", "messages"))
    wanted: list[dict[str, Any]] = [{**item, "input": item["input"] if with_input else ""} for item in ITEMS]
    if name.startswith("sharegpt"):
        wanted = [
            {
                "instruction": "再来一个", "input": "", "output": "好的，再来一个。", "system": "你是助手",
                "history": [[item["instruction"], item["output"]]],
            }
            for item in ITEMS
        ]  # fmt: skip
    assert items_of(manifest) == wanted
    form = "alpaca" if with_input else "conversation"
    assert card_of(manifest)["records"] == {"alpaca": 0, "conversation": 0, "unknown": 0} | {form: 3}


def test_a_store_of_either_kind_is_read_and_written(store: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ITEMS))
    assert items_of(imported(tmp_path / "a.jsonl", store)) == ITEMS


def test_a_list_on_one_line_is_streamed(tmp_path: Path) -> None:
    size = 48 * 2**20
    with open(tmp_path / "a.json", "wb") as file:
        file.write(b"[" + listed(ITEMS[0]) + b", " + listed(ITEMS[1]))
        while file.tell() < size:
            file.write(b", " + listed({"text": "x" * 2**20}))
        file.write(b"]")
    harvest = Harvest(load_catalogue(), Seen(), 2)
    tracemalloc.start()
    try:
        forms = import_items(open_artifact(str(tmp_path)), harvest)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert harvest.items == ITEMS[:2]
    assert forms == {"alpaca": 2, "conversation": 0, "unknown": 0}
    # some blocks of 8 MiB, never the line
    assert peak < size / 2


def test_several_sources_are_one_and_what_is_dropped_is_reported(tmp_path: Path) -> None:
    bad: list[Any] = [
        {"instruction": "写诗", "output": ""},
        {"instruction": "你好吗，请介绍自己", "output": "作为一个AI语言模型，我没有感受。"},
        {"text": "no item at all"},
        ["a list"],
        {"conversations": [{"from": "gpt", "value": "我先说"}]},
        {"conversations": [{"from": "human", "value": "请你先说一句话"}]},
        {"conversations": "none"},
        {"instruction": "What is it?", "output": "It is a thing."},
        {"instruction": "写一首关于春天的诗。", "output": "同样的问题。"},
    ]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jsonl").write_bytes(lines([*ITEMS, *bad]) + b"\n{broken\n\n\xff\xfe\n")
    (tmp_path / "b.json").write_bytes(listed([ITEMS[0], {"instruction": "解释光合作用", "output": "植物制造养分。"}]))
    manifest = imported(f"{tmp_path / 'a'},{tmp_path / 'b.json'}", tmp_path / "store")
    assert [item["instruction"][:2] for item in items_of(manifest)] == ["写一", "把句", "列出", "解释"]
    card = card_of(manifest)
    assert {rule: count for rule, count in card["fallen"].items() if count} == {
        "unreadable": 3, "conversation": 1, "no instruction": 2, "no output": 2, "speaks as a model": 1,
        "language": 1, "exact duplicate": 2,
    }  # fmt: skip
    assert sum(card["records"].values()) == 16 == len(items_of(manifest)) + sum(card["fallen"].values())
    assert manifest.facts["summary"] == "4 items, 12 left out, of 16 records"


def test_items_limit_an_import_and_against_keeps_clear_of_others(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(listed(ITEMS))
    (tmp_path / "seen.json").write_bytes(listed([{**ITEMS[0], "instruction": "写一首关于春天的小诗"}]))
    manifest = imported(tmp_path / "a.json", tmp_path / "store", items=1, against=str(tmp_path / "seen.json"))
    assert items_of(manifest) == [ITEMS[1]]
    assert card_of(manifest)["ended"] == "items"


def test_what_was_imported_can_be_imported_again_and_seed_a_generation(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(listed(ITEMS))
    first = imported(tmp_path / "a.json", tmp_path / "store")
    assert items_of(imported(first.reference, tmp_path / "store")) == ITEMS


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_imported(tmp_path: Path) -> None:
    """In a program of its own: huggingface_hub reads its settings when it is imported."""
    (tmp_path / "hub/team/chats").mkdir(parents=True)
    (tmp_path / "hub/team/chats/train.jsonl").write_bytes(lines(MESSAGES))
    words = [sys.executable, "-m", "components.generate_instructions", "--store", str(tmp_path / "store")]
    with hub_server(tmp_path / "hub") as (address, _):
        there = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        words += ["--import-from", "hf://datasets/team/chats", "--reference", str(tmp_path / "reference")]
        done = subprocess.run(words, env=there, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = list(read_instructions(open_artifact((tmp_path / "reference").read_text())))
    assert found == [{**item, "input": ""} for item in ITEMS]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.txt", b"text", "no .json, .jsonl, .parquet file in it"),
        ("a.json", b"text", "a.json: not JSON; a list of objects"),
        ("a.json", b'[{"instruction": "x"', "a.json: not JSON"),
        ("a.jsonl.gz", gzip.compress(lines(ITEMS))[:-9], "cannot be decompressed"),
        ("a.json.gz", gzip.compress(listed(ITEMS))[:-9], r"a\.json\.gz: cannot be decompressed .*; compress it again"),
        ("b.json.gz", gzip.compress(lines(ITEMS))[:-9], r"b\.json\.gz: cannot be decompressed .*; compress it again"),
        ("c.json.gz", listed(ITEMS), r"c\.json\.gz: cannot be decompressed .*; compress it again"),
        ("a.json", b'{"instruction": "x\\ud83d"}\n' + lines(ITEMS), "a.json: not JSON .more stands behind its end"),
        ("a.json", b'{"name": "x", "number": 1}', "a.json: a dict where a list of objects"),
        ("a.parquet", b"PAR1 and no more", "a.parquet: not a Parquet file"),
        ("a.parquet", damaged(parquet(ITEMS * 500)), "a.parquet: not a Parquet file"),
        ("a.json", b"[]", "no item is left .there are no records"),
        ("a.json", listed([{"instruction": "写诗", "output": ""}] * 3), r"no item is left \(3 no output\)"),
    ],
    ids=[
        "text",
        "no JSON",
        "cut off",
        "cut gzip",
        "cut gzip of a list",
        "cut gzip of lines in .json",
        "no gzip",
        "half a character in the first line",
        "an object without lists",
        "no parquet",
        "a damaged page",
        "empty",
        "nothing left",
    ],
)
def test_what_cannot_be_imported_is_named(tmp_path: Path, name: str, content: bytes, line: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=line):
        imported(tmp_path / name, tmp_path / "store")
    assert not list((tmp_path / "store").rglob("*.json"))


def test_a_conversation_that_begins_otherwise_gives_no_item() -> None:
    value, form = alpaca_of({"messages": [{"role": "assistant", "content": "你好"}, {"role": "user", "content": "好"}]})
    assert form == "conversation"
    assert "it begins with an answer" in str(value)


TURNS = [
    {"from": "human", "value": "写一首关于春天的诗"},
    {"from": "gpt", "value": "春风吹绿了江南岸。"},
    {"from": "human", "value": "谢谢"},
    {"from": "gpt", "value": "不客气。"},
]


def test_a_conversation_is_taken_up_to_its_last_answer() -> None:
    value, _ = alpaca_of({"conversations": TURNS[:3]})
    assert value == {"instruction": TURNS[0]["value"], "input": "", "output": TURNS[1]["value"], "history": []}


def test_alpacas_history_and_system_are_imported() -> None:
    pair = [TURNS[0]["value"], TURNS[1]["value"]]
    value, form = alpaca_of({"prompt": "谢谢", "response": "不客气。", "history": [pair], "system": "你是助手"})
    assert form == "alpaca"
    assert value == {"instruction": "谢谢", "input": "", "output": "不客气。", "system": "你是助手", "history": [pair]}


@pytest.mark.parametrize(
    ("turn", "rule"),
    [
        ({"from": "tool", "value": "42"}, "conversation"),
        ({"from": "gpt", "value": "作为一个AI语言模型，我没有感受。"}, "speaks as a model"),
        ({"from": "gpt", "value": "好" * 5000}, "output length"),
        ({"from": "gpt", "value": "坏\ufffd"}, "unreadable"),
    ],
    ids=["a tool", "speaks as a model", "long", "lost"],
)
def test_every_turn_of_a_conversation_is_held_to_the_rules(turn: dict[str, str], rule: str) -> None:
    harvest = Harvest(load_catalogue(), Seen())
    value, _ = alpaca_of({"conversations": [TURNS[0], turn, *TURNS[2:]]})
    assert not harvest.take(value)
    assert {name for name, count in harvest.fallen.items() if count} == {rule}
    assert harvest.samples[rule]


def test_conversations_that_end_alike_are_no_duplicates() -> None:
    harvest = Harvest(load_catalogue(), Seen())
    other = [{"from": "human", "value": "列出五个省的名字"}, {"from": "gpt", "value": "河北、山西、江苏。"}]
    assert all(harvest.take(alpaca_of({"conversations": begin + TURNS[2:]})[0]) for begin in (TURNS[:2], other))
    assert not harvest.take(alpaca_of({"conversations": TURNS})[0])


def test_conversations_are_no_examples_of_a_request(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(listed(ITEMS))
    (tmp_path / "seeds.json").write_bytes(listed([{"conversations": TURNS}]))
    with pytest.raises(InputError, match=r"--seeds .*seeds.json: item 1: a conversation cannot be shown"):
        imported(tmp_path / "a.json", tmp_path / "store", seeds=str(tmp_path / "seeds.json"))
