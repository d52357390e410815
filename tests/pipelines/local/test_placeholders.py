"""Placeholders and values look in a command as KFP's launcher writes them."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.local.placeholders import (
    Surroundings,
    check_placeholders,
    check_word,
    command,
    driver_text_of,
    text_of,
    value_of,
)
from zhllama.errors import InputError

AROUND = Surroundings(
    parameters={"name": "熊", "count": 3.0, "rate": 1e-5, "null": None},
    artifacts={"model": "/in/model"},
    output_parameters={"ref": "/out/ref"},
    output_artifacts={"thing": "/out/thing"},
    output_file="/out/executor_output.json",
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
        ("nan", "NUMBER_DOUBLE", "a number"),
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
        ("{{$.inputs.parameters['rate']}}", ["1e-05"]),
        ("{{$.inputs.parameters['rate']}}>{{$.outputs.parameters['ref'].output_file}}", ["0.00001>/out/ref"]),
        ('{"IfPresent": {"InputName": "name", "Then": ["--n", "{{$.inputs.parameters[\'name\']}}"]}}', ["--n", "熊"]),
        ('{"IfPresent": {"InputName": "absent", "Then": "--n", "Else": ["-"]}}', ["-"]),
        ('{"IfPresent": {"InputName": "absent", "Then": "--n"}}', []),
        ('{"IfPresent": {"InputName": "null", "Then": "--n", "Else": "--null"}}', ["--null"]),
        ('{"IfPresent": {"InputName": "model", "Then": "--m", "Else": "--only parameters are present"}}',
         ["--only parameters are present"]),
        ('{"instruction": "text that only looks alike"}', ['{"instruction": "text that only looks alike"}']),
    ],
)  # fmt: skip
def test_a_word_of_a_command(template, words):
    assert command([template], AROUND) == words


def test_the_whole_executor_input_is_json():
    value = json.loads(command(["{{$}}"], AROUND)[0])
    assert value["inputs"]["parameterValues"] == {"name": "熊", "count": 3.0, "rate": 1e-5}
    assert value["outputs"]["outputFile"] == "/out/executor_output.json"
    assert value["outputs"]["parameters"]["ref"]["outputFile"] == "/out/ref"


def test_an_input_that_is_not_passed_is_the_drivers_error():
    with pytest.raises(InputError, match='parameter "other" not found in executor input'):
        command(["{{$.inputs.parameters['other']}}"], AROUND)


def test_a_constant_may_name_the_other_inputs_of_its_task():
    around = Surroundings(parameters={"x": "<{{$.inputs.parameters['y']}}>", "y": 1e-5})
    assert command(["{{$.inputs.parameters['x']}}"], around) == ["<0.00001>"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-5, "1e-05"), (1.5e-7, "1.5e-07"), (0.0001, "0.0001"), (1e6, "1000000"), (1234567.5, "1.2345675e+06"),
     (123456.5, "123456.5"), (1e22, "1e+22"), (-2e-5, "-2e-05"), (-0.0, "0"), (2.0**63, "9.223372036854776e+18"),
     (True, "true"), (None, ""), ({"b": 2e-7, "a": ["<", 3.0, 1e21, 0]}, '{"a":["\\u003c",3,1e+21,0],"b":2e-7}')],
)  # fmt: skip
def test_a_value_as_the_driver_writes_it(value, text):
    assert driver_text_of(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_of_the_driver_keeps_its_value(number):
    assert float(driver_text_of(number)) == number


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ('{"IfPresent": {"InputName": "x", "Then": {"Concat": ["x"]}}}', "takes texts alone in an IfPresent"),
        ('{"IfPresent": {"InputName": "x", "Then": ["{{$.outputs.output_file}}"]}}', "an output in it on as it stands"),
        ('{"IfPresent": [', "is not JSON"),
        ('{"Concat": ["x"]}', "on as it stands; write the parts as one text"),
    ],
)
def test_a_word_that_kfp_would_not_resolve_is_refused(word, message):
    with pytest.raises(InputError, match=message):
        check_word(word, {"x"}, {"ref"}, {"thing"}, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{$.inputs.parameters['other']}}", "names other, which there is not"),
        ("{{$.outputs.parameters['other'].output_file}}", "names other, which there is not"),
        ("{{$.inputs.artifacts['m'].metadata['a']}}", "which the local runner does not know"),
        ("{{$.workspace_path}}/x", "which the local runner does not know"),
        ("{{$.pipeline_job_uuid}}/x", "leaves {{.*}} as it stands"),
    ],
)
def test_an_unknown_placeholder_is_refused_by_name(text, message):
    with pytest.raises(InputError, match=message):
        check_placeholders(text, {"x", "m"}, {"ref"}, {"thing"}, "here")
