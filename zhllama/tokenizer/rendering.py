"""A chat template at work, as transformers renders it; run as a program, within bounds.

A template is a program of whoever published the model. jinja2's sandbox keeps it from files, not from looping for ever
or from a text of 10 GB, and what is in one long call cannot be stopped from inside a process. As a program this takes a
conversation a line on its standard input and answers each with a line; the kernel ends it where one takes too long.
It takes a second of a processor to start, and a conversation 0.2 ms.
"""

import json
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS = 5.0
"""Of a processor, for one conversation. Models with tools take milliseconds."""
MEMORY = 2**30
"""Bytes, transformers' own some hundred MB among them."""
LONGEST = 2**24
"""Characters of a rendered conversation."""


def render(template: str, messages: Sequence[Mapping[str, str]], names: Mapping[str, str]) -> str:
    """The text of a conversation. names: as `bos_token`. ValueError, with what was said, where the template refuses."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    given: Any = names
    try:
        rendered = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=template,
            add_generation_prompt=True,
            **given,
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, MemoryError) as error:
        raise ValueError(" ".join((str(error) or type(error).__name__).split())[:200]) from error
    except RecursionError as error:
        raise ValueError("it calls itself without end") from error
    text = str(rendered[0][0])
    if len(text) > LONGEST:
        raise ValueError(f"it makes {len(text):,} characters of it")
    return text


def _serve() -> None:
    # imports of transformers' first
    render("{{ messages }}", [], {})
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            answer = {"text": render(*json.loads(line))}
        except ValueError as error:
            answer = {"error": str(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
