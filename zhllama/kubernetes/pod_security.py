"""What the *restricted* Pod Security Standard asks of our pods: who they run as, and what they may."""

from typing import Any

from zhllama.errors import InputError

USER = 65532
"""The uid of the images (images/base/Dockerfile)."""


def uid(text: str, option: str = "--run-as-user") -> int | None:
    """`65532`, or `none` for what the cluster gives. InputError for root and for what is no uid."""
    if text == "none":
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise InputError(f"{option} {text}: write a number above 0 (root is refused), or none")
    return int(text)


def confined() -> dict[str, Any]:
    """The securityContext of a container, as the *restricted* Pod Security Standard asks and with its files fixed."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
