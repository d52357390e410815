"""What others' patterns match is what `re` says, and it is known at once."""

import re
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from zhllama.errors import InputError
from zhllama.weights.name_pattern import whole_match

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "model.embed_tokens",
    "lm_head",
    "",
    "a",
    "layers.1",
]
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attn|mlp).*?(?:q_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj)))"
)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.*\.)?(q_proj)$",
        r"(.*\.)?(layers.1.mlp.down_proj)$",
        r"(.*\.)?(^model\.layers\.(0|1)\.self_attn\.[qv]_proj)$",
        r"^(?!.*mlp).*(?:q_proj|down_proj)$",
        r".*layers\.\d{1,2}\..*[^v]_proj",
        r"(?=.*proj)model(?:\.\w+)+?",
        r".*(?<!mlp\.)\w+_proj",
        r"(?i)MODEL\..*_PROJ",
        r"model\.(layers)\.(\d)\2\..*",
        r".*\Bproj",
        r"\S*",
        r"",
        UNSLOTH,
    ],
)
def test_a_pattern_matches_what_it_matches_in_re(pattern: str) -> None:
    assert [whole_match(pattern, [5.0], "")(name) for name in NAMES] == [
        bool(re.fullmatch(pattern, name)) for name in NAMES
    ]


_parts = st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\w", r"\b", "^", "$", ""]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "{0,2}?"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
        inner.map(lambda part: f"(?!{part})"),
        inner.map(lambda part: f"(?={part})"),
        inner.map(lambda part: f"(?>{part})"),
        inner.map(lambda part: rf"({part})\1"),
    ),
    max_leaves=8,
)


@given(_parts, st.text("ab.", max_size=7))
def test_any_pattern_matches_what_it_matches_in_re(pattern: str, name: str) -> None:
    try:
        wanted = bool(re.fullmatch(pattern, name))
    except re.error:  # one group too many to be referred to
        assume(False)
    assert whole_match(pattern, [5.0], "")(name) == wanted, pattern


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+b",
        r"(a|a)*b",
        "(.*)*" * 20 + "b",
        "a?" * 60 + "a" * 60 + "b",
    ],
)
def test_what_takes_python_for_ever_is_known_at_once(pattern: str) -> None:
    assert not whole_match(pattern, [5.0], "")("a" * 60)


@pytest.mark.parametrize("pattern", ["((?:a|aa)+(?:a|aa)+)+b", "((((a{1,100}){1,100}){1,100}){1,100})b"])
def test_what_would_take_longer_is_refused_in_time(pattern: str) -> None:
    left = [0.2]
    began = time.process_time()
    with pytest.raises(InputError, match=r"there: the pattern .* takes too long"):
        whole_match(pattern, left, "there")("a" * 60)
    assert left[0] <= 0
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "pattern",
    [
        *("(((", "*", "a" * 10_001, "(" * 5000 + ")" * 5000, "a{99999999999}", "(((a{1000}){1000}){1000})"),
        *("(?:a){e<=1}", "[[:alpha:]]"),
    ],
)
def test_what_is_no_pattern_of_re_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"pattern|expression"):
        whole_match(pattern, [5.0], "")


def test_patterns_together_have_so_many_seconds() -> None:
    left = [0.05]
    match = whole_match("(a|b|ab)*c", left, "there")
    with pytest.raises(InputError, match=r"there: the pattern .* takes too long"):
        all(match("ab" * 20) is not None for _ in range(100_000))
    assert left[0] < 0
