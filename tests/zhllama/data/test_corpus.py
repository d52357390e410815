"""Text as documents, and instructions as items: read in order, and every fault named with its place."""

import gzip
import io
import json
import random
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from zhllama import storage
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.data import corpus, json_values, text_stream
from zhllama.data.corpus import Skipped, choose_texts, read_documents, text_files
from zhllama.data.instructions import read_instructions
from zhllama.data.text_stream import bytes_to_read
from zhllama.errors import InputError


def folder(root: Path, **files: bytes | str) -> Artifact:
    """A plain folder; `a_txt="…"` is the file a.txt."""
    root.mkdir(exist_ok=True)
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
    assert list(read_documents(artifact)) == ["一", "二", "三", "四\n五", "六"]


def test_blank_lines_are_kept_when_asked_for(tmp_path):
    artifact = folder(tmp_path, a_txt="一\n\n二\n")
    assert list(read_documents(artifact, keep_blank=True)) == ["一", "", "二"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path):
    artifact = folder(tmp_path, a_txt=b"\xef\xbb\xbf" + "一\r\n二\r\n".encode())
    assert list(read_documents(artifact)) == ["一", "二"]


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1).filter(str.strip),
        min_size=1,
    )
)
def test_every_line_is_a_document_whatever_it_holds(tmp_path_factory, lines):
    artifact = folder(tmp_path_factory.mktemp("text"), a_txt="\n".join(lines))
    lines[0] = lines[0].removeprefix("\ufeff")
    assert list(read_documents(artifact)) == [line for line in lines if line.strip()]


@pytest.mark.parametrize("size", [1, 7, 40, 2**19])
def test_a_fault_in_one_block_of_lines_does_not_move_the_numbers_of_others(tmp_path, monkeypatch, size):
    monkeypatch.setattr(text_stream, "LINES_BYTES", size)
    lines = ["一", "", "\t", "二" * 30, "\r", "三\r\r", "bad", "", "四"]
    raw = [line.encode() if line != "bad" else b"bad \xff" for line in lines]
    artifact = folder(tmp_path, a_txt=b"\n".join(raw), b_txt=b"\xef\xbb\xbf\n" + b"\n".join(raw) + b"\n\n")
    skipped = Skipped()
    found = list(read_documents(artifact, keep_blank=True, skipped=skipped))
    plain = [line.rstrip("\r") for line in lines if line != "bad"]
    assert found == [*plain, "", *plain, ""]
    assert [fault.split(": ")[1][:14] for fault in skipped.first] == ["line 7 is not ", "line 8 is not "]


def zstd(content: bytes) -> bytes:
    """One frame, as the command `zstd` writes it."""
    made = io.BytesIO()
    with pyarrow.CompressedOutputStream(pyarrow.PythonFile(made, mode="w"), "zstd") as stream:
        stream.write(content)
        held = made  # closing the stream closes the file: its content is taken by then
        made.close = lambda: None  # type: ignore[method-assign]
    return held.getvalue()


def table(path: Path, **columns: list) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=400)
    return path


LINES = [f"第{number}行，压缩过的。" for number in range(2500)]


