"""The settings as people read them are the ones that there are."""

import pytest

from pipelines import parameters as told
from pipelines.settings import SETTINGS
from zhllama.errors import InputError


def test_every_setting_is_explained():
    assert [name for name, one in SETTINGS.items() if not one.note[:1].strip() or not one.note.endswith(".")] == []


def test_groups_stand_together():
    groups = [one.group for one in SETTINGS.values()]
    assert groups == sorted(groups, key=list(dict.fromkeys(groups)).index)


def test_the_page_holds_them_as_they_are():
    """`zhllama render all` writes it again."""
    page = told.PAGE.read_text()
    assert told.page(page) == page
    assert "| `lora_steps` | run | whole number | tiny: `120`; smollm2-135m: `150`; the others: `6000` |" in page
    assert "| `store` | run | text | (required) |" in page
    assert "| `prompts` | run | text | (empty) |" in page
    assert "| `lora_memory` | compile | text | tiny: `4Gi`; 7b: `256Gi`; " in page


def test_a_page_without_the_place_is_refused():
    with pytest.raises(InputError, match=r"pipeline\.md: the place of the parameters is gone"):
        told.page("# A page")
