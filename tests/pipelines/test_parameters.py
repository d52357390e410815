"""The parameters as people read them are the ones that the pipeline has."""

from typing import get_args, get_type_hints

import pytest

from components.launch_training.launcher import LaunchTraining
from components.serve.serve import Serve
from components.shared.errors import InputError
from components.shared.training.options import PretrainOptions
from pipelines import parameters as told
from pipelines import sizes
from pipelines.adapt_llama import adapt_llama
from pipelines.parameters import ADDRESSES, CHOICES, check_for_cluster, parameters


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


def test_choices_are_those_that_the_steps_take():
    taken = {"deploy": (Serve, "deploy"), "backend": (LaunchTraining, "backend")}
    taken["lora_embedding_rows"] = (PretrainOptions, "embedding_rows")
    assert taken.keys() == CHOICES.keys()
    for name, (kind, field) in taken.items():
        assert set(get_args(get_type_hints(kind)[field])) == set(CHOICES[name])


def test_addresses_are_parameters_of_the_pipeline():
    assert set(ADDRESSES) <= {one.name for one in parameters(sizes.load("7b"))}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"deploy": "kubernets"}, r"--set deploy: 'kubernets' \(did you mean kubernetes\?\); use none or kubernetes"),
        ({"backend": "local"}, "--set backend=local: steps of a cluster train nothing themselves"),
        ({"store": "artifacts"}, "--set store=artifacts: steps of a cluster share S3 alone"),
        ({"text": "s3://bucket/zh:0.9,./en:0.1"}, r"--set text: \./en:0\.1 is of this machine"),
    ],
)
def test_what_no_cluster_could_run_is_refused_before_it_is_submitted(given, said):
    check_for_cluster({"store": "s3://bucket/store", "weights": "hf://owner/name", "deploy": "kserve"})
    with pytest.raises(InputError, match=said):
        check_for_cluster({"store": "s3://bucket/store", **given})
