"""Plain text as documents: a line of a .txt file, or the `text` of a line of a .jsonl file.

Files are read in order of their names (recorded in the artifact that is made of them), streamed, UTF-8 checked. Of a
packed dataset the held-out documents are read, so that its reference is a text to evaluate on.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from components.shared.artifact import Artifact
from components.shared.errors import InputError
from components.shared.packed import HELD_OUT_TEXT, KIND


@dataclass(frozen=True)
class Document:
    """One document, and where it stands: file and line, counted from 1."""

    text: str
    file: str
    line: int


def text_files(artifact: Artifact) -> list[str]:
    """The names of the artifact's text files, sorted; InputError when it has none."""
    if artifact.manifest.kind == KIND:
        if HELD_OUT_TEXT not in artifact:
            raise InputError(
                f"{artifact.root}: this packed dataset holds no text back; prepare it from --text with "
                "--validation-fraction or --validation"
            )
        return [HELD_OUT_TEXT]
    names = sorted(name for name in artifact.names if name.endswith((".txt", ".jsonl")))
    if not names:
        raise InputError(f"{artifact.root}: no .txt or .jsonl file in it; give a folder or prefix of text files")
    return names


def read_documents(artifact: Artifact, keep_blank: bool = False) -> Iterator[Document]:
    """Every document; blank lines are left out unless `keep_blank`. InputError for bytes that are not UTF-8."""
    empty = True
    for name in text_files(artifact):
        where = f"{artifact.root}/{name}"
        with artifact.open(name) as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{where}: line {number} is not UTF-8 ({error.reason}); convert the file"
                    ) from error
                if name.endswith(".jsonl") and text.strip():
                    text = _text_field(text, f"{where}: line {number}")
                if keep_blank or text.strip():
                    empty = empty and not text.strip()
                    yield Document(text, name, number)
    if empty:
        raise InputError(f"{artifact.root}: the text files are empty; give files with text in them")


def _text_field(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); mend or remove it") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise InputError(f"{where} has no text field; each line must be an object with one")
    return str(value["text"])
