"""Whoever changes what a stage computes thinks about its cache version; whoever changes a comment need not."""

import ast

import pytest

from tests.cache_versions import STAGES, computed, computing_modules, definitions, recorded


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_computes_is_what_its_cache_version_stands_for(stage):
    now, before = computed(stage), recorded()["stages"][stage]
    mine, theirs = now["definitions"], before["definitions"]
    changed = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    assert now["cache_version"] == before["cache_version"] and not changed, (  # noqa: PT018 - one reason to fail
        f"the code that {stage} runs has changed ({', '.join(changed[:8]) or 'its cache version'}): raise its "
        "cache_version where the same input now gives another result, and record it, or record that the result is the "
        'same: python -m tests.cache_versions --because "..."'
    )


def test_comments_docstrings_and_places_are_no_code():
    one = '''"""What it is."""
import math
RATE = 2  # two
def area(r):
    """Of a circle."""
    return math.pi * r ** RATE
'''
    other = """
from os import path


RATE = (2)


def area(r):
    # Archimedes
    return (math.pi
            * r ** RATE)
"""
    assert list(definitions(ast.parse(one))) == list(definitions(ast.parse(other)))
    assert list(definitions(ast.parse(one))) != list(definitions(ast.parse(one.replace("r **", "2 * r **"))))


def test_the_code_of_a_stage_is_its_own_and_what_it_imports_but_no_plumbing():
    modules = computing_modules("merge_adapters")
    assert "components.merge_adapters.stream" in modules
    assert any(name.startswith("zhllama.weights.") for name in modules)
    assert not [name for name in modules if name.startswith(("zhllama.storage", "zhllama.stage"))]
    assert not [name for name in modules if name.startswith("components.") and "merge_adapters" not in name]
