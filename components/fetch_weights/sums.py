"""What the files should hash to: sha256sums files, Meta's MD5 checklists, and the table of published weights."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from components.fetch_weights.sources import HttpSource, read
from zhllama import storage
from zhllama.errors import InputError

SUMS = "sha256sums.txt"
CHECKLISTS = ("checklist.chk", "tokenizer_checklist.chk")
"""MD5 lines that Meta put beside its files."""
_DIGITS = {"sha256": 64, "md5": 32}


def table() -> Mapping[str, Any]:
    """`meta`: size → file → SHA-256; `adapters`: repository → file → SHA-256."""
    return cast(Mapping[str, Any], json.loads(Path(__file__).with_name("sha256.json").read_text()))


def parse_sums(content: bytes, where: str, kind: str = "sha256") -> dict[str, str]:
    """`<hex>  <name>` lines, as sha256sum or md5sum write them: name → hex. InputError names a line that is not one."""
    found: dict[str, str] = {}
    digits, program = _DIGITS[kind], f"{kind}sum"
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not a text file; give lines as {program} writes them") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(rf"([0-9a-fA-F]{{{digits}}}) [ *](?:\./)?(\S.*)", line.rstrip())
        if match is None:
            raise InputError(f"{where}: line {number} is no `<{digits} hex digits>  <name>`; write it with {program}")
        found[match[2]] = match[1].lower()
    if not found:
        raise InputError(f"{where}: no line in it; write it with {program}")
    return found


def read_expected(reference: str) -> bytes:
    """The text behind `--expect`: a path or address of the file, or of a folder with a sha256sums.txt in it."""
    if reference.startswith(("http://", "https://")):
        plain, _, query = reference.partition("?")
        base, _, name = plain.rstrip("/").rpartition("/")
        source = HttpSource(base, query, "--expect")
        if query or source.stat(unquote(name)):
            return read(source, unquote(name))
    else:
        uri = storage.normalise(reference)
        for place in (uri, storage.join(uri, SUMS)):
            with suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
                return storage.read_bytes(place)
    raise InputError(f"{shown(reference)}: nothing is there; give a sha256sums file, or a folder with {SUMS}")


def shown(reference: str) -> str:
    """`--expect` as messages say it: without the query of a web address, which may be a signature."""
    return f"--expect {reference.partition('?')[0] if reference.startswith('http') else reference}"


def of_folder(sums: Mapping[str, str], folders: tuple[str, ...]) -> dict[str, str]:
    """The lines without a folder and those below one of `folders` (`13B/params.json`), by the files' plain names."""
    found = {name: digest for name, digest in sums.items() if "/" not in name}
    for name, digest in sums.items():
        folder, _, plain = name.rpartition("/")
        if folder.split("/")[-1] in folders:
            found[plain] = digest
    return found
