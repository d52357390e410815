"""A file of an artifact as a stream of plain bytes: `.gz` and `.zst` are decompressed on the way.

pyarrow decompresses (it reads Parquet anyway) since it notices a file that ends too early, which other readers of zstd
pass over in silence. Memory: some buffers, whatever the size of the file.
"""

import io
from collections.abc import Iterator

from components.shared.artifact import Artifact
from components.shared.errors import InputError

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Suffix → pyarrow's name of the compression."""


def plain_name(name: str) -> str:
    """`a.txt.gz` → `a.txt`."""
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return name


def open_plain(artifact: Artifact, name: str) -> io.BufferedReader:
    """A stream over the file's plain bytes. What is compressed badly raises OSError while it is read."""
    stream = artifact.open(name)
    if plain_name(name) == name:
        return stream
    import pyarrow

    codec = COMPRESSED["." + name.rsplit(".", 1)[1]]
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), codec), 2**20)


def lines_of(artifact: Artifact, name: str) -> Iterator[bytes]:
    """The file's lines with their ends. InputError when it is not compressed as its name says, or truncated."""
    with open_plain(artifact, name) as stream:
        if plain_name(name) == name:
            yield from stream
            return
        try:
            yield from stream
        except OSError as error:
            raise InputError(f"{artifact.root}/{name}: cannot be decompressed ({error}); compress it again") from error
