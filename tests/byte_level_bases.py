"""Tokenizers trained to the shapes of the byte-level bases that people start from, small: the files of a model folder.

LLaMA 3's: every split of a piece is a merge, by rank; whole pretokens are taken as they are; 256 special ids behind the
ranks; BOS by a post-processor. Qwen's: merges as they were learned, NFC, digits one by one, no BOS, ChatML, tokens that
are added and not special. SmolLM2's: GPT-2's expression, special tokens at the beginning, a BOS that is named and never
put in, padding that is EOS, control characters without a piece.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
]
_LLAMA3_SPECIAL += ["<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>"]
_LLAMA3_SPECIAL += ["<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
_LLAMA3_SPECIAL += [f"<|reserved_special_token_{number}|>" for number in range(3, 248)]
_SMOLLM_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>"]
_WITHOUT = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0xF1, 0xF2])
"""Bytes that SmolLM2 has no piece for."""


def _trained(lines: Iterable[str], pieces: int, before: Any, normalizer: Any = None, **options: Any) -> dict[str, Any]:
    from tokenizers import Tokenizer, decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = before, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    options = {"initial_alphabet": ByteLevel.alphabet(), "special_tokens": [], **options}
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=pieces, show_progress=False, **options))
    return dict(json.loads(tokenizer.to_str()))


def _added(index: int, text: str, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **flags, "special": special}


def _files(fast: dict[str, Any], template: str, **named: str) -> dict[str, bytes]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "chat_template": template}
    config |= {"clean_up_tokenization_spaces": False} | {f"{name}_token": text for name, text in named.items()}
    return {
        "tokenizer.json": json.dumps(fast, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def llama3_shaped(lines: Iterable[str], pieces: int) -> dict[str, bytes]:
    """`pieces` ranks, then 256 special ids."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    from zhllama.tokenizer.byte_level import splits_of
    from zhllama.tokenizer.byte_level_rules import LLAMA3

    before = Sequence([Split(Regex(LLAMA3), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    fast = _trained(lines, pieces, before)
    vocab = fast["model"]["vocab"]
    fast["model"]["ignore_merges"] = True
    fast["model"]["merges"] = [
        list(split) for piece in sorted(vocab, key=vocab.get) for split in splits_of(piece, vocab)
    ]
    fast["added_tokens"] = [_added(pieces + number, text) for number, text in enumerate(_LLAMA3_SPECIAL)]
    bos = _LLAMA3_SPECIAL[0]
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": at}} for at, name in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, {"SpecialToken": {"id": bos, "type_id": 1}}, second],
        "special_tokens": {bos: {"id": bos, "ids": [pieces], "tokens": [bos]}},
    }
    after = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    fast["post_processor"] = {"type": "Sequence", "processors": [after, template]}
    return _files(fast, LLAMA3_TEMPLATE, bos=bos, eos="<|eot_id|>")


def qwen_shaped(lines: Iterable[str], pieces: int) -> dict[str, bytes]:
    """`pieces` of merges, then ChatML's tokens and two that are not special; vocab.json and merges.txt beside it."""
    from tokenizers import Regex, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    from zhllama.tokenizer.byte_level_rules import QWEN2

    before = Sequence([Split(Regex(QWEN2), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    fast = _trained(lines, pieces, before, normalizers.NFC())
    texts = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
    fast["added_tokens"] = [_added(pieces + at, text, text.startswith("<|")) for at, text in enumerate(texts)]
    fast["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    merges = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in fast["model"]["merges"]), ""])
    files = _files(fast, CHATML, eos="<|im_end|>", pad="<|endoftext|>")
    return files | {"vocab.json": json.dumps(fast["model"]["vocab"]).encode(), "merges.txt": merges.encode()}


def smollm_shaped(lines: Iterable[str], pieces: int) -> dict[str, bytes]:
    """Special tokens, and pieces up to `pieces`."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    from zhllama.tokenizer.byte_alphabet import LETTER_OF

    before = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    alphabet = [letter for byte, letter in LETTER_OF.items() if byte not in _WITHOUT]
    clean = (line for line in lines if not set(_WITHOUT) & set(line.encode()))
    fast = _trained(clean, pieces, before, initial_alphabet=alphabet, special_tokens=_SMOLLM_SPECIAL)
    names = {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>", "unk": "<|endoftext|>"}
    return _files(fast, CHATML, **names)


SHAPES: dict[str, Callable[[Iterable[str], int], dict[str, bytes]]] = {
    "llama 3": llama3_shaped,
    "qwen": qwen_shaped,
    "smollm2": smollm_shaped,
}
