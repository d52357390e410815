"""A model is loaded whole or refused; adapters are merged as peft merges them; text streams in whole characters."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.folders import add_folder
from tests.loaded_model import load_model
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.inference.generate import TextStream, answer, stream, stretch
from zhllama.inference.load import LoadedModel, choose_precision
from zhllama.inference.sampling import Sampling
from zhllama.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from zhllama.tokenizer.sentencepiece_model import CONTROL, parse_model

GREEDY = Sampling(do_sample=False, repetition_penalty=1.0, max_new_tokens=12)


@pytest.fixture(scope="session")
def loaded(tiny_model: str) -> LoadedModel:
    return load_model(tiny_model)


@pytest.fixture(scope="session")
def plain_model(tiny_model: str) -> Path:
    """The tiny model's folder."""
    return Path(tiny_model).parent


@pytest.fixture
def copied(plain_model: Path, tmp_path: Path) -> Path:
    """A copy of the model without its manifest, to be damaged."""
    shutil.copytree(plain_model, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    return tmp_path / "model"


def extended(model: bytes, pieces: list[str]) -> bytes:
    proto = parse_model(model)
    for index, piece in enumerate(pieces):
        proto.pieces.add(piece=piece, score=-31_741.0 - index)
    return bytes(proto.SerializeToString())


def write_adapter(folder: Path, base: Any, tokenizer: bytes, seed: int) -> Path:
    """A peft adapter on `base` with random LoRA weights; full embeddings when the vocabulary is larger than base's."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    rows = SentencePieceEncoder(tokenizer).size
    grows = rows > base.config.vocab_size
    if grows:
        base.resize_token_embeddings(rows, mean_resizing=False)
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["embed_tokens", "lm_head"] if grows else None,
        init_lora_weights=False,
    )
    get_peft_model(base, config).save_pretrained(folder, save_embedding_layers=grows)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: str, llama_tokenizer: bytes
) -> tuple[Path, Path, Any]:
    """Two adapters in order, the first with three pieces more than the model, and peft's own merge of both."""
    from peft import PeftModel

    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    tokenizer = extended(llama_tokenizer, ["中文", "你好", "[PAD]"])
    base = load_model(tiny_model).model
    write_adapter(first, base, tokenizer, 1)
    expected = load_model(tiny_model).model
    expected.resize_token_embeddings(SentencePieceEncoder(tokenizer).size, mean_resizing=False)
    expected = PeftModel.from_pretrained(expected, str(first)).merge_and_unload()
    import copy

    write_adapter(second, copy.deepcopy(expected), tokenizer, 2)
    expected = PeftModel.from_pretrained(expected, str(second)).merge_and_unload()
    return first, second, expected


def test_adapters_are_merged_in_order_with_their_rows_and_tokenizer(
    tiny_model: str, adapters: tuple[Path, Path, Any]
) -> None:

    first, second, expected = adapters
    merged = load_model(tiny_model, f"{first},{second}")
    state = merged.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    assert state["model.embed_tokens.weight"].shape[0] == merged.encoder.size == 803
    assert merged.padding == 802


def test_adapters_in_the_wrong_order_are_refused(tiny_model: str, adapters: tuple[Path, Path, Any]) -> None:
    first, second, _ = adapters
    with pytest.raises(InputError, match=rf"the order is wrong .*; give --adapters {first},{second}$"):
        load_model(tiny_model, f"{second},{first}")


def test_an_adapter_with_a_foreign_vocabulary_is_refused(
    tiny_model: str, llama_tokenizer: bytes, tmp_path: Path
) -> None:
    proto = parse_model(llama_tokenizer)
    proto.pieces[700].piece = "foreign"
    adapter = write_adapter(tmp_path / "adapter", load_model(tiny_model).model, bytes(proto.SerializeToString()), 1)
    with pytest.raises(InputError, match="foreign to the 800 pieces"):
        load_model(tiny_model, str(adapter))


def test_an_adapter_of_another_model_is_refused_by_its_manifest(
    tiny_model: str, copied: Path, llama_tokenizer: bytes, tmp_path: Path
) -> None:
    out = ArtifactWriter(str(tmp_path / "store"), "finetune", "key")
    add_folder(out, write_adapter(tmp_path / "adapter", load_model(tiny_model).model, llama_tokenizer, 1))
    out.facts["base_digest"] = "0" * 64
    reference = out.publish("adapter").reference
    with pytest.raises(InputError, match="was trained on the model 000000000000, and here"):
        load_model(tiny_model, reference)
    # whether what has no manifest is what it names, nobody can say
    assert load_model(str(copied), reference).encoder.size == 800
    assert load_model(tiny_model, f"{tmp_path / 'adapter'},{reference}").encoder.size == 800


@pytest.fixture
def whole(tmp_path: Path, tiny_model: str, llama_tokenizer: bytes) -> Path:
    """An adapter as peft writes it, without a tokenizer."""
    folder = write_adapter(tmp_path / "whole", load_model(tiny_model).model, llama_tokenizer, 1)
    (folder / "tokenizer.model").unlink()
    return folder


def rewritten(folder: Path, change: Any) -> None:
    """Its tensors by other names, or some of them."""
    file = folder / "adapter_model.safetensors"
    save_file(dict(filter(None, map(change, load_file(file).items()))), file)


@pytest.mark.parametrize(
    "name",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: f"_orig_mod.{key}",
        lambda key: key.replace("layers.", "layers._orig_mod."),
        lambda key: key.replace(".weight", ".default.weight"),
    ],
    ids=["without a prefix", "compiled", "compiled by layer", "older peft"],
)
def test_an_adapter_answers_whatever_its_trainer_called_its_tensors(tiny_model: str, whole: Path, name: Any) -> None:
    wanted = load_model(tiny_model, str(whole)).model.state_dict()
    base = load_model(tiny_model).model.state_dict()
    rewritten(whole, lambda item: (name(item[0]), item[1]))
    found = load_model(tiny_model, str(whole)).model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    assert not torch.equal(
        found["model.layers.0.self_attn.q_proj.weight"], base["model.layers.0.self_attn.q_proj.weight"]
    )


