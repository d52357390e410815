"""YAML as Go's reader has it: what PyYAML reads otherwise. The recorded scalars are in test_admission.py."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.manifests.check.go_yaml import NoYaml, compose, quoted, repeated, value
from pipelines.manifests.render import yaml_of


def read(text: str) -> Any:
    (node,) = compose(text)
    return value(node, lambda place, line: None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("y", True), ("Y", True), ("yes", True), ("on", True), ("n", False), ("NO", False), ("off", False),

        ("~", None), ("Null", None), ("tRue", "tRue"), ("1e3", 1000), ("1e21", 1e21), ("0089", 89), ("007", 7),
        ("0o755", 493), ("0x1F", 31), ("-0b11", -3), ("1_000", 1000), ("5.", 5), (".5", 0.5), ("1.10", 1.1),
        ("+12", 12),
        ("18446744073709551616", 18446744073709551616), ("123456e7890", "123456e7890"), ("1.2.3", "1.2.3"),
        ("1e", "1e"),
        ("12:30", "12:30"), ("2026-11-29", "2026-11-29"), ("=", "="), ("<<", "<<"), ("-", "-"), ("+", "+"),
        ("0x", "0x"),
        ("nan", "nan"), ("'y'", "y"), ('"1"', "1"), ("!!str 12", "12"), ("!!float 1", 1), ("!a b", "b"), ("!a", ""),
        ("!!binary YQ==", "a"), ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_scalars(text: str, found: Any) -> None:
    if text.startswith("-"):
        text, found = f"[{text}]", [found]
    assert repr(read(f"a: {text}\n")["a"]) == repr(found)


@pytest.mark.parametrize(
    "text",
    [".inf", "-.Inf", ".nan", "!!int a", "!!bool 1", "!!binary a", "*b", "&b [*b]", "[" * 501, "@a", "{? [1] : 2}"],
)
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(NoYaml):
        read(f"a: {text}\n")


def test_a_pair_of_escapes_in_json_is_one_character() -> None:
    assert read('{"a": "\\ud83d\\ude00", "b": "\\\\ud83d"}') == {"a": "😀", "b": "\\ud83d"}


def test_keys_are_text() -> None:
    assert read("{on: 1, 1: 2, 1.5: 3, null1: 4, '': 5}") == {"true": 1, "1": 2, "1.5": 3, "null1": 4, "": 5}


def test_merges_and_anchors() -> None:
    assert read("a: &a {x: 1, w: 2}\nb: {<<: *a, x: 3}\nc: {<<: [*a, {z: 4}]}\n") == {
        "a": {"x": 1, "w": 2}, "b": {"x": 3, "w": 2}, "c": {"x": 1, "w": 2, "z": 4},
    }  # fmt: skip


def test_a_repeated_key_is_named_with_its_line() -> None:
    (node,) = compose("a:\n  b: 1\n  c: [{d: 1, d: 2}]\n  'b': 3\n")
    assert list(repeated(node)) == [(("a", "c", 0, "d"), 3), (("a", "b"), 4)]


def test_aliases_of_aliases_end() -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
    with pytest.raises(NoYaml, match="aliases"):
        read(text)


WORDS = st.sampled_from(["y", "n", "Y", "N", "on", "1e3", "12e4567", "0089", "0o17", "+.5", "1_0", "~", "=", "<<", ""])
TEXTS = WORDS | st.text(st.sampled_from("yn01e.+-_:xo '#\"中\n"), max_size=6)


@given(st.dictionaries(TEXTS, TEXTS | st.lists(TEXTS), max_size=4))
def test_what_is_rendered_is_read_as_it_was_meant(made: dict[str, Any]) -> None:
    """A label `y` is no boolean, and a commit `12e4567` no number."""
    (node,) = compose(yaml_of([made]))
    assert value(node, lambda *_: None) == made


def test_what_needs_no_quotes_stays_as_it_is() -> None:
    text = "# y\nmemory: 12e3Gi\nname: 中\nready: true\ncount: 3\nbits: '0o17'\nshort: y # 1e3\n"
    assert quoted(text) == text.replace("short: y", "short: 'y'")
