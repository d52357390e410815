"""A file of an artifact as a stream of plain bytes: `.gz` and `.zst` are decompressed on the way.

pyarrow decompresses (it reads Parquet anyway) since it notices a file that ends too early, which other readers of zstd
pass over in silence. Memory: some buffers, whatever the size of the file.
"""

import io
from collections.abc import Iterator

from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Suffix → pyarrow's name of the compression."""
LINES_BYTES = 2**20
"""Of a file, what is read as one block of lines."""


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
    for block in line_blocks(artifact, name):
        yield from io.BytesIO(block)


def line_blocks(artifact: Artifact, name: str) -> Iterator[bytes]:
    """The file in blocks of whole lines: LINES_BYTES, and what the last line has beyond them. See lines_of."""
    with open_plain(artifact, name) as stream:
        while True:
            try:
                block = stream.read(LINES_BYTES)
                if block and not block.endswith(b"\n"):
                    block += stream.readline()
            except OSError as error:
                if plain_name(name) == name:
                    raise
                raise InputError(
                    f"{artifact.root}/{name}: cannot be decompressed ({error}); compress it again"
                ) from error
            if not block:
                return
            yield block
