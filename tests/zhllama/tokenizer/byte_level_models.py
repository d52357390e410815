"""Small byte-level tokenizers of today's shapes, trained here."""

import json
from collections.abc import Iterable
from typing import Any

from zhllama.tokenizer.gguf_tokenizer import Pre, byte_level_json


def trained(lines: Iterable[str], pre: Pre, size: int, special: list[str], first: bool = False) -> dict[str, Any]:
    """The object of a tokenizer.json: `size` ordinary tokens, then the special ones (first: before them, as SmolLM2
    has them)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    made = json.loads(tokenizer.to_str()) | {"pre_tokenizer": pre.pre_tokenizer}
    tokenizer = Tokenizer.from_str(json.dumps(made | {"normalizer": {"type": "NFC"} if pre.nfc else None}))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    shift = len(special) if first else 0
    vocabulary = {text: index + shift for text, index in model["vocab"].items()}
    begin = 0 if first else len(vocabulary)
    if first:
        vocabulary |= {text: index for index, text in enumerate(special)}
    added = {begin + index: (text, True) for index, text in enumerate(special)}
    return byte_level_json(vocabulary, model["merges"], added, pre, special[0] if pre.bos and special else None)
