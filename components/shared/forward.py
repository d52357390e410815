"""Passes a reference on: the Else of an optional stage.

A consumer of a skipped KFP step is silently dropped, so an optional stage is `If … Else forward` joined by OneOf.
`python -m components.shared.forward --value REF --reference PATH`
"""

from dataclasses import dataclass

from components.shared import storage


@dataclass(frozen=True)
class Forward:
    """Write a reference, unchanged, where the next step looks for it."""

    reference: str
    """Where the value is written, as text."""
    value: str = ""
    """The reference to pass on; empty stays empty."""


def forward(config: Forward) -> None:
    storage.write_bytes(storage.normalise(config.reference), config.value.encode())


if __name__ == "__main__":
    import sys

    from components.shared.cli import guarded, parse

    guarded(lambda: forward(parse(Forward, sys.argv[1:])))
