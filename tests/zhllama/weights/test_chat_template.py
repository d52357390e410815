"""Which chat template counts, and that what is published has it in one place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest

from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.tokenizer.prompt import DEFAULT, PROMPTS, RECIPE
from zhllama.tokenizer.rendering import render
from zhllama.weights.chat_template import chosen, copy_tokenizer, default_of, template_in, without_markers

Folder = Callable[..., Artifact]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """`folder(name=content, …)`; a content that is no text is written as JSON."""
    made = iter(range(9))

    def make(files: dict[str, Any]) -> Artifact:
        place = tmp_path / f"folder-{next(made)}"
        for name, content in {"config.json": {}, **files}.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return open_artifact(str(place))

    return make


NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]


@pytest.mark.parametrize(
    ("files", "template", "default"),
    [
        ({}, None, ""),
        ({"tokenizer_config.json": {}}, None, ""),
        ({"tokenizer_config.json": {"chat_template": None}}, None, ""),
        ({"tokenizer_config.json": {"chat_template": "C"}}, "C", "C"),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, NAMED, "D"),
        ({"tokenizer_config.json": {"chat_template": NAMED[:1]}}, "D", "D"),
        ({"tokenizer_config.json": {"chat_template": NAMED[1:]}}, NAMED[1:], ""),
        ({"chat_template.jinja": "J 你"}, "J 你", "J 你"),
        ({"chat_template.jinja": "J", "tokenizer_config.json": {"chat_template": "C"}}, "J", "J"),
        ({"chat_template.jinja": "", "tokenizer_config.json": {"chat_template": "C"}}, "C", "C"),
        ({"chat_template.jinja": "D", "additional_chat_templates/tool_use.jinja": "T"}, NAMED, "D"),
        ({"chat_template.json": {"chat_template": "O"}}, "O", "O"),
    ],
    ids=[
        "no file", "none", "null", "configuration", "several", "one by name", "no default", "jinja", "both",
        "empty jinja", "more files", "old file",
    ],
)  # fmt: skip
def test_a_folders_own_template(folder, files, template, default):
    found = template_in(folder(files), "--model")
    assert found == template
    assert default_of(found) == default


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"chat_template": 5}},
        {"tokenizer_config.json": {"chat_template": [{"name": "x"}]}},
        {"tokenizer_config.json": {"chat_template": ["x"]}},
        {"tokenizer_config.json": "[]"},
        {"tokenizer_config.json": "{"},
        {"chat_template.jinja": "x" * (2**20 + 1)},
    ],
    ids=["number", "no text", "list of texts", "list", "no JSON", "too long"],
)
def test_what_is_no_template_is_refused_by_name(folder, files):
    with pytest.raises(InputError, match=r"--model .*: its chat template cannot be read \(.+\); mend"):
        template_in(folder(files), "--model")


def adapter(tmp_path: Path, stage: str, key: str, **facts: Any) -> Artifact:
    """As our own training publishes it: its base's template lies beside it."""
    out = ArtifactWriter(str(tmp_path / "store"), stage, key)
    out.add_json("tokenizer_config.json", {"chat_template": "of its base"})
    out.facts |= facts
    return open_artifact(out.publish("adapter").reference)


def test_the_models_own_is_kept_where_no_training_taught_another(folder, tmp_path):
    model = folder({"chat_template.jinja": "M"})
    plain = folder({})
    assert chosen(model) == ("M", "the model's own")
    assert chosen(model, [plain]) == ("M", "the model's own")
    for taught_nothing in (
        adapter(tmp_path, "pretrain", "old"),
        adapter(tmp_path, "pretrain", "new", prompt=""),
        adapter(tmp_path, "finetune", "text", prompt=""),
    ):
        assert chosen(model, [taught_nothing]) == ("M", "the model's own")


def test_the_last_that_was_taught_counts(folder, tmp_path):
    model, foreign = folder({"chat_template.jinja": "M"}), folder({"chat_template.jinja": "F"})
    of_release_0_1 = adapter(tmp_path, "finetune", "old")
    taught = adapter(tmp_path, "pretrain", "new", prompt="alpaca")
    for one in (of_release_0_1, taught):
        assert chosen(model, [one]) == (RECIPE.template, "Alpaca's: the adapter was trained with it")
        assert chosen(model, [foreign, one]) == (RECIPE.template, "Alpaca's: adapter 2 was trained with it")
        assert chosen(model, [one, foreign]) == ("F", "the one beside adapter 2")
    newline = adapter(tmp_path, "finetune", "newline", prompt="alpaca-newline")
    why = "Alpaca's with a newline before the answer: the adapter was trained with it"
    assert chosen(model, [newline]) == (DEFAULT.template, why)
    assert chosen(model, [newline, taught])[0] == RECIPE.template
    untaught = adapter(tmp_path, "pretrain", "after", prompt="")
    assert chosen(model, [foreign, untaught]) == ("F", "the one beside adapter 1")


def test_a_model_without_one_is_asked_with_the_trainings(folder):
    assert chosen(folder({}), [folder({})]) == (RECIPE.template, "Alpaca's: the model has none")


@pytest.mark.parametrize("template", ["J", "taught", NAMED])
def test_a_copied_tokenizer_has_its_template_in_one_place(folder, tmp_path, template):
    source = folder(
        {
            "tokenizer_config.json": {"chat_template": "C", "add_bos_token": True},
            "chat_template.jinja": "J",
            "additional_chat_templates/tool_use.jinja": "T",
            "tokenizer.json": "{}",
        }
    )
    out = ArtifactWriter(str(tmp_path / "store"), "pretrain", "key")
    copy_tokenizer(out, source, source.names, template)
    made = open_artifact(out.publish("hf-model").reference)
    assert set(made.names) == {"config.json", "tokenizer_config.json", "tokenizer.json"}
    assert json.loads(made.read("tokenizer_config.json")) == {"chat_template": template, "add_bos_token": True}
    assert template_in(made, "") == template


def test_a_tokenizer_that_has_its_template_already_is_copied_as_it_is(folder, tmp_path):
    source = folder({"tokenizer_config.json": '{"chat_template":   "C"}'})
    out = ArtifactWriter(str(tmp_path / "store"), "pretrain", "key")
    copy_tokenizer(out, source, source.names, "C")
    assert open_artifact(out.publish("hf-model").reference).read("tokenizer_config.json") == b'{"chat_template":   "C"}'


@pytest.mark.parametrize(
    "template",
    [
        *(prompt.template for prompt in PROMPTS.values()),
        "{% for m in messages %}\n  {%- generation -%}\n  {{ m.content }}\n  {% endgeneration %}\nx{% endfor %}",
        "{%generation%} {{ messages[0].content }} {%+ endgeneration %}",
    ],
    ids=[*PROMPTS, "trimmed", "close"],
)
def test_without_markers_a_template_renders_to_the_same_text_in_plain_jinja(template):
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    plain = environment.from_string(str(without_markers(template)))
    assert plain.render(messages=messages, **names) == render(template, messages, names)
    assert without_markers([{"name": "default", "template": template}])[0]["template"] == without_markers(template)
