"""A model's answers, and how it answers: in which language, how much of it again and again.

Repetition is seq-rep-4 (Welleck et al. 2020, "Neural text generation with unlikelihood training", arXiv:1908.04319): of
an answer, the share of its runs of four that were there before, 1 − distinct runs / runs; the mean over the answers. Of
words and Han characters, not of tokens, so that models of different vocabularies compare. Distinct answers to different
questions (after distinct-n, Li et al. 2016, arXiv:1510.03055) show the model that says one thing to everything.
"""

import re
import unicodedata
from collections.abc import Sequence
from itertools import compress

from zhllama.inference.generate import BATCH, answer
from zhllama.inference.load import LoadedModel
from zhllama.inference.sampling import Sampling
from zhllama.progress import Progress

RUN = 4
_SCRIPTS = {"zh": "CJK", "en": "LATIN"}


def say(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], tokens: int, title: str, at_once: int = BATCH
) -> list[str | None]:
    """The model's answers to prompts of ids, greedy, so that they can be had again; None where a prompt does not fit.
    at_once: how many are answered side by side."""
    greedy = Sampling(do_sample=False, max_new_tokens=tokens)
    fits = [len(ids) < loaded.positions for ids in prompts]
    with Progress(title, sum(fits), "answers") as bar:
        said = iter(answer(loaded, list(compress(prompts, fits)), greedy, bar.advance, at_once))
    return [loaded.encoder.decode(next(said)) if fit else None for fit in fits]


def repetition(said: Sequence[str | None]) -> float | None:
    """seq-rep-4: 0, nothing twice, to almost 1; None without answers. One too short to repeat anything has 0."""
    shares = [_repeated(text) for text in said if text is not None]
    return sum(shares) / len(shares) if shares else None


def _repeated(text: str) -> float:
    words = re.findall(r"\w+", "".join(f" {letter} " if _script(letter) == "CJK" else letter for letter in text))
    runs = [tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distinct(said: Sequence[str]) -> float | None:
    """Of answers to different questions, the share that there is when each text counts once."""
    return len({text.strip().casefold() for text in said}) / len(said) if said else None


def mostly_in(language: str, text: str) -> bool:
    """Whether most letters of a text are Han characters (zh), or Latin (en)."""
    letters = [letter for letter in text if letter.isalpha()]
    return 2 * sum(_script(letter) == _SCRIPTS[language] for letter in letters) > len(letters)


def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]
