"""Text as documents, and instructions as items: read in order, and every fault named with its place."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.shared.artifact import Artifact, open_artifact
from components.shared.corpus import Document, read_documents
from components.shared.errors import InputError
from components.shared.instructions import read_instructions


def folder(root: Path, **files: bytes | str) -> Artifact:
    """A plain folder; `a_txt="…"` is the file a.txt."""
    for name, content in files.items():
        path = root / name.replace("_", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_artifact(str(root))


# --- text -------------------------------------------------------------------------------------------------------------


def test_documents_come_in_order_of_file_name_and_line(tmp_path):
    artifact = folder(
        tmp_path,
        b_txt="三\n",
        a_txt="一\n\n  \n二",
        c_jsonl='{"text": "四\\n五"}\n\n{"text": "六", "x": 1}\n',
        d_md="no",
    )
    assert list(read_documents(artifact)) == [
        Document("一", "a.txt", 1),
        Document("二", "a.txt", 4),
        Document("三", "b.txt", 1),
        Document("四\n五", "c.jsonl", 1),
        Document("六", "c.jsonl", 3),
    ]


def test_blank_lines_are_kept_when_asked_for(tmp_path):
    artifact = folder(tmp_path, a_txt="一\n\n二\n")
    assert [document.text for document in read_documents(artifact, keep_blank=True)] == ["一", "", "二"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path):
    artifact = folder(tmp_path, a_txt=b"\xef\xbb\xbf" + "一\r\n二\r\n".encode())
    assert [document.text for document in read_documents(artifact)] == ["一", "二"]


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1).filter(str.strip),
        min_size=1,
    )
)
def test_every_line_is_a_document_whatever_it_holds(tmp_path_factory, lines):
    artifact = folder(tmp_path_factory.mktemp("text"), a_txt="\n".join(lines))
    lines[0] = lines[0].removeprefix("\ufeff")
    assert [document.text for document in read_documents(artifact)] == [line for line in lines if line.strip()]


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({}, "nothing is there"),
        ({"a_md": "text"}, "no .txt or .jsonl file"),
        ({"a_txt": ""}, "the text files are empty"),
        ({"a_txt": "\n \n\t\n"}, "the text files are empty"),
        ({"a_txt": "一\n".encode() + b"\xff\xfe\n"}, "a.txt: line 2 is not UTF-8"),
        ({"a_txt": "中文".encode("gb18030")}, "a.txt: line 1 is not UTF-8"),
        ({"a_jsonl": '{"text": "一"}\n{'}, "a.jsonl: line 2 is not JSON"),
        ({"a_jsonl": '{"content": "一"}'}, "a.jsonl: line 1 has no text field"),
        ({"a_jsonl": '["一"]'}, "a.jsonl: line 1 has no text field"),
        ({"a_jsonl": '{"text": 5}'}, "a.jsonl: line 1 has no text field"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_in_the_text_is_named_with_its_place(tmp_path, files, line):
    with pytest.raises(InputError) as caught:
        list(read_documents(folder(tmp_path, **files)))
    assert line in str(caught.value)


# --- instructions -----------------------------------------------------------------------------------------------------

ITEM = {"instruction": "翻译", "input": "hello", "output": "你好"}


def test_items_come_in_order_from_lists_and_lines(tmp_path):
    artifact = folder(
        tmp_path,
        b_json=json.dumps([ITEM, {"instruction": "说", "output": "好"}], ensure_ascii=False),
        a_jsonl="\n".join(json.dumps({**ITEM, "output": str(number), "more": 1}) for number in range(2)) + "\n\n",
    )
    assert list(read_instructions(artifact)) == [
        {**ITEM, "output": "0"},
        {**ITEM, "output": "1"},
        ITEM,
        {"instruction": "说", "input": "", "output": "好"},
    ]


def test_one_file_is_read_alone(tmp_path):
    folder(tmp_path, a_json=json.dumps([ITEM]), b_json="{")
    assert list(read_instructions(open_artifact(str(tmp_path / "a.json")))) == [ITEM]


def test_a_byte_order_mark_is_no_fault(tmp_path):
    artifact = folder(tmp_path, a_json=b"\xef\xbb\xbf" + json.dumps([ITEM]).encode())
    assert list(read_instructions(artifact)) == [ITEM]


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"a_txt": "x"}, "no .json or .jsonl file"),
        ({"a_json": "[{"}, "a.json: not JSON"),
        ({"a_json": ""}, "a.json: not JSON"),
        ({"a_json": b"\xff\xfe["}, "a.json: not JSON"),
        ({"a_json": json.dumps(ITEM)}, "a.json: a dict where a list of objects"),
        ({"a_json": "[]"}, "no item in it"),
        ({"a_jsonl": "\n"}, "no item in it"),
        ({"a_json": json.dumps([ITEM, 5])}, "a.json: item 2: a int where an object"),
        ({"a_json": json.dumps([{"instruction": "x"}])}, "item 1: field 'output' is missing"),
        ({"a_json": json.dumps([{"output": "x"}])}, "item 1: field 'instruction' is missing"),
        ({"a_json": json.dumps([{**ITEM, "output": ["x"]}])}, "item 1: field 'output' is not text"),
        ({"a_json": json.dumps([{**ITEM, "instruction": " "}])}, "item 1: field 'instruction' is empty"),
        ({"a_jsonl": json.dumps(ITEM) + "\n{"}, "a.jsonl: line 2 is not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_in_the_instructions_is_named_with_its_place(tmp_path, files, line):
    with pytest.raises(InputError) as caught:
        list(read_instructions(folder(tmp_path, **files)))
    assert line in str(caught.value)
