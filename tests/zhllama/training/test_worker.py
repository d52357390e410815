"""What a training publishes beside its weights: settings by the tokenizer, and the chat template that was taught."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from components.serve.check import checked
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.data.packed import TRAIN
from zhllama.errors import InputError
from zhllama.tokenizer.prompt import DEFAULT, RECIPE
from zhllama.tokenizer.vocabulary import load_encoder
from zhllama.training.inputs import TrainingInputs
from zhllama.training.worker import _add_model, _add_tokenizer
from zhllama.weights.chat_template import chosen


@pytest.fixture
def base(tmp_path: Path, tiny_model: str) -> Artifact:
    """The tiny model with tokenizer.model alone, ids that this has not, and a chat template of its own."""
    folder = shutil.copytree(Path(tiny_model).parent, tmp_path / "model")
    for name in ("manifest.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "chat_template.jinja").write_text("{{ 'mine' }}")
    for name in ("config.json", "generation_config.json"):
        said = json.loads((folder / name).read_text()) | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
        (folder / name).write_text(json.dumps(said))
    return open_artifact(str(folder))


def inputs(base: Artifact, store: Path, columns: int, adapter: Artifact | None = None, **said: str) -> TrainingInputs:
    out = ArtifactWriter(str(store), "prepare_dataset", "key")
    out.add_json("x.json", {})
    out.facts |= {"splits": {TRAIN: {"columns": columns}}, **said}
    unused: Any = None
    return TrainingInputs(base, open_artifact(out.publish("packed-dataset").reference), adapter, unused)


def test_a_model_is_published_with_its_tokenizers_ids_and_its_own_template(base, tmp_path):
    out = ArtifactWriter(str(tmp_path / "store"), "pretrain", "key")
    _add_model(out, inputs(base, tmp_path, columns=1), {})
    made = open_artifact(out.publish("hf-model").reference)
    config, generation, tokenizer = (
        json.loads(made.read(name)) for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, None]
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}
    assert tokenizer["chat_template"] == "{{ 'mine' }}"
    assert "chat_template.jinja" not in made
    assert made.manifest.facts["chat_template"] == "the model's own"
    # it can be served as it is
    checked(str(made.root))


@pytest.mark.parametrize(
    ("columns", "said", "template", "prompt", "why"),
    [
        (1, {}, "{{ 'mine' }}", "", "the model's own"),
        (2, {}, RECIPE.template, "alpaca", f"{RECIPE.title}: it was trained with it"),
        (2, {"prompt": "alpaca"}, RECIPE.template, "alpaca", f"{RECIPE.title}: it was trained with it"),
        (2, {"prompt": "alpaca-newline"}, DEFAULT.template, "alpaca-newline",
         f"{DEFAULT.title}: it was trained with it"),
    ],
    ids=["text", "items of earlier releases", "items, the recipe's", "items"],
)  # fmt: skip
def test_an_adapter_has_the_template_that_was_taught(base, tmp_path, columns, said, template, prompt, why):
    out = ArtifactWriter(str(tmp_path / "store"), "finetune", "key")
    _add_tokenizer(out, inputs(base, tmp_path, columns, **said), load_encoder(base, ""))
    made = open_artifact(out.publish("adapter").reference)
    assert sorted(made.names) == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert made.read("tokenizer.model") == base.read("tokenizer.model")
    assert json.loads(made.read("tokenizer_config.json"))["chat_template"] == template
    facts = {"prompt": prompt, "chat_template": why}
    assert made.manifest.facts | facts == made.manifest.facts


OWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


def of_own_words(base: Artifact, store: Path, template: str) -> TrainingInputs:
    out = ArtifactWriter(str(store), "prepare_dataset", "own")
    out.add_bytes("chat_template.jinja", template.encode())
    out.facts |= {"splits": {TRAIN: {"columns": 3}}, "prompt": "own"}
    unused: Any = None
    return TrainingInputs(base, open_artifact(out.publish("packed-dataset").reference), None, unused)


@pytest.mark.parametrize("same", [True, False])
def test_an_adapter_that_learnt_the_bases_own_words_is_asked_by_them(base, tmp_path, caplog, same):
    template = "{{ 'mine' }}" if same else OWN
    out = ArtifactWriter(str(tmp_path / "store"), "finetune", "key")
    _add_tokenizer(out, of_own_words(base, tmp_path, template), load_encoder(base, ""))
    out.add_json("adapter_config.json", {})
    made = open_artifact(out.publish("adapter").reference)
    assert json.loads(made.read("tokenizer_config.json"))["chat_template"] == template
    assert made.manifest.facts["prompt"] == "own"
    assert made.manifest.facts["chat_template"] == "the base's own: it was trained with it"
    assert ("must be given the adapter's chat template" in caplog.text) is not same
    # merged, and continued on text
    assert chosen(base, [made]) == (template, "the base's own: the adapter was trained with it")
    out = ArtifactWriter(str(tmp_path / "store"), "pretrain", "after")
    _add_tokenizer(out, inputs(base, tmp_path, 1, made, prompt=""), load_encoder(base, "--model"))
    after = open_artifact(out.publish("adapter").reference)
    assert json.loads(after.read("tokenizer_config.json"))["chat_template"] == template
    assert after.manifest.facts["prompt"] == "own"


def test_the_other_templates_that_a_base_names_stay_beside_the_one_that_was_taught(base, tmp_path):
    named = [{"name": "default", "template": OWN}, {"name": "tool_use", "template": "T"}]
    folder = Path(base.root)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    out = ArtifactWriter(str(tmp_path / "store"), "finetune", "key")
    _add_tokenizer(out, of_own_words(open_artifact(str(folder)), tmp_path, OWN), load_encoder(base, ""))
    made = open_artifact(out.publish("adapter").reference)
    assert json.loads(made.read("tokenizer_config.json"))["chat_template"] == named


def test_a_dataset_whose_template_is_gone_is_refused(base, tmp_path):
    out = ArtifactWriter(str(tmp_path / "store"), "finetune", "key")
    with pytest.raises(InputError, match="the chat template that it was made with is gone; make it again"):
        _add_tokenizer(out, inputs(base, tmp_path, 3, prompt="own"), load_encoder(base, ""))


@pytest.mark.parametrize("prompt", [DEFAULT, RECIPE], ids=lambda prompt: prompt.name)
@pytest.mark.parametrize(
    "asked", [DEFAULT.template, RECIPE.template, RECIPE.plain, ""], ids=["newline", "recipe", "0.1", "none"]
)
def test_a_base_that_is_asked_otherwise_than_is_taught_is_named(base, tmp_path, caplog, asked, prompt):
    folder = Path(base.root)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": asked}))
    out = ArtifactWriter(str(tmp_path / "store"), "finetune", "key")
    _add_tokenizer(out, inputs(open_artifact(str(folder)), tmp_path, 2, prompt=prompt.name), load_encoder(base, ""))
    alike = asked in (prompt.template, prompt.plain)
    assert ("must be given the adapter's chat template" in caplog.text) is not alike


@pytest.mark.parametrize(
    ("stage", "said", "prompt"),
    [("finetune", {"prompt": "alpaca-newline"}, DEFAULT), ("finetune", {}, RECIPE), ("pretrain", {}, None)],
    ids=["taught", "release 0.1", "text"],
)
def test_an_adapter_that_is_continued_on_text_keeps_the_template_that_it_was_taught(
    base, tmp_path, stage, said, prompt
):
    out = ArtifactWriter(str(tmp_path / "store"), stage, "before")
    out.add_json("adapter_config.json", {})
    out.facts |= said
    first = open_artifact(out.publish("adapter").reference)
    out = ArtifactWriter(str(tmp_path / "store"), "pretrain", "after")
    _add_tokenizer(out, inputs(base, tmp_path, 1, first, prompt=""), load_encoder(base, "--model"))
    made = open_artifact(out.publish("adapter").reference)
    wanted = prompt.template if prompt else "{{ 'mine' }}"
    assert json.loads(made.read("tokenizer_config.json"))["chat_template"] == wanted
    assert made.manifest.facts["prompt"] == (prompt.name if prompt else "")
    assert chosen(base, [made])[0] == wanted


def test_a_prompt_that_a_later_release_taught_is_refused(base, tmp_path):
    out = ArtifactWriter(str(tmp_path / "store"), "finetune", "key")
    given = inputs(base, tmp_path, 2, prompt="chat-of-2030")
    with pytest.raises(InputError, match="the prompt 'chat-of-2030', unknown to this release"):
        _add_tokenizer(out, given, load_encoder(base, ""))