def test_a_pickle_with_the_tensors_one_level_down_answers_as_well(tiny_model: str, whole: Path) -> None:
    wanted = load_model(tiny_model, str(whole)).model.state_dict()
    tensors = load_file(whole / "adapter_model.safetensors")
    (whole / "adapter_model.safetensors").unlink()
    torch.save({"state_dict": tensors, "epoch": 1}, whole / "adapter_model.bin")
    found = load_model(tiny_model, str(whole)).model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def configured(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda at: rewritten(at, lambda item: None if "layers.1" in item[0] else item), "it was cut short"),
        (lambda at: configured(at, init_lora_weights="pissa"), "sets init_lora_weights='pissa'"),
        (lambda at: configured(at, use_of_next_year=1), "sets use_of_next_year"),
        (lambda at: configured(at, peft_type="VERA"), "a VERA adapter"),
        (lambda at: rewritten(at, lambda item: (f"critic.{item[0]}", item[1])), "which .* does not have"),
        (
            lambda at: (at / "added_tokens.json").write_text('{"<|im_end|>": 800}'),
            r"no embedding rows for <\|im_end\|>",
        ),
        (lambda at: rewritten(at, lambda item: (item[0], item[1] * torch.nan)), "is not finite after the merge"),
        (
            lambda at: rewritten(at, lambda item: (item[0], item[1] * 0)),
            "changes no weight .*; the adapters are all zero",
        ),
        (lambda at: configured(at, lora_alpha=0), "lora_alpha is 0: it changes nothing"),
    ],
    ids=["half", "PiSSA", "unknown", "VeRA", "other names", "other tokens", "not finite", "zero", "alpha 0"],
)
def test_an_adapter_that_cannot_be_merged_is_not_asked_either(
    tiny_model: str, whole: Path, spoil: Any, said: str
) -> None:
    spoil(whole)
    with pytest.raises(InputError, match=said):
        load_model(tiny_model, str(whole))


def test_a_tied_model_with_a_trained_embedding_keeps_its_head_as_peft_keeps_it(copied: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(copied, dtype=torch.float32)
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight
    tied = tmp_path / "tied"
    base.save_pretrained(tied)
    shutil.copy(copied / "tokenizer.model", tied)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False)
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    found = load_model(str(tied), str(tmp_path / "adapter")).model
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        torch.testing.assert_close(found(ids).logits, wanted(ids).logits)


# --- where an answer ends ---------------------------------------------------------------------------------------------


def test_an_answer_ends_at_every_end_that_the_model_names(copied: Path, plain_model: Path) -> None:
    proto = parse_model((copied / "tokenizer.model").read_bytes())
    proto.pieces[700].type = CONTROL
    (copied / "tokenizer.model").write_bytes(proto.SerializeToString())
    (copied / "generation_config.json").write_text('{"eos_token_id": [1, 700, 701]}')
    loaded = load_model(str(copied))
    assert loaded.stops == (2, 700)
    prompt = loaded.prompt_ids("你好")
    model = loaded.model.model
    with torch.no_grad():
        loaded.model.lm_head.weight.zero_()
        loaded.model.lm_head.weight[700] = model(torch.tensor([prompt])).last_hidden_state[0, -1]
    assert answer(loaded, [prompt], GREEDY) == [[]]
    assert stream(loaded, prompt, GREEDY, lambda text: None) == []


