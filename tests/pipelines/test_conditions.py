"""Conditions as the SDK writes them: parsed and evaluated as Python would the same expression."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.shared.errors import InputError
from pipelines.conditions import holds, names_in, parse_condition

X = "inputs.parameter_values['x']"


@pytest.mark.parametrize(
    ("text", "values", "truth"),
    [
        (f"{X} == ''", {"x": ""}, True),
        (f"{X} == ''", {"x": "s3://a"}, False),
        (f"!({X} == '')", {"x": "s3://a"}, True),
        (f"{X} != 'it\\'s'", {"x": "it's"}, False),
        (f"{X} == true", {"x": True}, True),
        (f"!({X} == true)", {"x": False}, True),
        (f"int({X}) > 2", {"x": 3.0}, True),
        (f"int({X}) > 2", {"x": 2.0}, False),
        (f"double(int({X})) >= 2.5", {"x": 3.0}, True),
        (f"{X} == 1e-05", {"x": 0.00001}, True),
        (f"!({X} == 'a') && {X} == 'b'", {"x": "b"}, True),
        (f"{X} == 'a' || {X} == 'b' && {X} == 'c'", {"x": "a"}, True),
        (f"({X} == 'a' || {X} == 'b') && {X} == 'c'", {"x": "a"}, False),
    ],
)
def test_what_the_sdk_writes_has_its_meaning(text, values, truth):
    assert holds(parse_condition(text, "here"), values) is truth


@pytest.mark.parametrize(
    "text", [f"{X}.size() > 1", f"{X} in ['a']", f"{X} ==", f"({X} == 'a'", f"{X} == 'a' 'b'", "int 3"]
)
def test_other_cel_is_refused_with_its_place(text):
    with pytest.raises(InputError, match="here: the condition"):
        parse_condition(text, "here")


@pytest.mark.parametrize("value", [True, 3, None, "3"])
def test_a_text_is_not_compared_with_another_kind(value):
    condition = parse_condition(f"{X} == {'3' if isinstance(value, str) else repr('a')}", "here")
    with pytest.raises(InputError, match="a condition compares"):
        holds(condition, {"x": value})


@st.composite
def expressions(draw, depth=3):
    """A CEL text over integer inputs a and b, and the same as Python."""
    if depth == 0 or draw(st.booleans()):
        name, sign, number = (
            draw(st.sampled_from("ab")),
            draw(st.sampled_from(["==", "!=", "<", "<=", ">", ">="])),
            draw(st.integers(-3, 3)),
        )
        return f"int(inputs.parameter_values['{name}']) {sign} {number}", f"({name} {sign} {number})"
    if draw(st.booleans()):
        text, python = draw(expressions(depth=depth - 1))
        return f"!({text})", f"(not {python})"
    (left, python_left), (right, python_right) = draw(expressions(depth=depth - 1)), draw(expressions(depth=depth - 1))
    sign, word = draw(st.sampled_from([("&&", "and"), ("||", "or")]))
    return f"({left}) {sign} ({right})", f"({python_left} {word} {python_right})"


@given(expressions(), st.integers(-3, 3), st.integers(-3, 3))
def test_every_combination_means_what_python_says(expression, a, b):
    text, python = expression
    assert holds(parse_condition(text, "here"), {"a": float(a), "b": float(b)}) is eval(python, {"a": a, "b": b})


def test_the_inputs_that_a_condition_reads_are_known():
    condition = parse_condition(
        "!(inputs.parameter_values['a'] == '') && int(inputs.parameter_values['b']) > 1", "here"
    )
    assert sorted(names_in(condition)) == ["a", "b"]
