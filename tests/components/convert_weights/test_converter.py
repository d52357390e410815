"""Conversion: the same model under other names, bit for bit."""

import json
from pathlib import Path

import torch

from components.shared.artifact import open_artifact
from components.shared.safetensors_io import Checkpoint


def test_every_tensor_is_the_one_that_was_cut_into_shards(tiny_model, tiny_state):
    checkpoint = Checkpoint(open_artifact(tiny_model))
    assert set(checkpoint.tensors) == set(tiny_state)
    for name, wanted in tiny_state.items():
        found = checkpoint.read(name)
        assert found.dtype == torch.float16
        assert torch.equal(found, wanted), name


def test_transformers_loads_the_folder(tiny_model, tiny_state):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(tiny_model).parent
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float16
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in tiny_state.items()
    }
    assert (
        AutoTokenizer.from_pretrained(folder)("A line.").input_ids[0]
        == json.loads((folder / "config.json").read_text())["bos_token_id"]
    )
