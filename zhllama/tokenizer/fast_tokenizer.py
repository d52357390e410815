"""The tokenizer files of a published model folder, made from its SentencePiece model.

`tokenizer.json` is transformers' own conversion: with distinct scores it gave SentencePiece's ids on every line tried.
Its class must be PreTrainedTokenizerFast: `LlamaTokenizer` rebuilds it and then differs on white space. Where scores
tie (the recipe's zeros) no conversion can agree: SentencePiece merges the leftmost of equal pairs, `tokenizers` the one
of the earlier merge. A literal `</s>`, `<s>`, `<unk>` or `[PAD]` is a special token here and text for SentencePiece.
"""

import json
from collections.abc import Mapping
from typing import Any

from zhllama.errors import InputError
from zhllama.tokenizer.sentencepiece_model import BPE, CONTROL, TOKENIZER_MODEL, parse_model


def converted_files(
    model: bytes, named: Mapping[str, int], max_length: int, template: str | list[dict[str, str]]
) -> dict[str, bytes]:
    """Name → content of the tokenizer files of a model folder. `model`: the bytes of a `tokenizer.model`; `named`: its
    special ids. `AutoTokenizer.from_pretrained(folder)` then gives BOS and SentencePiece's ids. InputError for a model
    that is not BPE or has no BOS, EOS or unknown piece."""
    from tokenizers import AddedToken, processors
    from transformers.convert_slow_tokenizer import SpmConverter

    proto = parse_model(model)
    if proto.trainer_spec.model_type != BPE:
        raise InputError(f"{TOKENIZER_MODEL}: not a BPE model; LLaMA's vocabulary can only be extended as BPE")
    if proto.trainer_spec.unk_id < 0:
        raise InputError(f"{TOKENIZER_MODEL}: the model has no unknown piece; a LLaMA-shaped model has <unk> at 0")
    special = {f"{name}_token": proto.pieces[index].piece for name, index in named.items()}
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    # legacy: a text after a special token gets its dummy prefix, as each prompt does when it is encoded on its own
    tokenizer = SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary, legacy=True)
    texts = [*special.values(), *(piece.piece for piece in proto.pieces if piece.type == CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in dict.fromkeys(texts)])
    begin = special["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, vocabulary[begin])]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": template,
    }
    return {
        TOKENIZER_MODEL: model,
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def load_fast(files: dict[str, bytes]) -> Any:
    """The `tokenizers.Tokenizer` of such files: `.encode(text).ids` begins with BOS."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(files["tokenizer.json"].decode())
