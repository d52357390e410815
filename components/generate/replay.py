"""What a model wrote of its own as text that another training of it replays: what is left out, and what is published.

A base that is drawn from as it comes writes what it was trained on, and besides that loops, scraps and bytes that are
no text. What compresses to less than a fifth repeats itself (English compresses to 0.4–0.6 where it is this short).
Text that is Chinese for more than a fifth is left out: it is what the training will teach anyway.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Sequence

from components.generate.options import Generate
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.tokenizer.han import HAN

REPLAY = "replay.jsonl"
SHORTEST = 100
"""Characters of a document."""
REPEATS = 0.2
"""What zlib leaves of one that repeats itself."""
CHINESE = 0.2
GARBAGE = 0.02
"""Of the characters, at most so many may be Chinese, and control characters or what is no UTF-8."""

_HAN = re.compile(f"[{HAN}]")
_BROKEN = re.compile("[\ufffd\x00-\x08\x0b-\x1f\x7f]")


def fault(text: str) -> str:
    """Why a document is left out; "" where nothing speaks against it."""
    if len(text.strip()) < SHORTEST:
        return "too short"
    if len(_BROKEN.findall(text)) > GARBAGE * len(text):
        return "no text"
    if len(_HAN.findall(text)) > CHINESE * len(text):
        return "Chinese"
    content = text.encode()
    return "repeats itself" if len(zlib.compress(content, 9)) < REPEATS * len(content) else ""


def publish_replay(written: Sequence[str], out: ArtifactWriter, config: Generate) -> Manifest:
    """The documents that nothing speaks against, each once, in order. InputError where none is left."""
    kept: dict[str, None] = {}
    left_out: Counter[str] = Counter()
    for text in written:
        why = "written twice" if text in kept else fault(text)
        if why:
            left_out[why] += 1
        else:
            kept[text] = None
    counted = ", ".join(f"{count:,} {why}" for why, count in sorted(left_out.items()))
    if not kept:
        said = f"of {len(written):,} documents none can be replayed ({counted})"
        raise InputError(f"--model {config.model}: {said}; give --input with beginnings, or text in place of it")
    out.add_bytes(REPLAY, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in kept).encode())
    size = sum(len(text.encode()) for text in kept)
    out.facts |= {
        "documents": len(kept),
        "left_out": dict(sorted(left_out.items())),
        "summary": f"{len(kept):,} of {len(written):,} documents, {size:,} bytes"
        + (counted and f"; left out: {counted}"),
    }
    out.metrics |= {"documents": float(len(kept)), "bytes": float(size)}
    return out.publish("text")
