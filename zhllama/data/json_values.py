"""JSON as a stream of values: the members of a list, or one a line, whatever the file's name says; memory is one's.

As strict as json_file's reader, and alike for both forms: what one refuses, the other does. The standard library finds
each value's end (ijson joins half of a surrogate pair with what follows it).
"""

import codecs
import io
import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from zhllama.artifacts.json_file import STRICT, said_of, stand_in, value_of, whole
from zhllama.artifacts.reader import Artifact
from zhllama.data.text_stream import LONGEST, line_blocks, open_plain, plain_name
from zhllama.errors import InputError

_PIECE = 2**18
_NEAR = 16
"""Characters before the end of what was read, in which a fault may be that the rest is missing."""
_LENIENT = json.JSONDecoder(parse_int=float)
"""Finds the end of what STRICT refuses: a key that is there twice, a number of a million digits."""


def values_in(
    artifact: Artifact, name: str, needed: str, known: Callable[[dict[str, Any]], bool], lists: bool = False
) -> Iterator[tuple[str, Any]]:
    """(its place, value) of the members of a list or of lines (one line alone: an object that is `known`); with `lists`
    also of the members of an object's lists ({"data": […]}, or splits by name). InputError with what is `needed` for
    anything else; for a member or a line that cannot be read, one in its place."""
    where = f"{artifact.root}/{name}"
    with open_plain(artifact, name) as stream:
        head = stream.peek(1)
        begin = head.lstrip(codecs.BOM_UTF8 + b" \t\r\n")[:1]
        if begin == b"[":
            yield from _Text(stream, where, needed).all_members()
            return
        if not plain_name(name).endswith(".jsonl"):
            if begin != b"{":
                found = stand_in(head)
                raise InputError(f"{where}: not JSON; {found}{'; ' * bool(found)}{needed}")
            first = [value for _, value in islice(json_lines(artifact, name), 2)]
            alike = [isinstance(value, dict) for value in first]
            # behind a line that is no object lines may stand, or the rest of one whose lists are looked for
            alone = not alike[1:]
            of_lines = not alone or known(first[0]) if alike[0] else not lists and (alone or alike[1])
            if not of_lines:
                if not lists:
                    raise InputError(f"{where}: a dict where {needed}")
                yield from _Text(stream, where, needed).members_of_lists()
                return
    yield from json_lines(artifact, name)


def json_lines(artifact: Artifact, name: str) -> Iterator[tuple[str, Any]]:
    """(its place, value) of a file's lines; for a line that is no JSON, an InputError in its place."""
    number = 0
    for block in line_blocks(artifact, name):
        for line in [block] if isinstance(block, InputError) else io.BytesIO(block):
            number += 1
            place = f"{artifact.root}/{name}: line {number}"
            if isinstance(line, InputError):
                yield place, line
            elif line.strip():
                try:
                    yield place, value_of(line.decode("utf-8-sig" if number == 1 else "utf-8"), STRICT)
                except ValueError as error:
                    yield place, InputError(f"{place} {said_of(error)}; mend or remove it")


class _Text:
    """JSON text that comes in pieces, from which one value after another is taken."""

    def __init__(self, stream: io.BufferedReader, where: str, needed: str) -> None:
        self._stream, self._where, self._needed = stream, where, needed
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at, self._before = "", 0, 0

    def peek(self) -> str:
        """The next sign that is no white space; empty at the end."""
        while True:
            while (sign := self._text[self._at : self._at + 1]) and sign in " \t\r\n":
                self._at += 1
            if sign or not self._more():
                return sign

    def all_members(self) -> Iterator[tuple[str, Any]]:
        """Of the list that is all that there is."""
        yield from self._members()
        self._end()

    def members_of_lists(self) -> Iterator[tuple[str, Any]]:
        """Of every list, one at least, in the object that is all that there is."""
        found = False
        for number in self._within("{", "}"):
            name = self._value(number)
            self._take(":" if isinstance(name, str | InputError) else "a name")
            if self.peek() == "[":
                found = True
                yield from self._members()
            else:
                self._value(number)
        self._end()
        if not found:
            raise InputError(f"{self._where}: a dict where {self._needed}")

    def _members(self) -> Iterator[tuple[str, Any]]:
        for number in self._within("[", "]"):
            yield f"{self._where}: item {number}", self._value(number)

    def _end(self) -> None:
        """InputError when there is more."""
        if self.peek():
            raise self._fault("more stands behind its end")

    def _within(self, begin: str, end: str) -> Iterator[int]:
        """1, 2, … where a member begins."""
        self._take(begin)
        number = 1
        while number > 1 or self.peek() != end:
            yield number
            number += 1
            if self.peek() == end:
                break
            self._take(",")
        self._take(end)

    def _take(self, sign: str) -> None:
        if self.peek() != sign:
            raise self._fault(f"{sign} is missing")
        self._at += 1

    def _value(self, number: int) -> Any:
        """The value that begins here; an InputError in its place when it cannot be used."""
        self.peek()
        parse, refused = STRICT.raw_decode, None
        while True:
            try:
                value, end = parse(self._text, self._at)
            except RecursionError as error:
                raise self._fault("it is nested too deeply") from error
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _NEAR
                if not cut or not self._more():
                    raise self._fault(error.msg, error.pos) from error
                continue
            except ValueError as error:
                parse, refused = _LENIENT.raw_decode, error
                continue
            # a number may go on
            if end < len(self._text) - _NEAR or not self._more():
                break
        text, self._at = self._text[self._at : end], end
        try:
            if refused is not None:
                raise refused
            return whole(value, text)
        except ValueError as error:
            return InputError(f"{self._where}: item {number} {said_of(error)}; mend or remove it")

    def _more(self) -> bool:
        """Reads on, as much again as there is; False at the end."""
        rest = self._text[self._at :]
        if len(rest) > LONGEST:
            raise self._fault(f"an item of more than {LONGEST:,} characters")
        read = ""
        while not read:
            content = self._stream.read(max(_PIECE, len(rest)))
            try:
                read = self._decode(content, not content)
            except UnicodeDecodeError as error:
                raise self._fault(f"not UTF-8: {error.reason}", len(self._text)) from error
            if not content:
                return False
        self._before += self._at
        self._text, self._at = rest + read, 0
        return True

    def _fault(self, what: str, at: int | None = None) -> InputError:
        place = self._before + (self._at if at is None else at) + 1
        return InputError(f"{self._where}: not JSON ({what}, at character {place:,}); {self._needed}")
