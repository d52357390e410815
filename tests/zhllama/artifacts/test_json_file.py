"""JSON of other programs: an object, or a reason that can be said."""

import os

import pytest

from zhllama.artifacts import json_file
from zhllama.artifacts.json_file import object_of, read_object
from zhllama.artifacts.open import open_artifact
from zhllama.errors import InputError


def test_an_object_is_read_as_it_is():
    assert object_of(b'{"r": 8, "targets": ["q_proj"], "more": {"a": null}}') == {
        "r": 8, "targets": ["q_proj"], "more": {"a": None},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Expecting value"),
        (b'{"r": 8', "Expecting"),
        (b"\xff\xfe{", "decode"),
        (b"[1]", "a list stands where an object is needed"),
        (b'"text"', "a str stands"),
        (b"null", "a NoneType stands"),
        (b'{"r": 8, "r": 16}', "it has 'r' twice"),
        (b'{"rope": {"factor": 1, "factor": 8}}', "it has 'factor' twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' + b"[" * 101 + b"]" * 101 + b"}", "nested too deeply"),
        (b'{"a": "\\ud83d\\uff0c"}', "half of a surrogate pair"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a git-lfs pointer in place of the file"),
        (b"\n<!DOCTYPE html><html>", "a page .HTML or XML. in place of the file, as servers answer"),
        (b'<?xml version="1.0"?><Error>', "a page .HTML or XML."),
    ],
    ids=lambda given: given[:12] if isinstance(given, bytes) else None,
)
def test_what_is_no_object_is_refused_with_the_reason(content, why):
    with pytest.raises(ValueError, match=why):
        object_of(content)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_file, "LARGEST", 10)
    (tmp_path / "config.json").write_text('{"a": "1234567890"}')
    with pytest.raises(ValueError, match="19 bytes, and 10 are read at most"):
        read_object(open_artifact(str(tmp_path)), "config.json")


def test_what_is_not_too_deep_and_whole_characters_are_read():
    assert object_of(b'{"a":' + b"[" * 90 + b"]" * 90 + b', "b": "\\ud83d\\ude00"}')["b"] == "\U0001f600"
    assert object_of('{"a": "长"}'.encode("utf-16")) == {"a": "长"}


def test_a_name_that_is_no_utf8_is_said(tmp_path):
    (tmp_path / os.fsdecode(b"\xd6\xd0.txt")).write_text("x")
    with pytest.raises(InputError, match=r"'.udcd6.udcd0.txt' is a name that is no UTF-8, .*rename it"):
        open_artifact(str(tmp_path))
