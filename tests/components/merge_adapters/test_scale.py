"""merge_adapters --scale: LoRA as peft's own scaling has it, to the bit; what comes in the place of the model's, that
far on the way to it, rounded once; at 1 nothing is another than it was."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from components.merge_adapters.merger import merge_adapters
from components.merge_adapters.options import MergeAdapters
from tests.components.merge_adapters.conftest import load_base, randomise
from tests.components.merge_adapters.test_merger import MODULES, tensors_of
from tests.folders import add_folder
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.stage.options import configuration_of
from zhllama.stage.run import run_stage
from zhllama.weights import stream

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def merge(store: Path | str, model: Path | str, *adapters: Path | str, scale: float, prove: bool = False) -> Manifest:
    given = {"store": str(store), "model": str(model), "adapters": ",".join(map(str, adapters)), "prove": prove}
    return run_stage(MergeAdapters(**given, scale=scale), merge_adapters)


def saved(adapter: Path, module: str) -> torch.Tensor:
    """What an adapter has in the place of a module's weight."""
    return load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{module}.weight"]


def between(before: torch.Tensor, trained: torch.Tensor, scale: float) -> torch.Tensor:
    """Plain torch's."""
    return (before.float() + scale * (trained.float() - before.float())).to(before.dtype)


@pytest.mark.parametrize("scale", [0.5, 1 / 3, 1.7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 20, "use_rslora": True},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"up_proj": 3}},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["projections", "rank-stabilised", "patterns", "embedding"],
)
def test_lora_is_scaled_as_peft_scales_it_to_the_bit(tmp_path, tiny_folder, make_adapter, options, scale):
    adapter = make_adapter(1, **options)
    model = PeftModel.from_pretrained(load_base(tiny_folder), adapter)
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and layer.lora_A:
            layer.scale_layer(scale)
        elif isinstance(layer, LoraLayer):
            # peft's scale_layer passes over embeddings; its merge does not
            layer.scaling["default"] *= scale
    wanted = model.merge_and_unload().state_dict()
    found = tensors_of(merge(tmp_path, tiny_folder, adapter, scale=scale))
    assert {name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)} == set()


def test_pefts_weighted_adapter_is_the_same_but_for_rounding(tmp_path, tiny_folder, make_adapter):
    """It puts weight and scaling into a factor, and so rounds elsewhere: float16's last bit."""
    adapter = make_adapter(1)
    model = PeftModel.from_pretrained(load_base(tiny_folder), adapter)
    model.add_weighted_adapter(["default"], [0.3], "weighted", combination_type="cat")
    model.set_adapter("weighted")
    wanted = model.merge_and_unload(adapter_names=["weighted"]).state_dict()
    found = tensors_of(merge(tmp_path, tiny_folder, adapter, scale=0.3))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=2**-10, atol=2**-14)


