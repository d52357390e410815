"""What lies beside an adapter that has no tokenizer.model is evidence of the vocabulary it was trained with.

An adapter for 38,034 pieces has the shapes of one for 32,000, and merged into such a model it speaks nonsense.
tokenizer.json, added_tokens.json and tokenizer_config.json name tokens by id: each must be the model's.
"""

from collections.abc import Sequence
from typing import Any

from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.tokenizer.vocabulary import Encoder


def require_known_tokens(artifacts: Sequence[Artifact], encoders: Sequence[Encoder | None], rows: int) -> None:
    """InputError when a token beside an adapter is not that of the model, or of an adapter before it. A model (of so
    many rows) and its adapters in order, and the encoder of each that has a SentencePiece model."""
    known = tokens_beside(artifacts[0])
    for place, (artifact, encoder) in enumerate(zip(artifacts, encoders, strict=True)):
        if encoder is not None:
            # of a model: what its files name beyond its pieces as well
            known = (known if place == 0 else {}) | dict(enumerate(encoder.pieces))
        if place == 0 or encoder is not None:
            continue
        named = tokens_beside(artifact)
        wrong = next((index for index in sorted(named) if known.get(index) != named[index]), None)
        if not known:
            wrong = next((index for index in sorted(named) if index >= rows), None)
        elif wrong is None and "tokenizer.json" in artifact:
            wrong = next((index for index in sorted(known) if index not in named), None)
        if wrong is not None:
            its, has = (repr(each[wrong]) if wrong in each else "none" for each in (named, known))
            raise InputError(
                f"--adapters {artifact.root}: its tokenizer has {its} as token {wrong} (of {len(named)}), and the "
                f"model {has} (of {len(known) or rows}); give the model that it was trained on, with its vocabulary"
            )


def tokens_beside(artifact: Artifact) -> dict[int, str]:
    """Id → token, as the JSON files of a folder name them; nothing where there are none."""
    found: dict[int, str] = {}
    for name in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json"):
        if name not in artifact:
            continue
        try:
            given = read_object(artifact, name)
            found |= _OF[name](given)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{artifact.root}: {name} is damaged ({error}); fetch it again") from error
    return found


def _of_tokenizer(given: dict[str, Any]) -> dict[int, str]:
    pieces = given["model"]["vocab"]
    named = dict(enumerate(piece for piece, _ in pieces)) if isinstance(pieces, list) else _by_id(pieces)
    return named | _by_id({token["content"]: token["id"] for token in given.get("added_tokens") or []})


def _of_config(given: dict[str, Any]) -> dict[int, str]:
    added = given.get("added_tokens_decoder") or {}
    return {int(index): str(token["content"]) for index, token in added.items()}


def _by_id(tokens: dict[str, Any]) -> dict[int, str]:
    return {int(index): token for token, index in tokens.items()}


_OF = {"tokenizer.json": _of_tokenizer, "added_tokens.json": _by_id, "tokenizer_config.json": _of_config}
