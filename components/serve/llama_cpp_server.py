"""llama.cpp's server, mended: `python -m components.serve.llama_cpp_server --model FILE … --uds PATH`.

Known of llama-cpp-python 0.3: a grammar that llama.cpp cannot read makes no sampler, and the next token is drawn with
what is not there, which ends the process. Here it is a 4xx before an answer begins, and so is a JSON schema that the
answer would not be held to (llama_cpp_schema.py).
"""

from itertools import accumulate
from typing import Any

from components.serve.llama_cpp_schema import READ, grammar_of, resolved
from components.serve.unix_socket import listen_on_socket

DEEPEST = 2_000
"""Brackets within brackets, in a grammar."""
LONGEST_REPETITION = 2**18
"""Characters that a schema's repetition (minLength, minItems, a pattern's {n}) may become in a grammar."""


def readable(grammar: str | None) -> str | None:
    """400 for a grammar that llama.cpp cannot read; a ValueError would be the server's 500."""
    import llama_cpp
    from fastapi import HTTPException

    if grammar is not None:
        # it reads brackets within brackets by recursion: twenty thousand are the end of its stack
        deepest = max(accumulate((one == "(") - (one == ")") for one in grammar), default=0)
        # C's texts end at a NUL
        sampler = (
            None
            if "\0" in grammar or deepest > DEEPEST
            else llama_cpp.llama_sampler_init_grammar(None, grammar.encode(), b"root")
        )
        if not sampler:
            raise HTTPException(400, "llama.cpp cannot read this grammar")
        llama_cpp.llama_sampler_free(sampler)
    return grammar


def followed(form: dict[str, Any] | None) -> dict[str, Any] | None:
    """400 for a response_format with a schema that the answer would not be held to."""
    from fastapi import HTTPException

    if form and "schema" in form:
        try:
            readable(grammar_of(form["schema"]))
        except (ValueError, HTTPException) as error:
            why = error.detail if isinstance(error, HTTPException) else error
            raise HTTPException(
                400, f"llama.cpp cannot hold an answer to this schema: {why}; it reads {READ}"
            ) from None
    return form


def only_of_chats(body: Any) -> Any:
    from fastapi import HTTPException

    if isinstance(body, dict) and body.get("response_format"):
        raise HTTPException(400, "llama.cpp takes response_format with messages alone; give a prompt a grammar")
    return body


def mend() -> None:
    """Before llama_cpp.server.app is imported, which takes the forms of requests from `types`."""
    import llama_cpp.server.types as types
    from llama_cpp import llama_grammar
    from llama_cpp._internals import LlamaSampler
    from pydantic import field_validator, model_validator

    checks = {
        "CreateCompletionRequest": model_validator(mode="before")(staticmethod(only_of_chats)),
        "CreateChatCompletionRequest": field_validator("response_format")(staticmethod(followed)),
    }
    for name, other in checks.items():
        form: Any = getattr(types, name)
        check = field_validator("grammar")(staticmethod(readable))
        members = {"__module__": form.__module__, "readable": check, "followed": other}
        setattr(types, name, type(name, (form,), members))
    add = LlamaSampler.add_grammar

    def add_readable(self: Any, model: Any, grammar: Any) -> None:
        readable(grammar._grammar)
        add(self, model, grammar)

    setattr(LlamaSampler, "add_grammar", add_readable)  # noqa: B010 - to mypy a method is no variable

    # one that says a billion is written out, in all the memory there is
    repeat = llama_grammar._build_repetition

    def repeat_some(item: str, least: int, most: int | None, **more: Any) -> Any:
        if len(item) * max(least, most or 0) > LONGEST_REPETITION:
            raise ValueError("the schema asks for too long a repetition")
        return repeat(item, least, most, **more)

    setattr(llama_grammar, "_build_repetition", repeat_some)  # noqa: B010 - its types are others
    setattr(llama_grammar.SchemaConverter, "_resolve_ref", resolved)  # noqa: B010 - to mypy a method is no variable


if __name__ == "__main__":
    listen_on_socket()
    mend()
    from llama_cpp.server.__main__ import main

    main()
