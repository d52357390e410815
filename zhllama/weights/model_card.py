"""README.md of a published model, and what it says of where the model comes from; a GGUF's metadata say the same.

Base and license are written where they are known: the base by its name on the Hub, the license by the front matter of
the base's own README.md or by its LICENSE, which is carried along. Nothing is guessed, and no address of a folder or
store gets into the card.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zhllama.artifacts.hub_model import HUB_NAME, PREFIX, parse_address
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter

README = "README.md"
OURS = "zhllama"
"""The tag of the cards that are written here: the base that such a card names is the model's own, further up."""
_TERMS = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)(\.(txt|md))?", re.IGNORECASE)
_FRONT = re.compile(r"\ufeff?---\r?\n(.*?)\r?\n---\s*(?:\n|$)", re.DOTALL)
_LONGEST = 2**18
"""Bytes of a README.md or LICENSE that is read."""
_KNOWN = {
    r"apache license,? version 2\.0": "apache-2.0",
    r"(the )?mit license|(copyright .{0,300})?permission is hereby granted, free of charge": "mit",
    r"(meta )?llama (2|3|3\.[1-3]|4) community license": r"llama\2",
}
"""How a text of a license begins → its identifier on the Hub."""


@dataclass(frozen=True)
class Origin:
    """Where a model comes from; empty where nobody says."""

    base: str = ""
    """`owner/name` on the Hub."""
    license: str = ""
    """The Hub's identifier; `other` with the two below."""
    license_name: str = ""
    license_link: str = ""

    @property
    def fields(self) -> dict[str, str]:
        """As front matter has them."""
        found = {"base_model": self.base, "license": self.license}
        found |= {"license_name": self.license_name, "license_link": self.license_link}
        return {name: value for name, value in found.items() if value}


def terms_in(artifact: Artifact) -> list[str]:
    """The files that say under which terms the model may be used."""
    return [name for name in artifact.names if is_terms(name)]


def is_terms(name: str) -> bool:
    return _TERMS.fullmatch(name) is not None


def origin_of(model: Artifact) -> Origin:
    """What is known of a model that something is made of, from its files and its address."""
    front = _front_matter(_text(model, README)) if README in model else {}
    tags = front.get("tags")
    if isinstance(tags, list) and OURS in tags:
        bases = front.get("base_model")
        base = bases if isinstance(bases, str) and re.fullmatch(HUB_NAME, bases) else ""
    else:
        base = _hub_name(model)
    license, name, link = (_line(front.get(field)) for field in ("license", "license_name", "license_link"))
    if not license and (files := [name for name in terms_in(model) if name[:3].upper() == "LIC"]):
        texts = {file: " ".join(_text(model, file)[:4000].lower().split()) for file in files}
        found = {file: identifier for file, text in texts.items() if (identifier := _identified(text))}
        license = next(iter(found.values()), "other")
        name, link = ("", "") if found else ("see-file", files[0])
    return Origin(base, license, name, link)


def write_card(out: ArtifactWriter, model: Artifact, made: str, facts: Mapping[str, str]) -> None:
    """README.md of what is made of `model`, and the model's files of terms. made: a sentence of how; facts: lines."""
    import yaml

    origin = origin_of(model)
    front = {
        **origin.fields,
        "language": ["zh", "en"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": [OURS, "llama"],
    }
    base = f"Base model: [{origin.base}](https://huggingface.co/{origin.base})"
    lines = [*([base] if origin.base else []), *(f"{name}: {said}" for name, said in facts.items())]
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    body = "".join(f"- {line}\n" for line in lines)
    out.add_bytes(README, f"---\n{text}---\n\n# LLaMA for Chinese\n\n{made}\n\n{body}".encode())
    for name in terms_in(model):
        out.copy(model, name)


def _hub_name(model: Artifact) -> str:
    """The repository that a model was opened or fetched from."""
    addresses = [model.root, model.manifest.configuration.get("source", "")]
    addresses += [given.reference for given in model.manifest.inputs.values()]
    for address in addresses:
        if isinstance(address, str) and address.startswith(PREFIX) and (found := parse_address(address)):
            return found[0]
    return ""


def _identified(text: str) -> str:
    for pattern, identifier in _KNOWN.items():
        if found := re.match(pattern, text):
            return found.expand(identifier)
    return ""


def _front_matter(text: str) -> dict[str, Any]:
    """{} where there is none, or it cannot be read: then nothing is known."""
    import yaml

    if not (found := _FRONT.match(text)):
        return {}
    try:
        # texts, lists and objects alone: no merged keys, which grow without end, and no dates and tags, which fail
        value = yaml.load(found[1], Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    except (yaml.YAMLError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _line(value: Any) -> str:
    """A value of the front matter that is one short line, the first of several; "" for anything else."""
    first = value[0] if isinstance(value, list) and value else value
    said = isinstance(first, str) and len(first) <= 300 and first.isprintable() and first not in ("null", "~")
    return str(first) if said else ""


def _text(artifact: Artifact, name: str) -> str:
    return artifact.read_range(name, 0, min(artifact.file(name).size, _LONGEST)).decode(errors="replace")