def test_what_comes_in_the_place_of_the_models_is_that_far_on_the_way(tmp_path, tiny_folder, make_adapter, tiny_state):
    saved_whole = make_adapter(1, modules_to_save=[*MODULES, "norm"])
    found = tensors_of(merge(tmp_path, tiny_folder, saved_whole, scale=0.3))
    for module in ("model.embed_tokens", "lm_head", "model.norm"):
        name = f"{module}.weight"
        assert torch.equal(found[name], between(tiny_state[name], saved(saved_whole, module), 0.3)), name
    rows = make_adapter(2, trainable_token_indices=[799, 3, 500])
    found = tensors_of(merge(tmp_path, tiny_folder, rows, scale=0.3))
    trained = load_file(rows / "adapter_model.safetensors")[
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    wanted = tiny_state[EMBEDDING].clone()
    wanted[[799, 3, 500]] = between(wanted[[799, 3, 500]], trained, 0.3)
    assert torch.equal(found[EMBEDDING], wanted)


def test_rows_that_the_model_has_not_stay_as_they_come(
    tmp_path, store, tiny_model, make_adapter, tiny_state, llama_tokenizer, longer_tokenizer
):
    first = make_adapter(1, tokenizer=llama_tokenizer, modules_to_save=MODULES)
    second = make_adapter(2, rows=801, tokenizer=longer_tokenizer, modules_to_save=MODULES)
    manifest = merge(store, tiny_model, first, second, scale=0.25, prove=True)
    found = tensors_of(manifest)[EMBEDDING]
    once = between(tiny_state[EMBEDDING], saved(first, "model.embed_tokens"), 0.25)
    trained = saved(second, "model.embed_tokens")
    assert torch.equal(found[:800], between(once, trained[:800], 0.25))
    assert torch.equal(found[800], trained[800].half())
    # the merged model is peft's with scaled layers
    assert manifest.facts["proof"]["relative_difference"] < 0.002
    assert manifest.vocabulary is not None
    assert manifest.vocabulary.size == 801
    apart = merge(store, tiny_model, first, scale=0.25)
    one_by_one = tensors_of(merge(store, apart.reference, second, scale=0.25))
    assert torch.equal(one_by_one[EMBEDDING], found)


def test_parts_of_a_tensor_have_the_bits_of_the_whole(tmp_path, tiny_model, make_adapter, monkeypatch):
    adapters = make_adapter(1, modules_to_save=MODULES), make_adapter(2, trainable_token_indices=[799, 63, 64, 5])
    whole = merge(tmp_path / "whole", tiny_model, *adapters, scale=0.3)
    monkeypatch.setattr(stream, "SPAN", 192 * 64)
    monkeypatch.setattr(stream, "TILE", 64 * 64)
    by_parts = merge(tmp_path / "parts", tiny_model, *adapters, scale=0.3)
    assert by_parts.facts["weights_digest"] == whole.facts["weights_digest"]


def test_a_tied_model_merged_in_part_is_proved(tmp_path, tied_model):
    adapters = []
    for seed, changes in enumerate(({"trainable_token_indices": [799, 3]}, {"modules_to_save": ["embed_tokens"]})):
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **changes)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tied_model), config)
        randomise(model, seed)
        model.save_pretrained(tmp_path / str(seed))
        adapters.append(tmp_path / str(seed))
    manifest = merge(tmp_path / "store", tied_model, *adapters, scale=0.5, prove=True)
    assert manifest.facts["proof"]["relative_difference"] < 2e-3


def test_one_is_what_is_published_without_it(tmp_path, tiny_folder, make_adapter):
    adapter = make_adapter(1, modules_to_save=MODULES)
    given = {"store": str(tmp_path), "model": str(tiny_folder), "adapters": str(adapter)}
    whole = run_stage(MergeAdapters(**given), merge_adapters)
    assert "scale" not in configuration_of(MergeAdapters(**given, scale=1.0))
    assert merge(tmp_path, tiny_folder, adapter, scale=1.0) == whole
    assert "scale" not in whole.facts


def test_the_manifest_and_the_card_say_it(tmp_path, tiny_folder, make_adapter):
    adapter = make_adapter(1)
    manifest = merge(tmp_path, tiny_folder, adapter, scale=0.7)
    assert (manifest.configuration["scale"], manifest.facts["scale"]) == (0.7, 0.7)
    card = Path(manifest.root, "README.md").read_text("utf-8")
    assert "with 1 adapter merged into it, scaled by 0.7." in card
    half = tensors_of(manifest)
    report = json.loads(Path(manifest.root, "report.json").read_text("utf-8"))["changed"]
    name = next(iter(report))
    before = load_base(tiny_folder).state_dict()[name].double()
    wanted = float((half[name].double() - before).norm() / before.norm())
    assert report[name]["relative_change"] == pytest.approx(wanted, rel=1e-4)


def test_an_adapter_for_the_whole_does_not_fit_a_part(tmp_path, store, tiny_model, make_adapter):
    def published(seed: int, trained_on: list[str]) -> Manifest:
        out = ArtifactWriter(str(store), "finetune", f"key-{seed}")
        add_folder(out, make_adapter(seed))
        out.facts |= {"base_digest": trained_on[0], "base_lineage": trained_on}
        return out.publish("adapter")

    base = open_artifact(tiny_model).digest
    first = published(1, [base])
    second = published(2, [base, first.digest])
    part = merge(store, tiny_model, first.reference, scale=0.5)
    assert part.facts["lineage"] != [base, first.digest]
    with pytest.raises(InputError, match=r"was trained on the model .* with .* merged, and here it would be merged"):
        merge(store, part.reference, second.reference, scale=1)
    assert merge(store, tiny_model, first.reference, second.reference, scale=0.5).facts["changed_tensors"] == 14


@pytest.mark.parametrize("scale", [0, -1, math.nan, math.inf])
def test_a_scale_that_is_none_is_refused(tmp_path, scale):
    with pytest.raises(InputError, match=r"--scale \S+: give a number above 0"):
        MergeAdapters(store=str(tmp_path), model="m", adapters="a", scale=scale)
