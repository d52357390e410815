"""The characters by which byte-level pieces spell bytes (GPT-2's): printable ones stand for themselves."""

_printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_others = [byte for byte in range(256) if byte not in _printable]
LETTER_OF = {byte: chr(byte) for byte in _printable} | {byte: chr(256 + at) for at, byte in enumerate(_others)}
BYTE_OF = {letter: byte for byte, letter in LETTER_OF.items()}


def spelt(content: bytes) -> str:
    """Bytes as a piece has them."""
    return "".join(map(LETTER_OF.__getitem__, content))
