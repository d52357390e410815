"""HTTP that can be read in one way alone: where one request ends and the next begins, a proxy and this server agree.

h11 is lenient where the standard lets it be: a length beside chunks (with which a request hides in another's body), a
length twice or as a list, lines that end with a line feed alone or go on in the next one, another host in the target,
trailers. No client needs any of it, so each is refused: the head's bytes are held against this before h11 reads them.
"""

import re

import h11

MOST_PIECES = 10_000
"""Of a body: each takes as long as some kilobytes, and a chunk may have one byte (4 MiB so: 10 s for everybody)."""
_END = re.compile(rb"\n\r?\n")
_FIRST_LINE = re.compile(rb"[!-~]+ /[!-~]* HTTP/1\.[01]")
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.%]+\]|[\w.~-]*)(?::\d*)?")
_SPACE = b" \t"


class StrictConnection(h11.Connection):
    """Its next_event raises RemoteProtocolError for more than h11's; `why` says what was wrong."""

    why = ""
    _pieces = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            if self.their_state is h11.IDLE:
                content, _ = self.trailing_data
                if (end := _END.search(content)) and (wrong := _wrong(content[: end.end()])):
                    raise h11.RemoteProtocolError(wrong)
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._pieces = 0
            self._pieces += isinstance(event, h11.Data)
            if self._pieces > MOST_PIECES:
                raise h11.RemoteProtocolError(f"the body comes in more than {MOST_PIECES:,} pieces")
            if isinstance(event, h11.EndOfMessage) and event.headers:
                raise h11.RemoteProtocolError("there are headers behind the body")
        except h11.RemoteProtocolError as error:
            self.why = str(error)[:200]
            raise
        return event


def _wrong(head: bytes) -> str:
    """What is wrong with a request's head; empty where h11 may read it."""
    first, *lines = head.split(b"\r\n")
    if any(end in line for line in (first, *lines) for end in (b"\r", b"\n")):
        return "a line ends with something else than CR LF"
    if not _FIRST_LINE.fullmatch(first):
        return "the first line must be METHOD /PATH HTTP/1.1"
    if any(line[:1] in (b" ", b"\t") for line in lines):
        return "a line begins with a space"
    said: dict[bytes, list[bytes]] = {}
    for line in lines:
        name, _, value = line.partition(b":")
        said.setdefault(name.lower(), []).append(value.strip(_SPACE))
    for name in (b"content-length", b"transfer-encoding", b"host"):
        if len(said.get(name, ())) > 1:
            return f"the header {name.decode()} is there twice"
    length, coding, host = (said.get(name, [None])[0] for name in (b"content-length", b"transfer-encoding", b"host"))
    if length is not None and not length.isdigit():
        return "Content-Length is no number"
    if coding is not None and length is not None:
        return "there is a Content-Length beside a Transfer-Encoding"
    if coding is not None and first.endswith(b"1.0"):
        return "HTTP/1.0 has no Transfer-Encoding"
    if host is not None and not _HOST.fullmatch(host):
        return "the header host names no host"
    return ""
