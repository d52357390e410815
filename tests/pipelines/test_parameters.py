"""The parameters as people read them are the ones that the pipeline has."""

import pytest

from components.shared.errors import InputError
from pipelines import parameters as told
from pipelines import sizes
from pipelines.adapt_llama import adapt_llama


def test_they_are_the_compiled_pipelines():
    size = sizes.load("7b")
    inputs = adapt_llama(size).component_spec.inputs
    found = told.parameters(size)
    assert [one.name for one in found] == list(inputs)
    assert {one.name: one.default for one in found} == {
        name: value.default if value.optional else None for name, value in inputs.items()
    }
    assert {one.name: one.note for one in found} == {name: value.description for name, value in inputs.items()}
    assert all(one.note.endswith(".") and "|" not in one.note for one in found)


def test_every_group_begins_with_a_parameter_that_there_is():
    found = told.parameters(sizes.load("tiny"))
    assert set(told.GROUPS) <= {one.name for one in found}
    assert [one.group for one in found] == sorted((one.group for one in found), key=[*told.GROUPS.values()].index)


def test_the_page_holds_them_as_they_are():
    """`zhllama render all` writes it again."""
    page = told.PAGE.read_text()
    assert told.page(page) == page
    assert "| `lora_steps` | whole number | tiny: `120`; 7b, 13b, 33b, 65b: `6000` |" in page
    assert "| `store` | text | (required) |" in page
    assert "| `prompts` | text | (empty) |" in page


def test_a_page_without_the_place_is_refused():
    with pytest.raises(InputError, match=r"pipeline\.md: the place of the parameters is gone"):
        told.page("# A page")
