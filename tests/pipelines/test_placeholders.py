"""Placeholders and values look in a command as KFP's launcher writes them."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.shared.errors import InputError
from pipelines.placeholders import Surroundings, check_placeholders, command, fill, text_of, value_of

AROUND = Surroundings(
    parameters={"name": "熊", "count": 3.0, "absent": None},
    artifacts={"model": "/in/model"},
    output_parameters={"ref": "/out/ref"},
    output_artifacts={"thing": "/out/thing"},
    output_file="/out/executor_output.json",
    job={"pipeline_job_uuid": "1234"},
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (False, "false"), (3.0, "3"), (1e-5, "0.00001"), (2e-4, "0.0002"), (1e22, "1" + "0" * 22),
     (0.05, "0.05"), (-0.5, "-0.5"), (100, "100"), ("", ""), (None, ""), ([1, "a"], '[1,"a"]'), ({"a": 1}, '{"a":1}')],
)  # fmt: skip
def test_a_value_as_text(value, text):
    assert text_of(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_keeps_its_value_and_has_no_exponent(number):
    text = text_of(number)
    assert re.fullmatch(r"-?\d+(\.\d+)?", text)
    assert float(text) == number


@given(st.one_of(st.text(), st.booleans(), st.integers(-(2**53), 2**53)))
def test_a_value_comes_back_from_its_text(value):
    kind = {str: "STRING", bool: "BOOLEAN", int: "NUMBER_INTEGER"}[type(value)]
    assert value_of(text_of(value), kind, "here") == value


@pytest.mark.parametrize(
    ("text", "kind", "wanted"),
    [
        ("3.5", "NUMBER_INTEGER", "a whole number"),
        ("x", "NUMBER_DOUBLE", "a number"),
        ("yes", "BOOLEAN", "true or false"),
        ("{}", "LIST", "JSON"),
    ],
)
def test_a_text_of_another_type_is_refused(text, kind, wanted):
    with pytest.raises(InputError, match=f"--set x: .* where {wanted}"):
        value_of(text, kind, "--set x")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{$.inputs.parameters['name']}}", ["熊"]),
        ("a={{$.inputs.parameters['count']}},{{$.inputs.parameters['name']}}", ["a=3,熊"]),
        ("{{$.inputs.artifacts['model'].path}}", ["/in/model"]),
        ("{{$.inputs.artifacts['model'].uri}}", ["/in/model"]),
        ("{{$.outputs.parameters['ref'].output_file}}", ["/out/ref"]),
        ("{{$.outputs.artifacts['thing'].path}}", ["/out/thing"]),
        ("{{$.outputs.output_file}}", ["/out/executor_output.json"]),
        ("{{$.pipeline_job_uuid}}", ["1234"]),
        ('{"Concat": ["a=", "{{$.inputs.parameters[\'name\']}}"]}', ["a=熊"]),
        ('{"IfPresent": {"InputName": "name", "Then": ["--n", "{{$.inputs.parameters[\'name\']}}"]}}', ["--n", "熊"]),
        ('{"IfPresent": {"InputName": "absent", "Then": "--n", "Else": ["-"]}}', ["-"]),
        ('{"IfPresent": {"InputName": "absent", "Then": "--n"}}', []),
        ('{"IfPresent": {"InputName": "name", "Then": {"Concat": ["x", "y"]}}}', ["xy"]),
        ('{"instruction": "text that only looks alike"}', ['{"instruction": "text that only looks alike"}']),
    ],
)  # fmt: skip
def test_a_word_of_a_command(template, words):
    assert command([template], AROUND) == words


def test_the_whole_executor_input_is_json():
    value = json.loads(fill("{{$}}", AROUND))
    assert value["inputs"]["parameterValues"] == {"name": "熊", "count": 3.0}
    assert value["outputs"]["outputFile"] == "/out/executor_output.json"
    assert value["outputs"]["parameters"]["ref"]["outputFile"] == "/out/ref"


@given(st.text(), st.text(alphabet="{}$.'[]inputs paramet", max_size=40))
def test_a_users_text_is_never_taken_for_a_placeholder(text, tricky):
    for value in (text, tricky, "{{$.inputs.parameters['other']}}"):
        around = Surroundings(parameters={"x": value, "other": "secret"})
        assert fill("<{{$.inputs.parameters['x']}}>", around) == f"<{value}>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{$.inputs.parameters['other']}}", "names other, which there is not"),
        ("{{$.outputs.parameters['other'].output_file}}", "names other, which there is not"),
        ("{{$.inputs.artifacts['m'].metadata['a']}}", "which the local runner does not know"),
        ("{{$.workspace_path}}/x", "which the local runner does not know"),
    ],
)
def test_an_unknown_placeholder_is_refused_by_name(text, message):
    with pytest.raises(InputError, match=message):
        check_placeholders(text, {"x", "m"}, {"ref"}, {"thing"}, "here")
