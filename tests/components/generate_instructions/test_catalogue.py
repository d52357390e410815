"""The project's catalogue is as broad as the recipe's; a user's own is checked and named where it is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from components.generate_instructions import catalogue as module
from components.generate_instructions.catalogue import Requests, load_catalogue
from zhllama.errors import InputError

OWN = yaml.safe_load((Path(module.__file__).parent / "catalogue.yaml").read_text())


def test_the_catalogue_is_as_broad_as_the_recipes() -> None:
    catalogue = load_catalogue()
    assert len(set(catalogue.topics)) >= 82
    assert len(set(catalogue.task_types)) >= 14
    assert catalogue.language["name"] == "中文"


def test_a_request_is_made_of_its_number_and_the_seed_alone() -> None:
    catalogue = load_catalogue()
    seeds = [{"instruction": f"例{number}", "input": "", "output": "答"} for number in range(5)]
    requests = Requests(catalogue, 7, seeds, 1)
    again, other = Requests(catalogue, 7, seeds, 1), Requests(catalogue, 7, seeds, 2)
    assert requests[5] == again[5]
    assert requests[5] != requests[6]
    assert requests[5] != other[5]


def test_a_request_names_count_topics_types_and_examples() -> None:
    catalogue = load_catalogue()
    seeds = [{"instruction": "例子中的指令", "input": "", "output": "答"}]
    request = Requests(catalogue, 7, seeds, 1)[0]
    (message,) = request.messages
    assert "请编写 7 条" in message["content"]
    assert len(request.topics) == len(request.task_types) == 10
    for number, name in enumerate(request.topics, start=1):
        assert f"{number}. {name}\n" in message["content"]
    assert "例子中的指令" in message["content"]
    assert "$" not in message["content"]
    assert request.most_prompt_tokens > len(message["content"].encode())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"topics": []}, "topics must be a list of texts"),
        ({"topics": ["a", "a"]}, "topics must be a list without repetitions"),
        ({"task_types": ["a", 3]}, "task_types must be a list of texts"),
        ({"language": {"name": "x", "script": "runes", "share": 0.1}}, "language.script must be one of han"),
        ({"language": {"name": "x", "script": "han", "share": 2}}, "language.share must be a number between 0 and 1"),
        ({"asked": {"topics": 10}}, "asked must be a mapping of topics, task_types"),
        ({"asked": {**OWN["asked"], "topics": 0}}, "asked.topics must be a whole number above 0"),
        ({"accepted": {**OWN["accepted"], "output": [5, 1]}}, r"accepted.output must be \[shortest, longest\]"),
        ({"request": "请写 $count 条，$topic"}, "request must be a text with"),
        ({"request": "请写 $count 条"}, "request must be a text that names"),
        ({"refusals": ["("]}, "refusals: '\\(' is no regular expression"),
        ({"topcis": ["a"]}, "topcis is not known"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_catalogue_that_is_wrong_is_refused_by_name(change: dict[str, Any], line: str) -> None:
    content = yaml.safe_dump(OWN | change, allow_unicode=True).encode()
    with pytest.raises(InputError, match=f"mine.yaml: {line}"):
        load_catalogue(content, "mine.yaml")


@pytest.mark.parametrize("content", [b"- a\n", b"a: [", b"\xff\xfe\x00"])
def test_what_is_no_catalogue_is_refused(content: bytes) -> None:
    with pytest.raises(InputError, match=r"mine.yaml: "):
        load_catalogue(content, "mine.yaml")