# --- what is no model -------------------------------------------------------------------------------------------------


def damage_shard(folder: Path) -> None:
    shard = max(folder.glob("model-0*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])


def drop_shard(folder: Path) -> None:
    max(folder.glob("model-0*.safetensors")).unlink()


def drop_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.model", "tokenizer.json"):
        (folder / name).unlink()


def swap_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.model"
    file.write_bytes(extended(file.read_bytes(), ["中文"]))


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_shard, "model-00002.*(cut short|header)"),
        (drop_shard, "shard model-00002.* is missing"),
        (drop_tokenizer, "no tokenizer.model"),
        (swap_tokenizer, "its tokenizer has 801 pieces and the embedding 800 rows"),
        (drop_config, "no config.json"),
    ],
)
def test_what_is_no_whole_model_is_refused_in_one_line(copied: Path, damage: Any, said: str) -> None:
    damage(copied)
    with pytest.raises(InputError, match=said):
        load_model(str(copied))


def test_a_model_that_lacks_a_tensor_is_refused(copied: Path) -> None:
    for file in copied.glob("model-0*.safetensors"):
        state = load_file(file)
        state.pop("model.layers.1.mlp.up_proj.weight", None)
        save_file(state, file, {"format": "pt"})
    index = copied / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    del value["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(copied))


def test_another_kind_of_artifact_is_refused(tmp_path: Path) -> None:
    out = ArtifactWriter(str(tmp_path), "train_tokenizer", "key")
    out.add_bytes("tokenizer.model", b"x")
    with pytest.raises(InputError, match="this is of kind tokenizer; hf-model is needed"):
        load_model(out.publish("tokenizer").reference)


def test_a_model_in_s3_is_loaded_through_the_cache(plain_model: Path, s3_store: str, loaded: LoadedModel) -> None:

    out = ArtifactWriter(s3_store, "convert_weights", "key")
    source = open_artifact(str(plain_model))
    for name in source.names:
        out.copy(source, name)
    out.vocabulary = source.manifest.vocabulary
    again = load_model(out.publish("hf-model").reference)
    state = loaded.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())


def test_an_adapter_of_another_architecture_is_refused_before_a_weight_is_loaded(
    tiny_model: str, llama_tokenizer: bytes, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "num_hidden_layers": 2}
    wider = LlamaForCausalLM(LlamaConfig(vocab_size=800, **shape))
    adapter = write_adapter(tmp_path / "wider", wider, llama_tokenizer, 1)
    with pytest.raises(InputError, match=r"proj\.weight is \(96, 192\) in the adapter and \(64, 192\) in the model"):
        load_model(tiny_model, str(adapter))
    shape |= {"hidden_size": 64, "num_hidden_layers": 3}
    deeper = LlamaForCausalLM(LlamaConfig(vocab_size=800, **shape))
    adapter = write_adapter(tmp_path / "deeper", deeper, llama_tokenizer, 1)
    with pytest.raises(InputError, match=r"changes model\.layers\.2\..*, which .* does not have"):
        load_model(tiny_model, str(adapter))


@pytest.mark.parametrize(
    ("wanted", "gpu", "bfloat16", "installed", "adapters", "found"),
    [
        ("auto", False, False, False, False, "float32"),
        ("auto", True, True, False, True, "bfloat16"),
        ("auto", True, False, True, True, "float16"),
        ("float32", False, False, False, True, "float32"),
        ("float16", True, False, False, True, "float16"),
        ("int8", True, True, True, False, "int8"),
        ("4bit", True, False, True, False, "4bit"),
        ("float16", False, False, False, False, "a processor runs float32 alone"),
        ("bfloat16", False, False, False, False, "a processor runs float32 alone"),
        ("4bit", False, False, True, False, "a processor runs float32 alone"),
        ("bfloat16", True, False, False, False, "this GPU has no bfloat16"),
        ("int8", True, True, False, False, "bitsandbytes is not installed"),
        ("4bit", True, True, True, True, "use merge_adapters first"),
    ],
)
def test_a_precision_is_what_the_machine_has_or_refused(
    wanted: Any, gpu: bool, bfloat16: bool, installed: bool, adapters: bool, found: str
) -> None:
    if " " not in found:
        assert choose_precision(wanted, gpu, bfloat16, installed, adapters) == found
        return
    with pytest.raises(InputError, match=found):
        choose_precision(wanted, gpu, bfloat16, installed, adapters)


