"""What the files should hash to: a sha256sums file, and the table of published weights (sha256.json, data)."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.fetch_weights.sources import HttpSource, read
from components.shared import storage
from components.shared.errors import InputError

SUMS = "sha256sums.txt"
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(\S.*)")


def table() -> Mapping[str, Any]:
    """`meta`: size → file → SHA-256; `adapters`: repository → file → SHA-256."""
    found: Mapping[str, Any] = json.loads(Path(__file__).with_name("sha256.json").read_text())
    return found


def parse_sums(content: bytes, where: str) -> dict[str, str]:
    """`<hex>  <name>` lines, as sha256sum writes them: name → hex. InputError names a line that is not one."""
    found: dict[str, str] = {}
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not a text file; give lines as sha256sum writes them") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.rstrip())
        if match is None:
            raise InputError(f"{where}: line {number} is no `<64 hex digits>  <name>`; write it with sha256sum")
        found[match[2]] = match[1].lower()
    if not found:
        raise InputError(f"{where}: no line in it; write it with sha256sum")
    return found


def read_expected(reference: str) -> bytes:
    """The text behind `--expect`: a path or address of the file, or of a folder with a sha256sums.txt in it."""
    if reference.startswith(("http://", "https://")):
        base, _, name = reference.rstrip("/").rpartition("/")
        source = HttpSource(base)
        if source.stat(name) is None:
            raise InputError(f"--expect {reference}: nothing is there; give the address of a sha256sums file")
        return read(source, name)
    uri = storage.normalise(reference)
    for place in (uri, storage.join(uri, SUMS)):
        try:
            return storage.read_bytes(place)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            continue
    raise InputError(f"--expect {reference}: nothing is there; give a sha256sums file, or a folder with {SUMS}")


def of_folder(sums: Mapping[str, str], folders: tuple[str, ...]) -> dict[str, str]:
    """The lines that speak of one folder's files, by their plain names.

    Lines without a folder, and those below one of `folders` (`13B/params.json`); of the other folders, none.
    """
    found = {name: digest for name, digest in sums.items() if "/" not in name}
    for name, digest in sums.items():
        folder, _, plain = name.rpartition("/")
        if folder.split("/")[-1] in folders:
            found[plain] = digest
    return found
