"""A published model says what it comes from and under which license, where that is known, and nothing else."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from zhllama.artifacts.manifest import File, Input, Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.weights.model_card import Origin, origin_of, write_card

Folder = Callable[..., Artifact]
LLAMA2 = "LLAMA 2 COMMUNITY LICENSE AGREEMENT\nLlama 2 Version Release Date: July 18, 2023"

LAUGHS = "a: &a {k: v}\n" + "".join(
    f"{next_}: &{next_} {{<<: [{', '.join([f'*{one}'] * 9)}]}}\n" for one, next_ in pairwise("abcdefghij")
)
"""Merged keys: nine to the power of nine, where they are merged."""


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = iter(range(9))

    def make(**files: str) -> Artifact:
        place = tmp_path / f"folder-{next(made)}"
        place.mkdir()
        for name, content in {"config_json": "{}", **files}.items():
            (place / name.replace("_", ".")).write_text(content, "utf-8")
        return open_artifact(str(place))

    return make


def front_of(artifact: Artifact) -> dict[str, object]:
    text = artifact.read("README.md").decode()
    return dict(yaml.safe_load(text.split("---\n")[1]))


@pytest.mark.parametrize(
    ("files", "origin"),
    [
        ({}, Origin()),
        ({"README_md": "# No front matter\n---\nlicense: mit\n---\n"}, Origin()),
        ({"README_md": "---\nlicense: apache-2.0\n---\n# X\n"}, Origin(license="apache-2.0")),
        ({"README_md": "\ufeff---\r\nlicense: mit\r\n---\r\n"}, Origin(license="mit")),
        ({"README_md": "---\nlicense: [mit]\n---"}, Origin(license="mit")),
        (
            {"README_md": "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n", "LICENSE": "Mine."},
            Origin(license="other", license_name="mine", license_link="LICENSE"),
        ),
        ({"LICENSE": "   Apache License\n  Version 2.0, January 2004\n"}, Origin(license="apache-2.0")),
        ({"LICENSE_txt": LLAMA2}, Origin(license="llama2")),
        ({"LICENSE": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"}, Origin(license="llama3.1")),
        ({"LICENSE": "MIT License\n"}, Origin(license="mit")),
        ({"LICENSE": "All mine."}, Origin(license="other", license_name="see-file", license_link="LICENSE")),
        ({"LICENSE": "You shall not permit licensees to use it."}, Origin("", "other", "see-file", "LICENSE")),
        ({"LICENSE": "Copyright (c) 2020 X\n\nPermission is hereby granted, free of charge"}, Origin(license="mit")),
        ({"LICENSE": "META LLAMA 3 COMMUNITY LICENSE AGREEMENT"}, Origin(license="llama3")),
        ({"NOTICE": "Apache License Version 2.0 for a part of it"}, Origin()),
        ({"README_md": "---\nlicense: null\n---\n"}, Origin()),
        ({"README_md": "---\nlicense: mit\nx: !!timestamp x\n---\n"}, Origin(license="mit")),
        ({"README_md": f"---\n{LAUGHS}license: mit\n---\n"}, Origin(license="mit")),
        ({"README_md": "---\n" + "[" * 100_000 + "\n---\n"}, Origin()),
        ({"README_md": "---\nlicense: [\n---\n"}, Origin()),
        ({"README_md": "---\n- a\n---\n"}, Origin()),
        ({"README_md": "---\nlicense: {a: b}\n---\n"}, Origin()),
        ({"README_md": "---\nbase_model: another/parent\n---\n"}, Origin()),
        ({"README_md": "---\nbase_model: owner/name\ntags: [zhllama]\n---\n"}, Origin(base="owner/name")),
        ({"README_md": "---\nbase_model: /home/me\ntags: [zhllama]\n---\n"}, Origin()),
    ],
    ids=[
        "nothing", "no front matter", "identifier", "BOM and CRLF", "list", "other", "apache", "llama2", "llama3.1",
        "mit", "another text", "no license of that kind", "mit by its words", "llama3", "notice", "null", "odd tag",
        "billion laughs", "deep", "no YAML", "YAML list", "object", "its parent", "our card", "our card with a path",
    ],
)  # fmt: skip
def test_what_is_known_of_a_folder(folder, files, origin):
    assert origin_of(folder(**files)) == origin


def test_a_base_is_known_by_its_address_on_the_hub():
    def at(root: str, **more: object) -> Artifact:
        return Artifact(Manifest("files", "", root, (File("x", 1, ""),), **more), False)  # type: ignore[arg-type]

    assert origin_of(at(f"hf://owner/name@{'0' * 40}")).base == "owner/name"
    assert origin_of(at("/store/fetch_weights/key", configuration={"source": "hf://owner/name"})).base == "owner/name"
    assert origin_of(at("/store/fetch_weights/key", configuration={"source": "/data/name"})).base == ""


def test_a_base_that_was_fetched_from_the_hub_is_known_by_what_lies_beside_the_manifest(tmp_path):
    out = ArtifactWriter(str(tmp_path / "store"), "fetch_weights", "key")
    out.inputs = {"source": Input("hf://owner/name", "0" * 64)}
    out.add_bytes("config.json", b"{}")
    model = out.publish("hf-model")
    assert "owner/name" not in Path(model.reference).read_text(encoding="utf-8")
    assert origin_of(open_artifact(model.reference)).base == "owner/name"


def test_a_card_carries_origin_and_terms_and_names_no_place(folder, tmp_path):
    model = folder(README_md="---\nlicense: llama2\ntags: [zhllama]\nbase_model: owner/name\n---\n", LICENSE_txt=LLAMA2)
    out = ArtifactWriter(str(tmp_path / "store"), "merge_adapters", "key")
    write_card(out, model, "Made so.", {"Chat template": "the model's own"})
    made = open_artifact(out.publish("hf-model").reference)
    assert front_of(made) == {
        "base_model": "owner/name",
        "license": "llama2",
        "language": ["zh", "en"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["zhllama", "llama"],
    }
    assert made.read("LICENSE.txt") == LLAMA2.encode()
    assert str(tmp_path) not in made.read("README.md").decode()
    assert origin_of(made) == Origin("owner/name", "llama2")


def test_a_card_says_nothing_of_what_is_not_known(folder, tmp_path):
    out = ArtifactWriter(str(tmp_path / "store"), "merge_adapters", "key")
    write_card(out, folder(), "Made so.", {})
    assert not {"base_model", "license"} & front_of(open_artifact(out.publish("hf-model").reference)).keys()
