"""A SentencePiece model as a protocol buffer: its pieces with scores and types, to read and to write.

The class is the one that transformers ships: sentencepiece's own generated module wants protobuf 7, which kfp does not
allow, and transformers' works with every protobuf from 4 on. A model that is parsed and serialised again gives the
same bytes.
"""

from typing import Any

from components.shared.errors import InputError

NORMAL = 1
BPE = 2
TOKENIZER_MODEL = "tokenizer.model"


def new_model() -> Any:
    """A ModelProto without pieces."""
    from transformers.utils import sentencepiece_model_pb2_new

    generated: Any = sentencepiece_model_pb2_new
    return generated.ModelProto()


def parse_model(model: bytes, where: str = TOKENIZER_MODEL) -> Any:
    """The ModelProto of a `tokenizer.model`; InputError when it is not one."""
    from google.protobuf.message import DecodeError

    proto = new_model()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise InputError(f"{where}: not a SentencePiece model ({error}); give a tokenizer.model") from error
    if not proto.pieces:
        raise InputError(f"{where}: a SentencePiece model without pieces; give a whole tokenizer.model")
    return proto
