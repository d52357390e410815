"""`transformers serve`, its streams mended: `python -m components.serve.transformers_server NAME --uds PATH`.

Known of transformers 5.24 with tokenizers 0.23: a stream ends with an error ("Invalid prefix encountered") when a
model says bytes that are no UTF-8 and goes on, as any LLaMA with byte pieces may. The server takes `DecodeStream` from
`tokenizers.decoders` for each answer; here it finds one that decodes the answer so far and never fails.
"""

from typing import Any

from components.serve.unix_socket import listen_on_socket

HELD_BACK = 4
"""Replacement characters at the end of a text that may still become a character: it has four bytes at most."""


class WholeCharacters:
    """Takes ids one by one and gives the text that each adds, or None; as tokenizers' DecodeStream is used."""

    def __init__(self, ids: list[int] | None = None, skip_special_tokens: bool = True) -> None:
        self._ids = list(ids or ())
        self._skip = skip_special_tokens
        self._given = ""

    def step(self, tokenizer: Any, index: int) -> str | None:
        self._ids.append(int(index))
        text = tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        tail = len(text) - len(text.rstrip("\ufffd"))
        whole = text[: len(text) - min(tail, HELD_BACK)]
        if len(whole) <= len(self._given):
            return None
        added, self._given = whole[len(self._given) :], whole
        return added


if __name__ == "__main__":
    import tokenizers.decoders

    setattr(tokenizers.decoders, "DecodeStream", WholeCharacters)  # noqa: B010 - its declared type is final
    import typer
    from transformers.cli.serve import Serve

    listen_on_socket()
    app = typer.Typer()
    app.command()(Serve)
    app()
