"""The extended model: old rows, old files and old behaviour as they were; new rows as asked; one contract."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from components.extend_tokenizer.embedding_rows import CHUNK, new_rows
from components.extend_tokenizer.extender import extend_tokenizer
from components.extend_tokenizer.options import ExtendTokenizer
from components.extend_tokenizer.pieces import splits
from tests.loaded_model import load_model
from zhllama import storage
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.corpus import choose_texts
from zhllama.errors import InputError
from zhllama.inference.scoring import score_text
from zhllama.models.architecture import EMBEDDING, HEAD
from zhllama.stage.run import run_stage
from zhllama.tokenizer.prompt import DEFAULT
from zhllama.tokenizer.vocabulary import Relation, load_encoder
from zhllama.weights.safetensors_io import INDEX, Checkpoint


@pytest.fixture
def chinese(tmp_path, chinese_tokenizer):
    """The reference of a ready Chinese SentencePiece model: a file by any name."""
    (tmp_path / "chinese").mkdir()
    (tmp_path / "chinese" / "chinese_sp.model").write_bytes(chinese_tokenizer)
    return str(tmp_path / "chinese" / "chinese_sp.model")


@pytest.fixture(scope="module")
def base(tiny_model):
    return open_artifact(tiny_model)


@pytest.fixture(scope="module")
def extended(extended_model):
    return open_artifact(extended_model)


def extend(store, model, chinese="", **options):
    manifest = run_stage(
        ExtendTokenizer(store=str(store), model=str(model), chinese_tokenizer=chinese, **options), extend_tokenizer
    )
    return open_artifact(manifest.reference)


def llama(folder, tied=False, **options):
    """Saves a tiny random LLaMA as transformers does, and returns its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **sizes, **options)).half().save_pretrained(folder)
    return folder


def test_old_rows_stay_to_the_bit_and_new_ones_follow(base, extended):
    old, new = Checkpoint(base), Checkpoint(extended)
    size = load_encoder(base, "").size
    for table in (EMBEDDING, HEAD):
        assert torch.equal(new.read(table)[:size], old.read(table))
        assert new.info(table).shape == (load_encoder(extended, "").size, 64)
        assert torch.isfinite(new.read(table)).all()


def test_every_other_file_is_the_same_file(base, extended):
    shards = [name for name in base.names if name.startswith("model-0") and "model-00001" not in name]
    assert shards
    for name in shards:
        assert extended.file(name) == base.file(name)
    assert json.loads(extended.read(INDEX))["weight_map"] == json.loads(base.read(INDEX))["weight_map"]


def test_the_settings_and_the_contract_name_the_new_size(base, extended):
    encoder = load_encoder(extended, "")
    for name in ("config.json", "generation_config.json"):
        assert json.loads(extended.read(name))["pad_token_id"] == encoder.size - 1
    assert json.loads(extended.read("config.json"))["vocab_size"] == encoder.size
    contract = extended.manifest.vocabulary
    assert (contract.size, contract.pad, contract.tied, contract.dtype) == (
        encoder.size, encoder.size - 1, False, "float16",
    )  # fmt: skip
    assert contract.relation_to(base.manifest.vocabulary) is Relation.EXTENDS
    assert extended.manifest.facts["parity"]["differ"] == 0