@pytest.mark.parametrize("compressed", [gzip.compress, zstd], ids=["gz", "zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_compressed_text_is_read_as_the_text(tmp_path, compressed, kind):
    plain = LINES if kind == "txt" else [json.dumps({"text": line}) for line in LINES]
    content = "\n".join(plain).encode()
    suffix = {gzip.compress: "gz", zstd: "zst"}[compressed]
    # two frames, one after the other, as parallel compressors write them
    (tmp_path / f"a.{kind}.{suffix}").write_bytes(compressed(content[:5000]) + compressed(content[5000:]))
    artifact = open_artifact(str(tmp_path))
    assert list(read_documents(artifact)) == LINES
    assert bytes_to_read([artifact], text_files) is None


def test_a_total_is_known_when_every_size_is(tmp_path):
    known = folder(tmp_path, a_txt="abc", b_txt="d")
    (tmp_path / "table").mkdir()
    table = folder(tmp_path / "table", a_parquet=b"")
    assert bytes_to_read([known, known], text_files) == 8
    assert bytes_to_read([known, table, known], text_files) is None


@pytest.mark.parametrize("compressed", [gzip.compress, zstd], ids=["gz", "zst"])
@pytest.mark.parametrize(
    "broken", [lambda content: content[:-20], lambda content: b"no" + content], ids=["short", "other"]
)
def test_a_damaged_compressed_file_is_named(tmp_path, compressed, broken):
    name = {gzip.compress: "a.txt.gz", zstd: "a.txt.zst"}[compressed]
    (tmp_path / name).write_bytes(broken(compressed("\n".join(LINES).encode())))
    with pytest.raises(InputError, match=rf"{name}: cannot be decompressed .*; compress it again"):
        list(read_documents(open_artifact(str(tmp_path))))


def test_a_parquet_file_is_read_row_by_row(tmp_path):
    table(tmp_path / "a.parquet", number=list(range(2500)), text=LINES)
    found = list(read_documents(open_artifact(str(tmp_path))))
    assert found == LINES


def test_a_parquet_file_in_s3_is_read_by_range(s3_store, tmp_path):
    content = table(tmp_path / "a.parquet", text=LINES).read_bytes()
    storage.write_bytes(f"{s3_store}/a.parquet", content)
    assert list(read_documents(open_artifact(s3_store))) == LINES


def test_a_table_without_text_says_what_it_has(tmp_path):
    table(tmp_path / "a.parquet", content=LINES, title=LINES)
    with pytest.raises(InputError, match=r"a.parquet: no column text \(it has content, title\)"):
        list(read_documents(open_artifact(str(tmp_path))))


def test_an_empty_cell_is_named_by_its_row(tmp_path):
    table(tmp_path / "a.parquet", text=["一", None, "三"])
    with pytest.raises(InputError, match=r"a.parquet: row 2 has nothing where text is needed"):
        list(read_documents(open_artifact(str(tmp_path))))


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = table(tmp_path / "a.parquet", text=LINES)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"a.parquet: not a Parquet file, or a damaged one"):
        list(read_documents(open_artifact(str(tmp_path))))


def test_lines_that_cannot_be_read_are_skipped_on_request_and_counted(tmp_path):
    table(tmp_path / "d.parquet", text=["七", None])
    artifact = folder(
        tmp_path,
        a_txt="一\n".encode() + b"\xff\xfe\n" + "二\n".encode(),
        b_jsonl='{"text": "三"}\n{\n{"content": "x"}\n\n{"text": 4}\n{"text": "五"}\n',
    )
    skipped = Skipped()
    assert list(read_documents(artifact, skipped=skipped)) == ["一", "二", "三", "五", "七"]
    assert skipped.count == 5
    assert "a.txt: line 2 is not UTF-8" in skipped.first[0]


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
        ({"a_jsonl": '{"a":' * 100_000}, "a.jsonl: line 1 is not JSON (it is nested too deeply)"),
        ({"a_jsonl": '{"content": "一"}'}, "a.jsonl: line 1 has nothing where text is needed"),
        ({"a_jsonl": '{"text": 5}'}, "a.jsonl: line 1 has a int where text is needed"),
        ({"a_jsonl": '[["一"]]'}, "a.jsonl: item 1 has a list where text is needed"),
        (
            {"a_jsonl": '{"text": "\\ud83e\\udd17"}\n{"text": "\\ud83e"}'},
            "a.jsonl: line 2 has half of a surrogate pair",
        ),
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


def test_an_absent_input_may_be_null(tmp_path):
    artifact = folder(tmp_path, a_json=json.dumps([{**ITEM, "input": None}]))
    assert list(read_instructions(artifact)) == [{**ITEM, "input": ""}]


@pytest.mark.parametrize("compressed", [gzip.compress, zstd], ids=["gz", "zst"])
def test_compressed_items_are_read(tmp_path, compressed):
    suffix = {gzip.compress: "gz", zstd: "zst"}[compressed]
    (tmp_path / f"a.json.{suffix}").write_bytes(compressed(json.dumps([ITEM] * 500, indent=1).encode()))
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(compressed((json.dumps(ITEM) + "\n").encode() * 500))
    assert list(read_instructions(open_artifact(str(tmp_path)))) == [ITEM] * 1000


def test_items_that_cannot_be_read_are_skipped_on_request_and_counted(tmp_path):
    artifact = folder(
        tmp_path,
        a_json=json.dumps([ITEM, 5, {"instruction": "x"}]),
        b_jsonl=json.dumps(ITEM) + "\n{\n",
    )
    skipped = Skipped()
    assert list(read_instructions(artifact, skipped=skipped)) == [ITEM, ITEM]
    assert skipped.count == 3
    assert "a.json: item 2: a int" in skipped.first[0]


def test_a_long_list_is_read_in_the_memory_of_a_few_blocks(tmp_path):
    item = json.dumps({**ITEM, "output": "好" * 3000}, ensure_ascii=False)
    artifact = folder(tmp_path, a_json="[" + ",\n".join([item] * 7000) + "]")
    size = (tmp_path / "a.json").stat().st_size
    tracemalloc.start()
    assert sum(1 for _ in read_instructions(artifact)) == 7000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 60e6
    assert peak < 35e6


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
        ({"a_json": json.dumps({"data": [ITEM]})}, "a.json: a dict where a list of objects"),
        ({"a_json": "[]"}, "no item in it"),
        ({"a_jsonl": "\n"}, "no item in it"),
        ({"a_json": json.dumps([ITEM, 5])}, "a.json: item 2: a int where an object"),
        ({"a_json": json.dumps([{"instruction": "x"}])}, "item 1: field 'output' is missing"),
        ({"a_json": json.dumps([{"output": "x"}])}, "item 1: field 'instruction' is missing"),
        ({"a_jsonl": json.dumps({**ITEM, "input": "\ud83e"})}, "a.jsonl: line 1 has half of a surrogate pair"),
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


# --- one reader for lists and lines -----------------------------------------------------------------------------------

GOOD = '{"instruction": "问\\ud83d\\ude00", "input": "", "output": "答"}'
BAD = '{"instruction": "\\u5f88\\u597d\\ud83d\\uff0c\\u8c22", "input": "", "output": "答"}'
FORMS = {
    "list": ("a_json", "[{}, {}]"), "lines": ("a_jsonl", "{}\n{}\n"), "lines named json": ("a_json", "{}\n{}\n"),
    "list named jsonl": ("a_jsonl", "[\n{},\n{}\n]"), "list behind a mark": ("a_json", "\ufeff [{},{}] \n"),
}  # fmt: skip


UNUSABLE = {
    "half of a surrogate pair": BAD, "it has 'input' twice": GOOD.replace("{", '{"input": "x", '),
    "Exceeds the limit": GOOD.replace("{", '{"number": ' + "1" * 10**6 + ", "),
    "nested too deeply": GOOD.replace("{", '{"deep": ' + "[" * 150 + "]" * 150 + ", "),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("why", UNUSABLE)
def test_what_cannot_be_used_is_refused_in_every_form(tmp_path, form, why):
    name, shape = FORMS[form]
    artifact = folder(tmp_path, **{name: shape.format(GOOD, UNUSABLE[why])})
    with pytest.raises(InputError, match=rf"(item|line) [23].*{why}"):
        list(read_instructions(artifact))
    skipped = Skipped()
    assert [item["instruction"] for item in read_instructions(artifact, skipped=skipped)] == ["问😀"]
    assert skipped.count == 1


@pytest.mark.parametrize("form", FORMS)
def test_items_are_read_in_every_form_piece_by_piece(tmp_path, monkeypatch, form):
    name, shape = FORMS[form]
    monkeypatch.setattr(json_values, "_PIECE", 7)
    artifact = folder(tmp_path, **{name: shape.format(GOOD, GOOD.replace("答", "答案是 1"))})
    assert [item["output"] for item in read_instructions(artifact)] == ["答", "答案是 1"]


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(_JSON, max_size=4), st.sampled_from([1, 2, 7, 2**18]), st.booleans(), st.sampled_from([None, 1]))
def test_a_list_is_read_as_the_standard_library_reads_it(tmp_path_factory, values, piece, ascii_only, indent):
    content = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
    artifact = folder(tmp_path_factory.mktemp("list"), a_json=content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_PIECE", piece)
        found = [value for _, value in json_values.values_in(artifact, "a.json", "", lambda one: True)]
    assert found == values


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('[{"instruction": "问"', "not JSON .Expecting ',' delimiter, at character"),
        ("[{\"instruction\": '问'}]", "not JSON .Expecting value, at character 18"),
        ("[] x", "more stands behind its end"),
        (f"[{GOOD} {GOOD}]", ", is missing"),
        (b'[{"instruction": "\xff"}]', "not UTF-8"),
        ("<html>", "a page .HTML or XML. in place of the file"),
        ("version https://git-lfs.github.com/spec/v1\noid", "a git-lfs pointer"),
        ('{"data": []}', "a dict where a list of objects"),
    ],
    ids=lambda given: str(given)[:14],
)
def test_what_is_no_list_is_refused_with_the_place(tmp_path, content, line):
    with pytest.raises(InputError, match=line):
        list(read_instructions(folder(tmp_path, a_json=content)))


