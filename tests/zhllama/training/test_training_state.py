"""A training's state as JSON and safetensors: everything comes back as it was, and nothing in it can run."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zhllama.training.training_state import (
    copied,
    flatten,
    random_state,
    set_random_state,
    unflatten,
)

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.builds(lambda n: torch.arange(n, dtype=torch.float32), st.integers(0, 5))
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@given(TREES)
def test_a_tree_comes_back_as_it_was(tree):
    tensors: dict[str, torch.Tensor] = {}
    places = json.loads(json.dumps(flatten(tree, tensors)))
    assert same(unflatten(places, tensors), tree)


@pytest.mark.parametrize(
    "thing", [object(), {1.5: 0}, {"f": print}, torch.float32], ids=["object", "number as key", "function", "type"]
)
def test_what_is_neither_number_nor_tensor_has_no_place(thing):
    with pytest.raises(ValueError, match="checkpoint"):
        flatten(thing, {})


@pytest.mark.parametrize("places", [{"call": ["os.system", "true"]}, {"tensor": "absent"}], ids=["call", "absent"])
def test_places_that_mean_nothing_are_refused(places):
    with pytest.raises((ValueError, KeyError)):
        unflatten(places, {})


def test_adamw_goes_on_from_its_saved_state_to_the_same_weights():
    def parts():
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(5))
        return weight, torch.optim.AdamW([weight], lr=0.1)

    def step(weight, optimizer):
        weight.grad = weight.detach().sin()
        optimizer.step()

    weight, optimizer = parts()
    for _ in range(3):
        step(weight, optimizer)
    tensors: dict[str, torch.Tensor] = {}
    places = json.loads(json.dumps(flatten(optimizer.state_dict(), tensors)))
    kept = copied({**tensors, "weight": weight.detach()}, "file", {})
    step(weight, optimizer)

    again, other = parts()
    again.data.copy_(kept.pop("weight"))
    other.load_state_dict(unflatten(places, kept))
    step(again, other)
    assert torch.equal(again, weight)


def test_every_generator_goes_on_where_it_was():
    def draws():
        return random.random(), random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist()

    draws()
    random.gauss(0, 1)
    np.random.standard_normal()
    tensors: dict[str, torch.Tensor] = {}
    places = json.loads(json.dumps(flatten(random_state(), tensors)))
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    expected = draws()
    draws()
    set_random_state(unflatten(places, kept))
    assert draws() == expected


def test_buffers_are_used_again_while_shapes_stay():
    buffers: dict[str, torch.Tensor] = {}
    first = copied({"x": torch.ones(4)}, "file", buffers)["x"]
    second = copied({"x": torch.zeros(4)}, "file", buffers)["x"]
    assert first.data_ptr() == second.data_ptr()
    assert second.tolist() == [0.0] * 4
    assert copied({"x": torch.ones(5)}, "file", buffers)["x"].shape == (5,)
