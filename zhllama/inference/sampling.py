"""How answers are drawn."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. The defaults are the recipe's."""

    do_sample: bool = True
    temperature: float = 0.2
    top_k: int = 40
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    max_new_tokens: int = 400
    seed: int = 42