def test_json_lines_of_text_are_read_whatever_their_name(tmp_path):
    lines = '{"text": "一"}\n{"text": "二"}\n'
    assert list(read_documents(folder(tmp_path, a_json=lines))) == ["一", "二"]
    assert list(read_documents(folder(tmp_path, a_json='[{"text": "一"}, {"text": "二"}]'))) == ["一", "二"]
    # beside text, it is something else
    assert list(read_documents(folder(tmp_path, a_json='{"card": 1}', b_txt="三"))) == ["三"]


def test_a_list_of_text_is_read_whatever_its_name(tmp_path):
    assert list(read_documents(folder(tmp_path, a_jsonl='[{"text": "一"},\n{"text": "二"}]'))) == ["一", "二"]


def test_a_single_line_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(InputError, match=r"a.json: line 1 has half of a surrogate pair"):
        list(read_documents(folder(tmp_path, a_json='{"text": "\\ud83d，"}\n')))


@pytest.mark.parametrize("size", [8, 2**19])
def test_a_line_that_is_too_long_is_named_and_left_out(tmp_path, monkeypatch, size):
    monkeypatch.setattr(text_stream, "LINES_BYTES", size)
    monkeypatch.setattr(text_stream, "LONGEST", 20 if size == 8 else 2**20)
    long = "x" * (100 if size == 8 else 3 * 2**20)
    artifact = folder(tmp_path, a_txt=f"1\n2\n{long}\n4\nbad \x00\n{long}", b_jsonl=f'{{"text": "5"}}\n"{long}"\n')
    with pytest.raises(InputError, match=r"a.txt: line 3 has over [\d,]+ bytes; cut the document into several lines"):
        list(read_documents(artifact))
    skipped = Skipped()
    assert list(read_documents(artifact, skipped=skipped)) == ["1", "2", "4", "bad \x00", "5"]
    assert [fault.split(": ")[1][:6] for fault in skipped.first] == ["line 3", "line 6", "line 2"]


