"""The card adds up, and its page is one file that shows it, loads nothing and runs nothing."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from components.generate_instructions.card import EDGES, imported, lengths
from components.generate_instructions.catalogue import load_catalogue
from components.generate_instructions.dedup import Seen
from components.generate_instructions.harvest import Harvest
from components.generate_instructions.options import GenerateInstructions
from tests.components.generate_instructions.model_server import ModelServer
from tests.components.generate_instructions.test_generator import card_of, items_of, run, said
from zhllama.artifacts.open import open_artifact


class Page(HTMLParser):
    """The tags that are open at the end, and every attribute that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "br", "hr", "link", "img"):
            self.open.append(tag)
        self.loads += [f"{name}={value}" for name, value in attributes if name in ("src", "href", "onload", "onclick")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_card_says_how_the_data_came_about(model: ModelServer, tmp_path: Path) -> None:
    manifest = run(model, tmp_path, items=30, price_prompt=1, price_answer=2)
    card = card_of(manifest)
    assert card["model"] == {"name": "writer", "base_url": model.url, "says_it_is": ["real-name"]}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*\+00:00", card["date"])
    assert card["settings"]["seed"] == 42
    assert card["items"] == len(items_of(manifest)) == 30
    for field in ("instruction", "output"):
        assert sum(card["lengths"][field]["histogram"].values()) == 30
    assert card["lengths"]["input"]["texts"] == card["with_input"] == 0
    assert sum(card["task_types"].values()) == 30
    assert card["understood"]["structure"] == "schema"
    assert manifest.metrics["cost"] == card["cost"]["billed_cost"] > 0


def test_the_page_is_whole_and_loads_and_runs_nothing(model: ModelServer, tmp_path: Path) -> None:
    model.script = [said("写一首诗<script>alert(1)</script>", "解释 a & b 的意思", "列出五个省的名字")]
    manifest = run(model, tmp_path, items=3)
    text = open_artifact(manifest.reference).read("report.html").decode()
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert not page.tags & {"script", "img", "link", "iframe"}
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert "写一首诗<script>alert(1)</script>" in page.text
    assert "of 3 wanted" in page.text


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 100])
def test_examples_are_spread_over_the_data(count: int) -> None:
    config = GenerateInstructions(store="s", import_from="d")
    items = [{"instruction": f"{number:03}", "input": "", "output": "好"} for number in range(count)]
    found = [
        item["instruction"] for item in imported(config, Harvest(load_catalogue(), Seen(), items=items), {})["examples"]
    ]
    assert len(found) == min(count, 6)
    assert found == sorted(set(found))


def test_lengths_are_of_what_is_there() -> None:
    found = lengths(["", "好", "好好", "好" * 150, "好" * 9000])
    assert (found["texts"], found["longest"], found["median"]) == (4, 9000, 150)
    assert found["histogram"]["150"] == found["histogram"]["5000"] == found["histogram"]["1"] == 1
    assert len(found["histogram"]) == len(EDGES)
    assert lengths([])["mean"] == 0
