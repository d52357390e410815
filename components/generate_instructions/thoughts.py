"""What a reasoning model says before its answer: thoughts, which often are drafts of items, and no answer.

Servers cut them off, or leave them in the text, often without the opening marker, which stands in the prompt. So all
before the last closing marker is no answer, nor is what follows an opening one that nothing closes. A marker inside of
an object that is whole is quoted. Of families that mark their answer (gpt-oss, Granite), that marker closes.
"""

import json
import re
from collections.abc import Iterator
from itertools import islice

_TAG = (
    r"(?:\w+[:_])?"  # seed:think, mm:think, longcat_think
    r"(?:(?:ant)?think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratch_?pad|analysis|planning|思考(?:过程)?"
    r"|chain_of_thoughts?|cot|inner_monologue)"
)
MARKERS = (
    # opening, closing
    # DeepSeek-R1, Qwen3, QwQ, GLM, MiniMax, Hunyuan, Nemotron, Phi-4, Ring, EXAONE Deep, Gemini, Seed, LongCat, …
    (rf"<\|?\s*{_TAG}(?:\s[^<>]*)?\|?>", rf"<\|?\s*/\s*{_TAG}\s*\|?>"),
    (r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    (r"◁think▷", r"◁/think▷"),  # Kimi
    # Sky-T1, OpenThinker
    (r"<\|begin_of_(?:thought|thinking|reasoning)\|>", r"<\|end_of_(?:thought|thinking|reasoning)\|>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Command A
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    (r"<\|channel>thought", r"<channel\|>"),  # Gemma 4
    (r"<unused94>thought", r"<unused95>"),  # MedGemma
    (r"<\|channel\|>(?:analysis|commentary)", r"<\|channel\|>final\s*(?:<\|constrain\|>\w+)?<\|message\|>"),  # gpt-oss
    (r"^analysis(?=\S)", r"assistantfinal"),  # gpt-oss without its special tokens
    (r"Here is my thought process:", r"Here is my response:"),  # Granite
)
_OPENING, _CLOSING = (re.compile("|".join(pair[side] for pair in MARKERS), re.IGNORECASE) for side in (0, 1))
_LOOKED_AT = 50
"""Braces before a marker, of which one may open the object that quotes it; and opening markers."""
_decoder = json.JSONDecoder(strict=False)


def without_thoughts(text: str) -> tuple[str, bool]:
    """The answer, and whether thoughts without an end are left out of it."""
    closed = next((marker.end() for marker in _said(text, list(_CLOSING.finditer(text)))), 0)
    text = text[closed:].lstrip()
    # the last that is found is the first of the text
    opened = [marker.start() for marker in _said(text, list(islice(_OPENING.finditer(text), _LOOKED_AT)))]
    return (text[: opened[-1]], True) if opened else (text, False)


def _said(text: str, markers: list[re.Match[str]]) -> Iterator[re.Match[str]]:
    """Those that no whole object of the text quotes, the last first."""
    quoting = len(text)
    for marker in reversed(markers):
        if marker.start() > quoting:
            continue
        begin = marker.start()
        for _ in range(_LOOKED_AT):
            begin = text.rfind("{", 0, begin)
            if begin < 0:
                break
            try:
                _, end = _decoder.raw_decode(text, begin)
            except (ValueError, RecursionError):
                continue
            if end > marker.start():
                quoting = begin
                break
        else:
            begin = -1
        if begin < 0:
            yield marker