def test_a_row_and_an_item_that_are_too_long_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST", 1000)
    table(tmp_path / "a.parquet", text=["一", "x" * 1001])
    with pytest.raises(InputError, match="row 2 has over 1,000 characters; cut the document"):
        list(read_documents(open_artifact(str(tmp_path))))
    monkeypatch.setattr(json_values, "LONGEST", 1000)
    (tmp_path / "b.json").write_text('[{"instruction": "' + "x" * 2**20)
    with pytest.raises(InputError, match="an item of more than 1,000 characters"):
        list(read_instructions(open_artifact(str(tmp_path / "b.json"))))


def test_a_table_whose_text_is_not_utf8_is_refused(tmp_path):
    column = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="not a Parquet file, or a damaged one"):
        list(read_documents(open_artifact(str(tmp_path))))


# --- a bounded part of a text, the same on every machine --------------------------------------------------------------

TEXTS = st.lists(st.text(min_size=1, max_size=30).filter(lambda text: text.isprintable()), max_size=40)


@pytest.mark.slow
@given(TEXTS, st.integers(1, 400), st.randoms(use_true_random=False))
def test_the_same_texts_are_chosen_whatever_their_order(found: list[str], limit: int, order: random.Random) -> None:
    shuffled = list(found)
    order.shuffle(shuffled)
    assert choose_texts(found, limit) == choose_texts(shuffled, limit)


@given(TEXTS, st.integers(1, 400))
def test_chosen_texts_fill_the_limit_and_never_pass_it(found: list[str], limit: int) -> None:
    chosen = choose_texts(found, limit)
    size = sum(len(text.encode()) for text in chosen)
    available = sum(len(text.encode()) for text in set(found))
    # a cut may leave up to three bytes of a character unused
    assert min(limit, available) - 3 <= size <= limit


def test_a_text_longer_than_the_limit_is_cut_between_characters() -> None:
    assert choose_texts(["汉字" * 50], 10) == ["汉字汉"]
