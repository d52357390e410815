"""Meta's layout: the permutation and the cuts can be undone exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zhllama.errors import InputError
from zhllama.weights.meta_format import MetaParams, extents, permute, places, split, unpermute


@given(heads=st.integers(1, 8), half=st.integers(1, 8), dim=st.integers(1, 5))
def test_unpermute_undoes_permute(heads, half, dim):
    weight = torch.arange(heads * 2 * half * dim).view(-1, dim)
    assert torch.equal(unpermute(permute(weight, heads), heads), weight)
    assert torch.equal(permute(unpermute(weight, heads), heads), weight)


def test_permute_sends_neighbours_to_halves():
    # a head of six rows: pairs (0,1), (2,3), (4,5) become (0,3), (1,4), (2,5)
    assert permute(torch.arange(12).view(12, 1), 2).flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@given(heads=st.integers(1, 4), shards=st.integers(1, 4), half=st.integers(1, 4))
def test_permuting_commutes_with_joining_shards_of_whole_heads(heads, shards, half):
    weight = torch.arange(heads * shards * 2 * half * 3).view(-1, 3)
    parts = [permute(part, heads) for part in split(weight, 0, shards)]
    assert torch.equal(torch.cat(parts), permute(weight, heads * shards))


@given(size=st.integers(1, 5000), shards=st.integers(1, 16), uneven=st.booleans())
def test_extents_cover_an_axis_or_refuse(size, shards, uneven):
    if size % shards and not uneven:
        with pytest.raises(ValueError, match="no multiple"):
            extents(size, shards)
        return
    found = extents(size, shards, uneven)
    assert len(found) == shards
    assert sum(found) == size
    assert len(set(found[:-1])) <= 1
    assert found[-1] >= found[0]


def test_the_extended_vocabulary_of_13b_is_cut_as_the_recipe_cuts_it():
    assert extents(49_953, 2, uneven=True) == [24_976, 24_977]


def test_a_7b_model_has_291_tensors():
    found = list(places(32, 32, 32))
    assert len(found) == 291
    assert len({place.meta for place in found}) == len({place.hf for place in found}) == 291


@pytest.mark.parametrize(
    ("dim", "width"), [(4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016)], ids=["7b", "13b", "30b", "65b"]
)
def test_the_feed_forward_width_is_metas(dim, width):
    assert MetaParams(dim, 32, 32, 1e-6).width == width


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"dim": 64, "n_layers": 2, "n_heads": 5, "norm_eps": 1e-6}',
        '{"dim": 64, "n_layers": 0, "n_heads": 4, "norm_eps": 1e-6}',
        '{"dim": "64", "n_layers": 2, "n_heads": 4, "norm_eps": 1e-6}',
        '{"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-6, "vocab_size": -5}',
        '{"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-6, "vocab_size": 0}',
        '{"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-6, "use_scaled_rope": 1}',
        '{"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-6, "rope_scaling_factor": 8}',
        '{"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-6, "vision_chunk_size": 8}',
    ],
    ids=[
        "no JSON",
        "a list",
        "empty",
        "heads",
        "layers",
        "text",
        "vocabulary",
        "no vocabulary",
        "scaled",
        "a factor alone",
        "pictures",
    ],
)
def test_params_that_are_not_llamas_are_refused(text):
    with pytest.raises(InputError, match=r"^here: not LLaMA's params\.json"):
        MetaParams.from_json(text.encode(), "here")
