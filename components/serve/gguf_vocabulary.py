"""The tokenizer inside a GGUF file: held against the contract, and llama.cpp's ids against SentencePiece's.

A GGUF carries its pieces, scores and types. They are put together again as the SentencePiece model that they came
from, which then says what llama.cpp has to give; so a file of somebody else's is checked as well as one of our own,
whose manifest says in addition which vocabulary it must be. No weight is read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.serve.check import LINES
from zhllama.errors import InputError
from zhllama.tokenizer.prompt import wrap
from zhllama.tokenizer.sentencepiece_model import BPE, new_model
from zhllama.tokenizer.vocabulary import Encoder, Relation, Vocabulary


def checked_vocabulary(path: Path, contract: Vocabulary | None, where: str) -> tuple[Encoder, int]:
    """The encoder of a GGUF file, and its positions. InputError where ids in would not be the ids of training."""
    fields = _fields(path, where)
    if fields.get("tokenizer.ggml.model") != "llama":
        raise InputError(f"{where}: its tokenizer is not SentencePiece's; export the model again with export_model")
    encoder = Encoder(_sentencepiece(fields), where)
    if contract is not None:
        found = encoder.vocabulary(also_at=(int(size) for size in contract.prefixes))
        if found.relation_to(contract) is not Relation.EQUAL:
            raise InputError(f"{where}: it has {found}, the manifest says {contract}; export the model again")
    _compare(path, encoder, str(fields.get("tokenizer.chat_template", "")), where)
    return encoder, int(fields.get("llama.context_length", 2048))


def _fields(path: Path, where: str) -> dict[str, Any]:
    from gguf import GGUFReader

    try:
        return {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise InputError(f"{where}: not a GGUF file, or cut short ({error}); export or fetch it again") from error


def _sentencepiece(fields: Mapping[str, Any]) -> bytes:
    """The bytes of the tokenizer.model that these pieces, scores and types are of. Types have the same numbers."""
    proto = new_model()
    rows = zip(*(fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")), strict=True)
    for text, score, kind in rows:
        proto.pieces.add(piece=text, score=score, type=kind)
    trainer = proto.trainer_spec
    trainer.model_type = BPE
    trainer.byte_fallback = True
    trainer.vocab_size = len(proto.pieces)
    trainer.unk_id = int(fields.get("tokenizer.ggml.unknown_token_id", 0))
    trainer.bos_id = int(fields["tokenizer.ggml.bos_token_id"])
    trainer.eos_id = int(fields["tokenizer.ggml.eos_token_id"])
    trainer.pad_id = -1
    normaliser = proto.normalizer_spec
    normaliser.name = "identity"
    normaliser.add_dummy_prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    normaliser.remove_extra_whitespaces = False
    return bytes(proto.SerializeToString())


def _compare(path: Path, encoder: Encoder, template: str, where: str) -> None:
    """InputError where llama.cpp, or the chat template in the file, gives other ids than training."""
    import jinja2
    import jinja2.sandbox
    import llama_cpp

    model = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
    mend = "export the model again; with tied scores (--scores zero) no engine can agree"
    try:
        for line in (*LINES, wrap(LINES[0])):
            # an empty text is BOS alone; llama.cpp's own binding cannot be asked for it
            if line and model.tokenize(line.encode(), add_bos=True) != [encoder.bos, *encoder.encode(line)]:
                raise InputError(f"{where}: llama.cpp gives other ids than SentencePiece for {line!r}; {mend}")
    finally:
        model.close()
    if not template:
        raise InputError(f"{where}: there is no chat template in it; export the model again")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    special = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    try:
        rendered = environment.from_string(template).render(messages=[{"role": "user", "content": LINES[0]}], **special)
    except jinja2.TemplateError as error:
        raise InputError(f"{where}: its chat template cannot be read ({error}); export the model again") from error
    if rendered.removeprefix("<s>") != wrap(LINES[0]):
        raise InputError(f"{where}: its chat template is not the training prompt; export the model again")
