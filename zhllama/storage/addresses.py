"""Addresses: `s3://bucket/prefix`, a path, or `file:///path`; and names below them, which are never trusted."""

import os
import re

from zhllama.errors import InputError


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def normalise(uri: str) -> str:
    """`s3://bucket/a/b` without a trailing slash, or an absolute path. InputError for other schemes."""
    if is_s3(uri):
        bucket = uri[5:].split("/", 1)[0]
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
            raise InputError(f"{uri}: not a bucket name; write s3://bucket/prefix")
        return uri.rstrip("/")
    if uri.startswith("file://"):
        uri = uri[len("file://") :]
    elif "://" in uri:
        raise InputError(f"{uri}: unknown kind of address; use s3://bucket/prefix or a path")
    if not uri:
        raise InputError("an empty address was given; use s3://bucket/prefix or a path")
    return os.path.abspath(os.path.expanduser(uri))


def join(uri: str, name: str) -> str:
    """`uri/name`; a name that would leave the prefix is refused (manifests and listings are not trusted)."""
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"{uri}: the file name {name!r} leads out of its folder; the manifest or listing is corrupt")
    return f"{uri.rstrip('/')}/{name}"


def split_s3(uri: str) -> tuple[str, str]:
    """(bucket, key); the key is empty for a bucket alone."""
    bucket, _, key = uri[5:].partition("/")
    return bucket, key


def below(uri: str) -> str:
    """What the keys of everything below a prefix begin with."""
    _, key = split_s3(uri)
    return f"{key}/" if key else ""


def too_large(uri: str, size: int, most: int) -> InputError:
    """What is said of a file that is read at once, and has more bytes than anything that belongs there."""
    return InputError(f"{uri}: it has {size:,} bytes, and {most:,} are read at most; give another address")
