"""What lies beside an adapter of a model without a SentencePiece model: evidence of the vocabulary it was trained with.

An adapter for 38,034 pieces has the shapes of one for 32,000, and merged into such a model it speaks nonsense.
tokenizer.json, added_tokens.json and tokenizer_config.json name tokens by id: each must be the model's.
"""

from collections.abc import Mapping
from typing import Any

from zhllama.artifacts.json_file import read_object
from zhllama.artifacts.reader import Artifact
from zhllama.errors import InputError
from zhllama.tokenizer.effective_model import ADDED, CONFIG, FAST, SPECIAL, is_padding


def require_known_tokens(model: Artifact, adapter: Artifact, rows: int) -> None:
    """InputError when a token beside the adapter is not the model's; or, where the model names none, has no row. rows:
    of the model with the adapter. Padding without a row is masked wherever it stands."""
    known, named = tokens_of(_described(model), model.root), tokens_of(beside := _described(adapter), adapter.root)
    if is_padding(named.get(rows, ""), beside):
        del named[rows]
    if known:
        wrong = next((index for index in sorted(named) if known.get(index) != named[index]), None)
        if wrong is None and FAST in adapter:
            wrong = next((index for index in sorted(known) if index not in named), None)
    else:
        wrong = next((index for index in sorted(named) if index >= rows), None)
    if wrong is not None:
        its, has = (repr(each[wrong]) if wrong in each else "none" for each in (named, known))
        raise InputError(
            f"--adapters {adapter.root}: its tokenizer has {its} as token {wrong} (of {len(named)}), and the "
            f"model {has} (of {len(known) or rows}); give the model that it was trained on, with its vocabulary"
        )


def tokens_of(described: Mapping[str, dict[str, Any]], where: str) -> dict[int, str]:
    """Id → token, as the JSON files of a folder (name → content) name them; nothing where there are none."""
    found: dict[int, str] = {}
    for name, tokens in _OF.items():
        try:
            found |= tokens(described.get(name, {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(where, name, error) from error
    return found


def _described(artifact: Artifact) -> dict[str, dict[str, Any]]:
    found = {}
    for name in (*_OF, SPECIAL):
        if name in artifact:
            try:
                found[name] = read_object(artifact, name)
            except ValueError as error:
                raise _damaged(artifact.root, name, error) from error
    return found


def _damaged(where: str, name: str, error: Exception) -> InputError:
    return InputError(f"{where}: {name} is damaged ({error}); fetch it again")


def _of_tokenizer(given: dict[str, Any]) -> dict[int, str]:
    pieces = given["model"]["vocab"] if given else {}
    named = dict(enumerate(piece for piece, _ in pieces)) if isinstance(pieces, list) else _by_id(pieces)
    return named | _by_id({token["content"]: token["id"] for token in given.get("added_tokens") or []})


def _of_config(given: dict[str, Any]) -> dict[int, str]:
    added = given.get("added_tokens_decoder") or {}
    return {int(index): str(token["content"]) for index, token in added.items()}


def _by_id(tokens: dict[str, Any]) -> dict[int, str]:
    return {int(index): token for token, index in tokens.items()}


_OF = {FAST: _of_tokenizer, ADDED: _by_id, CONFIG: _of_config}
