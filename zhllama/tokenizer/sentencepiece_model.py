"""A SentencePiece model as a protocol buffer, by the class that transformers ships.

sentencepiece's own generated module wants protobuf 7, which kfp does not allow. Parsed and serialised again, a model
has the same bytes.
"""

import sys
from functools import cache
from importlib import machinery, util
from pathlib import Path
from types import ModuleType
from typing import Any

from zhllama.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Types of pieces."""
BPE = 2
TOKENIZER_MODEL = "tokenizer.model"


def new_model(**fields: Any) -> Any:
    """A ModelProto of these fields."""
    return _generated().ModelProto(**fields)


@cache
def _generated() -> Any:
    """transformers' module, by its place: the package itself takes most of a second to import."""
    if loaded := sys.modules.get("transformers.utils.sentencepiece_model_pb2_new"):
        return loaded
    package = util.find_spec("transformers")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("transformers is not installed", name="transformers")
    module = ModuleType("sentencepiece_model_pb2_new")
    path = Path(package.origin).with_name("utils") / f"{module.__name__}.py"
    machinery.SourceFileLoader(module.__name__, str(path)).exec_module(module)
    return module


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