# --- a longer context -------------------------------------------------------------------------------------------------


def frequencies(length: int, dim: int = 16, alpha: float | None = None) -> list[float]:
    """Of a model of 2,048 positions that is stretched to a length, the fastest first."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(head_dim=dim, max_position_embeddings=2048)
    rotary = LlamaRotaryEmbedding(config)
    model = SimpleNamespace(config=config, model=SimpleNamespace(rotary_emb=rotary), device="cpu")
    stretch(LoadedModel(model, None, length, alpha), length)  # type: ignore[arg-type]
    return torch.as_tensor(rotary.inv_freq).tolist()


@pytest.mark.parametrize(("length", "alpha"), [(512, 1.0), (2048, 1.0), (2049, 1.1010742), (4096, 3.3), (8192, 7.7)])
def test_the_stretch_is_the_recipes(length: int, alpha: float) -> None:
    assert frequencies(2048)[-1] / frequencies(length)[-1] == pytest.approx(alpha, rel=1e-6)


@given(st.floats(1, 16), st.sampled_from([16, 64, 128]), st.sampled_from([512, 4096]))
def test_the_slowest_frequency_falls_by_alpha_and_the_fastest_stays(alpha: float, dim: int, length: int) -> None:
    found = frequencies(length, dim, alpha)
    assert found[0] == 1
    assert found[-1] == pytest.approx(10_000 ** (-(dim - 2) / dim) / alpha)
    base = 10_000 * alpha ** (dim / (dim - 2))
    assert found == pytest.approx([base ** (-2 * index / dim) for index in range(dim // 2)])


def test_a_stretched_model_reads_as_one_made_with_that_base(tiny_model: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(tiny_model).parent
    loaded = load_model(tiny_model, context_length=4096)
    dim = 16
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters["rope_theta"] = 10_000 * (1.1 * (3000 / 1024 - 1)) ** (dim / (dim - 2))
    made = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    ids = torch.randint(3, 800, (1, 2500), generator=torch.Generator().manual_seed(1))
    stretch(loaded, 3000)
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, made(ids).logits)
    # and back: what fits the model's own positions is read as ever
    stretch(loaded, 2048)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids[:, :300]).logits, plain(ids[:, :300]).logits)


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "linear, old": {"rope_parameters": None, "rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_positions_are_turned_as_transformers_turns_them(tmp_path: Path, tiny_model: str, rope: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(Path(tiny_model).parent, tmp_path / "model")
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64, **rope}))
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loaded = load_model(str(folder), context_length=96)
    chance = torch.Generator().manual_seed(1)
    # a longer one in between leaves nothing behind
    for length in (40, 90, 40):
        ids = torch.randint(3, 800, (1, length), generator=chance)
        with torch.inference_mode():
            said = made.generate(ids, attention_mask=ids * 0 + 1, do_sample=False, max_new_tokens=6, eos_token_id=2)
        found = answer(loaded, [ids[0].tolist()], dataclasses.replace(GREEDY, max_new_tokens=6))[0]
        if length == 40 or "dynamic" in str(rope):
            assert found == said[0, length:].tolist()
        elif "linear" in str(rope):
            # a longer context is a stretched base, of what config.json says
            assert loaded.model.model.rotary_emb.inv_freq[0] == 0.25
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, made(ids).logits)


def test_a_model_that_stretches_itself_takes_no_alpha(tmp_path: Path, tiny_model: str) -> None:
    folder = shutil.copytree(Path(tiny_model).parent, tmp_path / "model")
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ROPES["dynamic"]))
    with pytest.raises(InputError, match=r"--rope-alpha: .* by itself \(dynamic\); leave"):
        load_model(str(folder), rope_alpha=2.0)


def test_prompts_beyond_the_positions_are_answered_as_alone_and_the_others_as_ever(
    tiny_model: str, loaded: LoadedModel, chinese_text: list[str]
) -> None:
    long = load_model(tiny_model, context_length=4096)
    prompts = [[1, *range(300, 300 + count)] * repeat for count, repeat in ((20, 1), (299, 8), (30, 1), (399, 6))]
    assert max(map(len, prompts)) > 2048
    together = answer(long, prompts, GREEDY)
    assert together == [answer(long, [prompt], GREEDY)[0] for prompt in prompts]
    assert [together[0], together[2]] == answer(loaded, [prompts[0], prompts[2]], GREEDY)
    with pytest.raises(InputError, match="2048 positions"):
        answer(loaded, prompts, GREEDY)


# --- answering --------------------------------------------------------------------------------------------------------


def test_answers_in_a_batch_are_those_of_each_prompt_alone(loaded: LoadedModel, chinese_text: list[str]) -> None:
    prompts = [loaded.prompt_ids(text) for text in [*chinese_text[:9], "", "a"]]
    together = answer(loaded, prompts, GREEDY)
    assert together == [answer(loaded, [prompt], GREEDY)[0] for prompt in prompts]
    assert any(together)


def test_the_same_seed_draws_the_same_answers(loaded: LoadedModel) -> None:
    prompts = [loaded.prompt_ids("你好")] * 3
    draw = Sampling(temperature=1.5, max_new_tokens=12)
    assert answer(loaded, prompts, draw) == answer(loaded, prompts, draw)
    assert answer(loaded, prompts, draw) != answer(loaded, prompts, dataclasses.replace(draw, seed=7))


def test_an_answer_ends_where_the_context_ends(loaded: LoadedModel) -> None:
    narrow = dataclasses.replace(loaded, positions=20)
    prompts = [[1, *range(300, 300 + count)] for count in (3, 17)]
    lengths = [len(ids) for ids in answer(narrow, prompts, dataclasses.replace(GREEDY, max_new_tokens=100))]
    assert lengths[0] <= 16
    assert lengths[1] <= 2
    with pytest.raises(InputError, match="the prompt has 20 tokens and the model 20 positions"):
        answer(narrow, [[1] * 20], GREEDY)


def test_rows_that_only_pad_the_embedding_are_never_said(loaded: LoadedModel) -> None:
    import copy

    padded = copy.deepcopy(loaded.model)
    padded.resize_token_embeddings(loaded.encoder.size + 64, mean_resizing=False)
    padded.get_output_embeddings().weight.data[loaded.encoder.size :] *= 1000
    (said,) = answer(dataclasses.replace(loaded, model=padded), [loaded.prompt_ids("你好")], GREEDY)
    assert said
    assert max(said) < loaded.encoder.size


def test_a_stream_says_what_the_answer_says(loaded: LoadedModel) -> None:
    prompt = loaded.prompt_ids("今天")
    said: list[str] = []
    ids = stream(loaded, prompt, GREEDY, said.append)
    assert [ids] == answer(loaded, [prompt], GREEDY)
    assert "".join(said) == loaded.encoder.decode(ids)


def test_an_interrupted_stream_keeps_what_was_said(loaded: LoadedModel) -> None:
    said: list[str] = []

    def write(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt

    ids = stream(loaded, loaded.prompt_ids("a"), GREEDY, write)
    whole = answer(loaded, [loaded.prompt_ids("a")], GREEDY)[0]
    assert 3 <= len(ids) < len(whole)
    assert ids == whole[: len(ids)]


_text = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("汉字你好，𠀀𪚥🀄é ")), max_size=20)


@given(_text, st.lists(st.integers(0, 799), max_size=12), _text)
def test_streamed_pieces_are_the_text_and_never_half_a_character(
    llama_tokenizer: bytes, before: str, between: list[int], after: str
) -> None:
    encoder = SentencePieceEncoder(llama_tokenizer)
    ids = [*encoder.encode(before), *between, *encoder.encode(after)]
    said: list[str] = []
    text = TextStream(encoder, said.append)
    text.put(torch.tensor([encoder.bos]))
    for index in ids:
        text.put(torch.tensor([index]))
        assert "".join(said) == encoder.decode(ids)[: len("".join(said))]
    text.end()
    whole = encoder.decode(ids)
    assert "".join(said) == whole
    assert "".join(said).count("\ufffd") == whole.count("\ufffd")


@given(_text)
def test_whole_text_streams_without_a_replacement_character(llama_tokenizer: bytes, given_text: str) -> None:
    encoder = SentencePieceEncoder(llama_tokenizer)
    said: list[str] = []
    text = TextStream(encoder, said.append)
    text.put(torch.tensor([encoder.bos]))
    for index in encoder.encode(given_text.replace("\ufffd", "")):
        text.put(torch.tensor([index]))
    text.end()
    assert "\ufffd" not in "".join(said)


def test_a_model_ends_with_the_token_that_its_folder_names(chatml_model: Path) -> None:
    loaded = load_model(str(chatml_model))
    assert (loaded.encoder.size, loaded.encoder.eos) == (802, 801)
