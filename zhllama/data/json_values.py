"""JSON as a stream of values: the members of a list, or one a line, whatever the file's name says; memory is one's.

As strict as json_file's reader, and of the same kind for both forms: what one refuses, the other does. (ijson's parser
joins half of a surrogate pair with what follows it.)
"""

import codecs
import io
import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from zhllama.artifacts.json_file import said_of, stand_in, value_of, whole
from zhllama.artifacts.reader import Artifact
from zhllama.data.text_stream import LONGEST, line_blocks, open_plain, plain_name
from zhllama.errors import InputError

_PIECE = 2**18
_NEAR = 16
"""Characters before the end of what was read, in which a fault may be that the rest is missing."""


def values_in(
    artifact: Artifact, name: str, needed: str, known: Callable[[dict[str, Any]], bool], lists: bool = False
) -> Iterator[Any]:
    """The members of a list or the values of lines (one line alone: an object that is `known`); with `lists` also the
    members of an object's lists ({"data": […]}, or splits by name). InputError with what is `needed` for anything else;
    for a member or a line that cannot be read, one in its place."""
    where = f"{artifact.root}/{name}"
    with open_plain(artifact, name) as stream:
        of_lines = plain_name(name).endswith(".jsonl") and stream.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"["
        text = _Text(stream, where, needed)
        begin = "" if of_lines else text.peek()
        if begin == "[":
            yield from text.members()
            text.end()
            return
        if begin == "{":
            first = list(islice(json_lines(artifact, name), 2))
            alike = [isinstance(one, dict) for one in first]
            of_lines = alike == [True, True] or (alike[0] and known(first[0]))
            if lists and not of_lines:
                yield from text.members_of_lists()
                return
        if not of_lines:
            what = "a dict where" if begin == "{" else f"not JSON; {text.said()}".rstrip()
            raise InputError(f"{where}: {what} {needed}")
    yield from json_lines(artifact, name)


def json_lines(artifact: Artifact, name: str) -> Iterator[Any]:
    """The values of a file's lines; for a line that is no JSON, an InputError in its place."""
    number = 0
    for block in line_blocks(artifact, name):
        if isinstance(block, InputError):
            number += 1
            yield block
            continue
        for line in io.BytesIO(block):
            number += 1
            if line.strip():
                try:
                    yield value_of(line)
                except ValueError as error:
                    yield InputError(f"{artifact.root}/{name}: line {number} {said_of(error)}; mend or remove it")


class _Text:
    """JSON text that comes in pieces, from which one value after another is taken."""

    def __init__(self, stream: io.BufferedReader, where: str, needed: str) -> None:
        self._stream, self._where, self._needed = stream, where, needed
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._before, self._ended = "", 0, 0, False

    def said(self) -> str:
        """What lies in the place of JSON."""
        return f"{found}; " if (found := stand_in(self._text)) else ""

    def peek(self) -> str:
        """The next sign that is no white space; empty at the end."""
        while True:
            while (sign := self._text[self._at : self._at + 1]) and sign in " \t\r\n":
                self._at += 1
            if sign or not self._more():
                return sign

    def end(self) -> None:
        """InputError when there is more."""
        if self.peek():
            raise self._fault("more stands behind its end")

    def members(self) -> Iterator[Any]:
        """Of the list that begins here."""
        for number in self._within("[", "]"):
            yield self._value(number)

    def members_of_lists(self) -> Iterator[Any]:
        """Of every list in the object that begins here."""
        for number in self._within("{", "}"):
            name = self._value(number)
            self._take(":" if isinstance(name, str | InputError) else "a name")
            if self.peek() == "[":
                yield from self.members()
            else:
                self._value(number)

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
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except RecursionError as error:
                raise self._fault("it is nested too deeply") from error
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _NEAR
                if not cut or not self._more():
                    raise self._fault(error.msg, error.pos) from error
                continue
            # a number may go on
            if end < len(self._text) or not self._more():
                break
        text, self._at = self._text[self._at : end], end
        try:
            return whole(value, text)
        except ValueError as error:
            return InputError(f"{self._where}: item {number} {said_of(error)}; mend or remove it")

    def _more(self) -> bool:
        """Reads on, as much again as there is; False at the end."""
        if self._ended:
            return False
        rest = self._text[self._at :]
        if len(rest) > LONGEST:
            raise self._fault(f"an item of more than {LONGEST:,} characters")
        try:
            while not (read := self._decode(content := self._stream.read(max(_PIECE, len(rest))), not content)):
                if not content:
                    self._ended = True
                    break
        except UnicodeDecodeError as error:
            raise self._fault(f"not UTF-8: {error.reason}", len(self._text)) from error
        self._before += self._at
        self._text, self._at = rest + read, 0
        return not self._ended

    def _fault(self, what: str, at: int | None = None) -> InputError:
        place = self._before + (self._at if at is None else at) + 1
        return InputError(f"{self._where}: not JSON ({what}, at character {place:,}); {self.said()}{self._needed}")
