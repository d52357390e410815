"""Soak tests: each module here is one, with `run(seeds, scratch) -> dict[str, int]` (what happened, counted).

A run is made of its seed alone, so that a failure can be run again: `make soak ONLY=storage SEEDS=17:18`. The same
function is called by the test suite with a few seeds.
"""
