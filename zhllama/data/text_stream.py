"""An artifact's files of data, and each as a stream of plain bytes: `.gz` and `.zst` are decompressed on the way.

pyarrow decompresses (it reads Parquet anyway) since it notices a file that ends too early, which other readers of zstd
pass over in silence. Memory: some buffers, whatever the size of the file.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from zhllama.artifacts import hub_dataset
from zhllama.artifacts.reader import Artifact
from zhllama.data.packed import KIND
from zhllama.errors import InputError

if TYPE_CHECKING:
    import pyarrow

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Suffix → pyarrow's name of the compression."""
LINES_BYTES = 2**20
"""Of a file, what is read as one block of lines."""
LONGEST = 32 * 2**20
"""Bytes of a line, a document or an item: encoded, it takes thirty times as much."""
ROWS = 1000
"""Rows of a table in memory at a time."""
NO_ITEMS = ("manifest.json", "provenance.json", "blocks.json", "report.json", "card.json")
"""What may lie beside the data in an artifact."""


def plain_name(name: str) -> str:
    """`a.txt.gz` → `a.txt`."""
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return name


def data_files(artifact: Artifact, endings: tuple[str, ...], held_out: str, option: str, missing: str) -> list[str]:
    """The names of the artifact's files with these endings, sorted; of a packed dataset, what it holds back; none for a
    dataset of the Hub. InputError, which says what is `missing`, or how `option` is held back, when it has none."""
    if artifact.manifest.kind == hub_dataset.KIND:
        return []
    if artifact.manifest.kind == KIND:
        if held_out not in artifact:
            mend = f"prepare it from --{option} with --validation-fraction or --validation"
            raise InputError(f"{artifact.root}: this packed dataset holds no {option} back; {mend}")
        return [held_out]
    names = [name for name in sorted(artifact.names) if plain_name(name).endswith(endings) and name not in NO_ITEMS]
    if not names:
        raise InputError(f"{artifact.root}: {missing}")
    return names


def bytes_to_read(artifacts: Sequence[Artifact], files: Callable[[Artifact], list[str]]) -> int | None:
    """How much data they hold; None where that of one is known only when it has been read."""
    total = 0
    for artifact in artifacts:
        names = files(artifact)
        if not names or any(plain_name(name) != name or name.endswith(".parquet") for name in names):
            return None
        total += sum(artifact.file(name).size for name in names)
    return total


@contextmanager
def open_plain(artifact: Artifact, name: str) -> Iterator[io.BufferedReader]:
    """A stream over the file's plain bytes. InputError when it is not compressed as its name says, or truncated."""
    with artifact.open(name) as stream:
        if plain_name(name) == name:
            yield stream
            return
        import pyarrow

        codec = COMPRESSED["." + name.rsplit(".", 1)[1]]
        try:
            yield io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), codec), 2**20)
        except OSError as error:
            raise InputError(f"{artifact.root}/{name}: cannot be decompressed ({error}); compress it again") from error


def line_blocks(artifact: Artifact, name: str) -> Iterator[bytes | InputError]:
    """The file in blocks of whole lines: LINES_BYTES, and what the last line has beyond them. In place of a line that
    is too long, an InputError that names it."""
    number = 1
    with open_plain(artifact, name) as stream:
        while block := stream.read(LINES_BYTES):
            if not block.endswith(b"\n"):
                begun = len(block) - block.rfind(b"\n") - 1
                block += stream.readline(max(1, LONGEST - begun))
                if not block.endswith(b"\n") and stream.peek(1):
                    if begins := block[: block.rfind(b"\n") + 1]:
                        yield begins
                    number += begins.count(b"\n")
                    while (rest := stream.readline(LINES_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    mend = "cut the document into several lines, or --skip-bad"
                    yield InputError(f"{artifact.root}/{name}: line {number} has over {LONGEST:,} bytes; {mend}")
                    number += 1
                    continue
            yield block
            number += block.count(b"\n")


def parquet_batches(artifact: Artifact, name: str, column: str = "") -> Iterator["pyarrow.RecordBatch"]:
    """The rows of a table, up to ROWS at a time, of all columns or one. InputError for a damaged one, or
    without `column`."""
    import pyarrow
    from pyarrow import parquet

    where = f"{artifact.root}/{name}"
    try:
        with artifact.open(name) as stream:
            table = parquet.ParquetFile(pyarrow.PythonFile(stream, mode="r"), buffer_size=2**20)
            if column and column not in table.schema_arrow.names:
                has = ", ".join(table.schema_arrow.names)
                raise InputError(f"{where}: no column {column} (it has {has}); rename the one that holds the {column}")
            groups = map(table.metadata.row_group, range(table.num_row_groups))
            # of long rows fewer at a time: together they may be as long as one
            longest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
            rows = max(1, min(ROWS, LONGEST // max(1, longest)))
            for batch in table.iter_batches(rows, columns=[column] if column else None):
                # of text, that it is UTF-8
                batch.validate(full=True)
                yield batch
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise InputError(f"{where}: not a Parquet file, or a damaged one ({error}); write it again") from error