def test_transformers_loads_it_and_english_gets_the_old_logits(base, extended, english_text):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = AutoModelForCausalLM.from_pretrained(base.root, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(extended.root, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(extended.root)
    ids = tokenizer(english_text[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits[..., : before.config.vocab_size], before(ids).logits)
    assert tokenizer.pad_token_id == after.config.pad_token_id == after.config.vocab_size - 1


def test_the_published_tokenizer_gives_sentencepieces_ids(extended, chinese_text, english_text):
    from transformers import AutoTokenizer

    texts, encoder = chinese_text + english_text[:1000], load_encoder(extended, "")
    found = AutoTokenizer.from_pretrained(extended.root)(texts)["input_ids"]
    assert found == [[encoder.bos, *ids] for ids in encoder.encode_batch(texts)]


@pytest.mark.parametrize("table", [EMBEDDING, HEAD])
@pytest.mark.parametrize("init", ["piece-mean", "piece-mean-norm"])
def test_a_new_row_is_the_mean_of_its_old_pieces(tmp_path, base, extended, tiny_model, chinese, init, table):
    found = extended if init == "piece-mean" else extend(tmp_path, tiny_model, chinese, init=init)
    encoder = load_encoder(found, "")
    piece = next(piece for piece in encoder.pieces[800:] if len(piece) == 2)
    parts = Checkpoint(base).read(table).float()[splits(load_encoder(base, "").model, [piece])[0]]
    mean = parts.mean(dim=0)
    row = Checkpoint(found).read(table)[encoder.pieces.index(piece)].float()
    wanted = mean if init == "piece-mean" else mean / mean.norm() * parts.norm(dim=1).mean()
    torch.testing.assert_close(row, wanted, atol=1e-3, rtol=1e-3)


def test_normal_rows_are_the_recipes_and_the_same_for_a_seed(tmp_path, tiny_model, chinese):
    found = [
        Checkpoint(extend(tmp_path / name, tiny_model, chinese, init="normal", seed=seed)).read(EMBEDDING)[800:].float()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[0].std().item() == pytest.approx(0.02, rel=0.02)
    assert found[0].mean().item() == pytest.approx(0, abs=5e-4)


def test_mean_rows_are_the_mean_of_all_rows(tmp_path, base, tiny_model, chinese):
    rows = Checkpoint(extend(tmp_path, tiny_model, chinese, init="mean")).read(HEAD)[800:].float()
    expected = Checkpoint(base).read(HEAD).float().mean(dim=0).expand_as(rows)
    torch.testing.assert_close(rows, expected, atol=1e-4, rtol=1e-3)


def test_rows_do_not_depend_on_the_chunk_they_lie_in():
    old = torch.randn(50, 8, generator=torch.Generator().manual_seed(3))
    parts = [[index % 50, (index * 7) % 50] for index in range(CHUNK + 10)]
    chunks = list(new_rows(old, parts, "piece-mean", torch.Generator()))
    assert [len(chunk) for chunk in chunks] == [CHUNK, 10]
    alone = next(new_rows(old, parts[CHUNK:], "piece-mean", torch.Generator()))
    torch.testing.assert_close(chunks[1], alone)


def test_in_s3_the_result_is_the_same(s3_store, base, extended, chinese):
    out = ArtifactWriter(s3_store, "convert_weights", "key")
    for name in base.names:
        out.copy(base, name)
    out.vocabulary = base.manifest.vocabulary
    found = extend(s3_store, out.publish("hf-model").reference, chinese)
    assert {file.path: file.sha256 for file in found.manifest.files} == {
        file.path: file.sha256 for file in extended.manifest.files
    }
    for name in found.names:
        assert found.read(name) == extended.read(name)


def test_a_model_in_one_file_is_parted(tmp_path, llama_tokenizer, chinese):
    folder = llama(tmp_path / "model", vocab_size=800)
    (folder / "tokenizer.model").write_bytes(llama_tokenizer)
    found = extend(tmp_path / "store", folder, chinese)
    assert "model.safetensors" not in found
    before, after = Checkpoint(open_artifact(str(folder))), Checkpoint(found)
    assert set(before.tensors) == set(after.tensors)
    for name in before.tensors:
        assert torch.equal(after.read(name)[: before.info(name).shape[0]], before.read(name))
    assert {info.file for name, info in after.tensors.items() if name in (EMBEDDING, HEAD)} == {
        "model-00001-of-00002.safetensors"
    }


def test_the_files_of_a_model_of_release_0_1_are_copied_under_the_names_of_today(store, tmp_path, tiny_model, chinese):
    old = {1: "model-embeddings.safetensors", 2: "model-00001.safetensors"}
    new = {number: f"model-0000{number}-of-00002.safetensors" for number in old}
    given, out = open_artifact(tiny_model), ArtifactWriter(store, "convert_weights", "old")
    for name in given.names:
        if name not in (*new.values(), INDEX):
            out.copy(given, name)
    for number, name in new.items():
        out.copy(given, name, old[number])
    index = given.read(INDEX).decode().replace(new[1], old[1]).replace(new[2], old[2])
    out.add_bytes(INDEX, index.encode())
    model = open_artifact(out.publish("hf-model").reference)
    made = extend(store, model.root, chinese)
    assert {name for name in made.names if name.endswith(".safetensors")} == set(new.values())
    assert made.file(new[2]).sha256 == model.file(old[2]).sha256
    assert not made.find_corruption()
    before, after = Checkpoint(model), Checkpoint(made)
    assert all(torch.equal(after.read(name)[:8], before.read(name)[:8]) for name in before.tensors)


def test_a_sharded_foreign_model_keeps_its_files_but_for_the_embeddings(tmp_path, llama_tokenizer, chinese):
    from transformers import AutoModelForCausalLM

    folder = llama(tmp_path / "whole", vocab_size=800)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(
        tmp_path / "model", max_shard_size="60KB"
    )
    (tmp_path / "model" / "tokenizer.model").write_bytes(llama_tokenizer)
    before, after = (
        Checkpoint(open_artifact(str(tmp_path / "model"))),
        Checkpoint(extend(tmp_path / "store", tmp_path / "model", chinese)),
    )
    assert len(before.files) > 2
    for name, info in before.tensors.items():
        assert torch.equal(after.read(name)[: info.shape[0]], before.read(name))
        if name not in (EMBEDDING, HEAD):
            assert after.info(name).file == info.file


def test_a_tied_model_stays_tied(tmp_path, llama_tokenizer, chinese):
    from transformers import AutoModelForCausalLM

    folder = llama(tmp_path / "model", tied=True, vocab_size=800)
    (folder / "tokenizer.model").write_bytes(llama_tokenizer)
    found = extend(tmp_path / "store", folder, chinese)
    assert HEAD not in Checkpoint(found).tensors
    assert found.manifest.vocabulary.tied is True
    model = AutoModelForCausalLM.from_pretrained(found.root)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_rows_that_only_pad_the_old_table_are_dropped(tmp_path, llama_tokenizer, chinese):
    folder = llama(tmp_path / "model", vocab_size=832)
    (folder / "tokenizer.model").write_bytes(llama_tokenizer)
    found = extend(tmp_path / "store", folder, chinese)
    rows = Checkpoint(found).read(EMBEDDING)
    assert torch.equal(rows[:800], Checkpoint(open_artifact(str(folder))).read(EMBEDDING)[:800])
    assert len(rows) == found.manifest.vocabulary.size


def test_zero_scores_say_in_the_manifest_how_many_lines_differ(tmp_path, tiny_model, tying_tokenizer):
    (tmp_path / "tying.model").write_bytes(tying_tokenizer)
    facts = extend(tmp_path, tiny_model, str(tmp_path / "tying.model"), scores="zero", pieces="all").manifest.facts
    assert 0 < facts["parity"]["differ"] < facts["parity"]["lines"]
    assert f"differs on {facts['parity']['differ']} of" in facts["summary"]


def test_the_padding_piece_alone_extends_a_recipes_model(tmp_path, tiny_model, chinese):
    plain = extend(tmp_path, tiny_model, chinese, scores="zero", pieces="all", pad=False)
    padded = extend(tmp_path, plain.manifest.reference, scores="zero", pieces="all")
    assert padded.manifest.facts["appended"] == 1
    assert padded.manifest.vocabulary.relation_to(plain.manifest.vocabulary) is Relation.EXTENDS


def test_a_unigram_model_is_completed_and_the_manifest_says_so(tmp_path, tiny_model, unigram_tokenizer):
    (tmp_path / "unigram.model").write_bytes(unigram_tokenizer)
    artifact = extend(tmp_path, tiny_model, str(tmp_path / "unigram.model"))
    facts = artifact.manifest.facts
    assert facts["completing"]["count"] > 0
    assert len(facts["completing"]["first"]) == min(20, facts["completing"]["count"])
    assert (facts["unreachable"], facts["dropped"]["count"], facts["parity"]["differ"]) == (0, 0, 0)
    assert f"{facts['completing']['count']} of them so that merges reach others" in facts["summary"]


def test_rows_are_filled_up_to_a_multiple(tmp_path, base, tiny_model, chinese):
    from transformers import AutoModelForCausalLM

    plain, padded = (extend(tmp_path, tiny_model, chinese, pad_to_multiple_of=multiple) for multiple in (1, 64))
    size, rows = padded.manifest.vocabulary.size, padded.manifest.vocabulary.rows
    assert rows % 64 == 0
    assert size < rows
    assert json.loads(padded.read("config.json"))["vocab_size"] == rows
    for table in (EMBEDDING, HEAD):
        found = Checkpoint(padded).read(table)
        assert torch.equal(found[:size], Checkpoint(plain).read(table))
        mean = Checkpoint(base).read(table).float().mean(dim=0).expand(rows - size, -1)
        torch.testing.assert_close(found[size:].float(), mean, atol=1e-4, rtol=1e-3)
    # the vocabulary is the same one: what was trained with the one fits the other
    assert padded.manifest.vocabulary.relation_to(plain.manifest.vocabulary) is Relation.EQUAL
    assert AutoModelForCausalLM.from_pretrained(padded.root).lm_head.weight.shape[0] == rows
    assert f"in {rows:,} rows" in padded.manifest.facts["summary"]


def test_padded_rows_may_be_extended_again(tmp_path, tiny_model, chinese, unigram_tokenizer):
    (tmp_path / "unigram.model").write_bytes(unigram_tokenizer)
    padded = extend(tmp_path, tiny_model, chinese, pad_to_multiple_of=64, pad=False)
    again = extend(tmp_path, padded.manifest.reference, str(tmp_path / "unigram.model"))
    size = padded.manifest.vocabulary.size
    assert again.manifest.vocabulary.relation_to(padded.manifest.vocabulary) is Relation.EXTENDS
    assert torch.equal(Checkpoint(again).read(EMBEDDING)[:size], Checkpoint(padded).read(EMBEDDING)[:size])


def test_tokens_that_the_folder_names_keep_their_rows(tmp_path, chatml_model, chinese):
    extended = extend(tmp_path / "store", chatml_model, chinese)
    encoder = load_encoder(extended, "")
    assert encoder.pieces[800:802] == ["<|im_start|>", "<|im_end|>"]
    assert (encoder.eos, extended.manifest.vocabulary.eos) == (801, 801)
    assert extended.manifest.facts["pieces_before"] == 802
    old, new = Checkpoint(open_artifact(str(chatml_model))), Checkpoint(extended)
    for table in (EMBEDDING, HEAD):
        assert torch.equal(new.read(table)[:802], old.read(table))
    assert json.loads(extended.read("config.json"))["eos_token_id"] == 801


def broken_model(tmp_path, llama_tokenizer, fault):
    folder = llama(tmp_path / "model", vocab_size=700 if fault == "rows" else 800)
    if fault != "tokenizer":
        content = {"junk": b"junk", "llama 3": b"IQ== 0\nIg== 1\nIw== 2\n"}.get(fault, llama_tokenizer)
        (folder / "tokenizer.model").write_bytes(content)
    if fault == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    if fault == "config":
        (folder / "config.json").unlink()
    if fault == "json":
        (folder / "config.json").write_text("{")
    if fault == "weights":
        (folder / "model.safetensors").unlink()
    if fault == "quantised":
        from safetensors.torch import load_file, save_file

        found = load_file(folder / "model.safetensors")
        found["lm_head.weight"] = (found["lm_head.weight"] * 100).to(torch.int8)
        save_file(found, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("rows", r"its tokenizer has 800 pieces and \S+ 700 rows"),
        ("tokenizer", "no tokenizer.model in it, and no tokenizer.json with a vocabulary; give a tokenizer"),
        ("junk", "not a SentencePiece model"),
        ("llama 3", "a byte-level BPE tokenizer as LLaMA 3's .*; give a model with its tokenizer.json"),
        ("config", "no config.json in it"),
        ("json", "config.json is no JSON object"),
        ("weights", "no model.safetensors"),
        ("quantised", r"lm_head\.weight is int8, a quantised weight; give the model in float16"),
    ],
)
def test_a_model_that_cannot_be_extended_is_named(tmp_path, llama_tokenizer, chinese, fault, said):
    folder = broken_model(tmp_path, llama_tokenizer, fault)
    with pytest.raises(InputError, match=said):
        extend(tmp_path / "store", folder, chinese)
    assert not any(file.name.endswith("manifest.json") for file in storage.listing(str(tmp_path / "store")))


def test_nothing_to_append_is_refused_at_once():
    with pytest.raises(InputError, match="--pad false without --chinese-tokenizer"):
        ExtendTokenizer(store="s", model="m", pad=False)


def test_a_multiple_out_of_range_is_refused():
    with pytest.raises(InputError, match="--pad-to-multiple-of 0: give 1 to 1024"):
        ExtendTokenizer(store="s", model="m", pad_to_multiple_of=0)


def test_an_artifact_of_another_kind_is_refused(tmp_path, tiny_model, chinese_tokenizer):
    out = ArtifactWriter(str(tmp_path), "train_tokenizer", "key")
    out.add_bytes("tokenizer.model", chinese_tokenizer)
    reference = out.publish("tokenizer").reference
    with pytest.raises(InputError, match=r"--model .*this is of kind tokenizer; hf-model is needed"):
        extend(tmp_path / "store", reference)


@pytest.mark.slow
def test_the_command_takes_kfps_texts(tmp_path, tiny_model, chinese):
    command = [sys.executable, "-m", "components.extend_tokenizer", "--store", str(tmp_path / "store")]
    command += ["--model", tiny_model, "--chinese-tokenizer", chinese, "--scores", "zero", "--pieces", "all"]
    command += ["--pad", "false", "--init", "", "--reference", str(tmp_path / "ref")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    artifact = open_artifact((tmp_path / "ref").read_text())
    assert artifact.manifest.kind == "hf-model"
    assert artifact.manifest.vocabulary.pad is None
    assert artifact.manifest.configuration["pad"] is False


def test_the_special_ids_of_the_base_are_the_tokenizers_whatever_its_files_say(tmp_path, tiny_model, chinese_tokenizer):
    model = tmp_path / "model"
    shutil.copytree(Path(tiny_model).parent, model)
    (model / "manifest.json").unlink()
    for name in ("config.json", "generation_config.json"):
        said = json.loads((model / name).read_text()) | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
        (model / name).write_text(json.dumps(said))
    options = ExtendTokenizer(store=str(tmp_path / "store"), model=str(model))
    made = open_artifact(run_stage(options, extend_tokenizer).reference)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads(made.read(name))
        assert [settings[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 800]


@pytest.mark.parametrize(
    ("own", "why"),
    [("{{ 'mine' }}", "the model's own"), ("", f"{DEFAULT.title}: the model has none")],
    ids=["own", "none"],
)
def test_the_chat_template_of_the_base_is_kept(tmp_path, tiny_model, own, why):
    model = shutil.copytree(Path(tiny_model).parent, tmp_path / "model")
    (model / "manifest.json").unlink()
    (model / "tokenizer_config.json").unlink()
    (model / "chat_template.jinja").write_text(own)
    made = extend(tmp_path / "store", model)
    assert "chat_template.jinja" not in made
    assert json.loads(made.read("tokenizer_config.json"))["chat_template"] == (own or DEFAULT.template)
    assert made.manifest.facts["chat_template"] == why


def test_room_is_asked_for_before_anything_is_written(tmp_path, tiny_model, chinese, full_disk):
    with pytest.raises(InputError, match=r"--store .* will be needed and 1\.0 kB are free"):
        extend(tmp_path / "store", tiny_model, chinese)
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


# --- what the model knows before it is trained ------------------------------------------------------------------------


@pytest.fixture
def measured_texts(tmp_path, chinese_text, english_text):
    for name, lines in (("chinese", chinese_text[:20]), ("english", english_text[:20])):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    return f"{tmp_path}/chinese.txt,{tmp_path}/english.txt"


def test_it_is_measured_before_and_after_as_the_published_model_has_it(
    tmp_path, tiny_model, extended_model, chinese, measured_texts, chinese_text, english_text
):
    found = extend(tmp_path / "store", tiny_model, chinese, measure=measured_texts)
    base, extended = load_model(tiny_model), load_model(extended_model)
    for measured, lines in zip(found.manifest.facts["measured"], (chinese_text[:20], english_text[:20]), strict=True):
        texts = choose_texts(lines, 50_000)
        assert measured["before"] == pytest.approx(score_text(base, texts, ""))
        # the tables of the published model are float16, as its base's are
        assert measured["after"] == pytest.approx(score_text(extended, texts, "", base.encoder.size), rel=1e-4)
    # what was measured is no part of what the artifact is
    assert b'"measured"' not in storage.read_bytes(found.manifest.reference)


@pytest.fixture
def sure_model(tmp_path, tiny_model):
    """The tiny model with a head that makes it sure of what it says, as a trained one is."""
    model = load_model(tiny_model).model
    model.get_output_embeddings().weight.data *= 200
    model.save_pretrained(tmp_path / "sure")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "sure" / name).write_bytes(open_artifact(tiny_model).read(name))
    return tmp_path / "sure"


@pytest.mark.parametrize(("init", "ready"), [("piece-mean", True), ("piece-mean-norm", False), ("mean", True)])
def test_rows_that_take_the_probability_from_others_are_warned_of(
    tmp_path, sure_model, chinese, measured_texts, caplog, init, ready
):
    with caplog.at_level("INFO"):
        extend(tmp_path / "store", sure_model, chinese, measure=measured_texts, init=init)
    said = [record for record in caplog.records if "before any training" in record.getMessage()]
    assert [record.levelname for record in said] == ["INFO", "INFO" if ready else "WARNING"]
    assert "english.txt" in said[1].getMessage()
    assert ("rows that are not ready" in said[1].getMessage()) is not ready
