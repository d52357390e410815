"""Which chat template a model is asked with: its own, unless a training taught another one.

A template lies in chat_template.jinja (with others in additional_chat_templates/), which wins, as in transformers, or
in tokenizer_config.json. What is published has it in tokenizer_config.json alone, where transformers 4 and 5, vLLM and
llama.cpp's converter read it: chat_template.jinja is not read by transformers before 4.50.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.tokenizer.prompt import BY_TEMPLATE, PROMPTS, RECIPE, Prompt

Template = str | list[dict[str, str]]
"""A text, or several by name: [{"name", "template"}], as tokenizer_config.json holds them; one is named `default`."""

CONFIG = "tokenizer_config.json"
JINJA, MORE, OLD = "chat_template.jinja", "additional_chat_templates/", "chat_template.json"
DEFAULT = "default"
LONGEST = 2**20
"""Bytes of a template; those of models with tools have some ten thousand."""
TRAININGS = ("pretrain", "finetune")


def is_template(name: str) -> bool:
    """Whether a file holds nothing but a chat template."""
    return name in (JINJA, OLD) or name.startswith(MORE)


def template_in(artifact: Artifact, option: str) -> Template | None:
    """The template that a model or adapter carries; None without one. InputError for one that is no text."""
    where = f"{option} {artifact.root}"
    found: dict[str, Any] = {}
    try:
        for name in (OLD, CONFIG):
            if name in artifact and (said := read_object(artifact, name).get("chat_template")):
                found = _by_name(said)
        if JINJA in artifact and (text := _text(artifact, JINJA)).strip():
            found = {DEFAULT: text}
            more = (name for name in artifact.names if name.startswith(MORE) and name.endswith(".jinja"))
            found |= {name.removeprefix(MORE).removesuffix(".jinja"): _text(artifact, name) for name in more}
        if wrong := [name for name, text in found.items() if not isinstance(text, str) or len(text) > LONGEST]:
            raise ValueError(f"{wrong[0]!r} is no text, or longer than {LONGEST:,}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: its chat template cannot be read ({error}); mend {CONFIG} or {JINJA}") from error
    if found.keys() <= {DEFAULT}:
        return found.get(DEFAULT) or None
    return [{"name": name, "template": text} for name, text in found.items()]


def default_of(template: Template | None) -> str:
    """The one that a conversation is written with; "" without one."""
    if isinstance(template, list):
        return next((one["template"] for one in template if one["name"] == DEFAULT), "")
    return template or ""


def same_template(one: Template | None, other: Template | None) -> bool:
    """Whether two ask alike; of ours, with markers or without."""
    first, second = default_of(one), default_of(other)
    return first == second or (first in BY_TEMPLATE and BY_TEMPLATE[first] is BY_TEMPLATE.get(second))


def _by_name(said: Any) -> dict[str, Any]:
    if isinstance(said, list):
        return {one["name"]: one["template"] for one in said}
    return {DEFAULT: said}


def _text(artifact: Artifact, name: str) -> str:
    if artifact.file(name).size > LONGEST:
        raise ValueError(f"{name} is longer than {LONGEST:,} bytes")
    return artifact.read(name).decode()


def chosen(
    model: Artifact, adapters: Sequence[Artifact] = (), option: str = "--model", otherwise: Prompt = RECIPE
) -> tuple[Template, str]:
    """The template of a model that these adapters are merged into, in that order, and why that one: the last that was
    taught counts, then the model's own, then `otherwise`: the recipe's, which every model is asked with that has
    none."""
    for number, adapter in reversed(list(enumerate(adapters, 1))):
        which = f"adapter {number}" if len(adapters) > 1 else "the adapter"
        if _trained_here(adapter):
            # what else lies beside it is its base's
            if prompt := taught(adapter):
                return prompt.template, f"{prompt.title}: {which} was trained with it"
        elif (own := template_in(adapter, "--adapters")) is not None:
            return own, f"the one beside {which}"
    if (own := template_in(model, option)) is not None:
        return own, "the model's own"
    return otherwise.template, f"{otherwise.title}: the model has none"


PROMPT_FACT = "prompt"
"""The name of the prompt that the items of a packed dataset, or an adapter, or a model with trained embeddings, were
made or trained with; "" for text."""
OWN = "own"
"""As such a name: the base's own chat template, which lies beside it."""


class Taught(NamedTuple):
    """A prompt of ours, or a base's own template, as items were written with it."""

    name: str
    title: str
    template: Template


def prompt_of(artifact: Artifact, otherwise: str) -> Taught | None:
    """What the manifest says, `otherwise` where it says nothing; None for text. InputError for another's."""
    name = artifact.manifest.facts.get(PROMPT_FACT, otherwise)
    if name == OWN:
        own = template_in(artifact, "the dataset or adapter")
        if not default_of(own):
            raise InputError(f"{artifact.root}: the chat template that it was made with is gone; make it again")
        assert own is not None
        return Taught(OWN, "the base's own", own)
    if name and name not in PROMPTS:
        raise InputError(f"{artifact.root}: made with the prompt {name!r}, unknown to this release; take a later one")
    prompt = PROMPTS.get(name)
    return None if prompt is None else Taught(prompt.name, prompt.title, prompt.template)


def _trained_here(adapter: Artifact) -> bool:
    return adapter.verified and adapter.manifest.stage in TRAININGS


def taught(trained: Artifact) -> Taught | None:
    """The prompt that an adapter of a training here has learnt; None for one of text, or of somebody else's."""
    if not _trained_here(trained):
        return None
    # adapters of release 0.1 say nothing: theirs is the stage
    return prompt_of(trained, RECIPE.name if trained.manifest.stage == "finetune" else "")


_MARKER = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")


def without_markers(template: Template) -> Template:
    """For engines whose jinja has no `generation`: comments stand in its place, which trim white space as it does."""
    if isinstance(template, list):
        return [one | {"template": str(without_markers(one["template"]))} for one in template]
    prompt = BY_TEMPLATE.get(template)
    return prompt.plain if prompt else _MARKER.sub(r"{#\1 \2#}", template)
