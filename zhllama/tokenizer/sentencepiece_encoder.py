"""SentencePiece's encoder, from the bytes of a `tokenizer.model`."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Self

from zhllama.errors import InputError
from zhllama.tokenizer.effective_model import PAD_PIECE
from zhllama.tokenizer.encoder import RECIPE_SIZES, Encoder, digests_of
from zhllama.tokenizer.fast_tokenizer import converted_files
from zhllama.tokenizer.prompt import RECIPE
from zhllama.tokenizer.sentencepiece_model import BYTE, CONTROL, NORMAL, TOKENIZER_MODEL, UNKNOWN, parse_model

if TYPE_CHECKING:
    import numpy as np

    from zhllama.tokenizer.contract import Vocabulary
    from zhllama.tokenizer.segments import SegmentEncoder


class SentencePieceEncoder(Encoder):
    """SentencePiece encoding by the ids used in training."""

    bos: int

    def __init__(self, model: bytes, where: str = TOKENIZER_MODEL) -> None:
        import sentencepiece

        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise InputError(f"{where}: not a SentencePiece model ({error}); give a tokenizer.model") from error
        self.size = self._processor.get_piece_size()
        self.bos = self._processor.bos_id()
        self.eos = self._processor.eos_id()
        self.unknown = self._processor.unk_id()
        if self.bos < 0 or self.eos < 0:
            raise InputError(f"{where}: the model has no BOS or EOS id; a LLaMA-shaped SentencePiece model has 1 and 2")

    @cached_property
    def pieces(self) -> list[str]:
        return [self._processor.id_to_piece(index) for index in range(self.size)]

    @cached_property
    def texts(self) -> list[str]:
        return [piece.piece.replace("▁", " ") for piece in self._proto.pieces if piece.type == NORMAL]

    @cached_property
    def fragments(self) -> frozenset[int]:
        return frozenset(at for at, piece in enumerate(self._proto.pieces) if piece.type == BYTE)

    @cached_property
    def pad(self) -> int | None:
        """The id of `[PAD]`, or of the model's own padding piece."""
        index = int(self._processor.piece_to_id(PAD_PIECE))
        if index != self.unknown:
            return index
        index = int(self._processor.pad_id())
        return index if index not in (-1, self.unknown, self.bos, self.eos) else None

    @cached_property
    def named(self) -> Mapping[str, int]:
        trainer = self._proto.trainer_spec
        index, pad = trainer.pad_id, self.pad
        if pad is None and 0 <= index < self.size and self.pieces[index] == trainer.pad_piece:
            pad = index
        ids = {"bos": self.bos, "eos": self.eos, "pad": pad, "unk": trainer.unk_id}
        return {name: index for name, index in ids.items() if index is not None}

    @cached_property
    def special(self) -> Mapping[str, int]:
        named = {self.bos, self.eos, self.pad}
        return {
            piece.piece: index
            for index, piece in enumerate(self._proto.pieces)
            if piece.type in (CONTROL, UNKNOWN) or index in named
        }

    def is_special(self, index: int) -> bool:
        trainer = self._proto.trainer_spec
        taken = {self.named_pad, trainer.unk_id}
        return index not in taken and 0 <= index < self.size and self._proto.pieces[index].type == CONTROL

    @cached_property
    def _proto(self) -> Any:
        return parse_model(self.model)

    @cached_property
    def _segments(self) -> "SegmentEncoder | None":
        """The quicker way to the same ids, where there is one."""
        from zhllama.tokenizer.segments import SegmentEncoder

        return SegmentEncoder(self._processor, self._proto) if SegmentEncoder.fits(self._proto) else None

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """On SentencePiece's threads."""
        return [list(ids) for ids in self._processor.encode(list(texts))] if texts else []

    def encode_flat(
        self, texts: Sequence[str], begin: bool = False, end: bool = False
    ) -> tuple["np.ndarray", "np.ndarray"]:
        import numpy as np

        if self._segments is not None:
            return self._segments.encode(texts, begin, end)
        # the ids are put in after the text was encoded, so a literal </s> stays text
        found = self._processor.encode(list(texts), out_type="numpy", add_bos=begin, add_eos=end) if texts else []
        arrays = [np.zeros(0, np.int32), *found]
        return np.concatenate(arrays), np.fromiter(map(len, arrays[1:]), np.int64, len(texts))

    def unknown_bytes(self, texts: Sequence[str]) -> list[int]:
        """None where it falls back to bytes."""
        counts = []
        for text, ids in zip(texts, self.encode_batch(texts), strict=True):
            pieces = self._processor.encode(text, out_type=str) if self.unknown in ids else ()
            spelt = (piece.replace("▁", " ") for piece, index in zip(pieces, ids) if index == self.unknown)
            counts.append(sum(len(piece.encode()) for piece in spelt))
        return counts

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._processor.decode([int(index) for index in ids]))

    def written(self, ids: Sequence[int]) -> str:
        said = b""
        pieces = (self._proto.pieces[index] for index in ids)
        for of_bytes, run in groupby(pieces, lambda piece: piece.type == BYTE):
            if not of_bytes:
                said += "".join(
                    piece.piece if piece.piece in self.special else piece.piece.replace("▁", " ") for piece in run
                ).encode()
                continue
            content = bytes(int(piece.piece[1:-1], 16) for piece in run)
            try:
                content.decode()
            except UnicodeDecodeError:
                content = "\ufffd".encode() * len(content)
            said += content
        return said.decode().removeprefix(" ")

    def files(self, max_length: int = 2048, template: Any = None) -> dict[str, bytes]:
        return converted_files(self.model, self.named, max_length, template or RECIPE.template)

    def without_last(self) -> Self:
        proto = parse_model(self.model)
        del proto.pieces[-1]
        proto.trainer_spec.pad_id = -1
        return type(self)(proto.SerializeToString())

    def digests(self, sizes: Iterable[int]) -> dict[int, str]:
        return digests_of(self.pieces, sizes)

    def vocabulary(self, also_at: Iterable[int] = (), **facts: Any) -> "Vocabulary":
        return super().vocabulary((*RECIPE_SIZES, *also_at), **facts)
