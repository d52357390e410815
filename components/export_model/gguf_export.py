"""One model as one or several GGUF files.

f32, f16 and bf16 go as a stream into the store. A quantised file is made by llama.cpp from a local one in the model's
own precision: room below TMPDIR is checked first. Before a weight is read, llama.cpp (where it is installed) encodes
lines made of the vocabulary's own pieces; the manifest says for how many its ids are not SentencePiece's.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from components.export_model.gguf_writer import PRECISIONS, GgufModel, plan_gguf, write_gguf
from components.export_model.llama_cpp_tools import QUANTIZATIONS, SUPER_BLOCK, encode, installed, quantise
from zhllama import storage
from zhllama.artifacts.reader import Artifact
from zhllama.artifacts.writer import ArtifactWriter
from zhllama.errors import InputError
from zhllama.progress import human
from zhllama.storage.folders import require_space
from zhllama.storage.private import temporary_folder
from zhllama.tokenizer.vocabulary import Encoder, mixtures
from zhllama.weights.meta_format import TOKENIZER

log = logging.getLogger("export")

KINDS = (*PRECISIONS, *QUANTIZATIONS)
PROBE_LINES = 400
_SPACES = ("", " ", "  two  spaces ", "\n\n\tindent\n", "a  b", "▁ ▁a", "\u3000全角\u00a0空格", "null \x01 and 🤗")


def split_kinds(value: str) -> list[str]:
    """`f16,q4_k_m` → [`f16`, `q4_k_m`], in any case, each once. InputError for a name that llama.cpp has not."""
    kinds = list(dict.fromkeys(part.strip().lower() for part in value.split(",") if part.strip()))
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"--quantization {kind}: no such type; give some of {', '.join(KINDS)}, comma-separated")
    return kinds


def quantised(kinds: Sequence[str]) -> list[str]:
    """Those that llama.cpp makes; the others are written without it."""
    return [kind for kind in kinds if kind in QUANTIZATIONS]


def export_gguf(model: Artifact, kinds: Sequence[str], name: str, out: ArtifactWriter) -> None:
    """Writes `model-<kind>.gguf` for each kind (none given: the model's own precision) and tokenizer.model."""
    plan = plan_gguf(model, name)
    encoder = plan.model.encoder
    kinds = list(kinds) or [plan.own_precision]
    sizes = {kind: estimate(plan, kind) for kind in kinds}
    listed = ", ".join(f"{kind} {human(size, 'B')}" for kind, size in sizes.items())
    log.info("%s parameters, %s; to write: %s", f"{plan.parameters:,}", plan.own_precision, listed)
    storage.require_room(out.root, sum(sizes.values()))
    for size in sizes.values():
        storage.check_size(out.root, size)
    differing = tokens_differing(plan)
    if differing:
        log.warning("llama.cpp encodes %d of %d probe lines otherwise than training", differing, PROBE_LINES)
    files: dict[str, Any] = {}
    for kind in filter(PRECISIONS.get, kinds):
        with out.writer(f"model-{kind}.gguf") as stream:
            write_gguf(plan, kind, stream)
        files[kind] = {"bytes": stream.size}
    if by_llama_cpp := quantised(kinds):
        files |= _quantised(plan, by_llama_cpp, out)
    beside = encoder.files(plan.positions)
    # of SentencePiece's, the one that the others are made of
    for file in [TOKENIZER] if TOKENIZER in beside else beside:
        out.add_bytes(file, beside[file])
    for entry in files.values():
        entry["bits_per_weight"] = round(8 * entry["bytes"] / plan.parameters, 3)

    vocabulary = model.manifest.vocabulary or encoder.vocabulary(dtype=plan.own_precision)
    out.vocabulary = replace(vocabulary, padding_multiple=1)
    out.facts |= {"parameters": plan.parameters, "files": files, "tokenizer_lines_differing": differing}
    out.facts["summary"] = "GGUF, " + ", ".join(f"{kind} {human(entry['bytes'], 'B')}" for kind, entry in files.items())
    out.metrics |= {f"{kind}_bytes": float(entry["bytes"]) for kind, entry in files.items()}


def estimate(plan: GgufModel, kind: str) -> int:
    """Bytes of a file: all but exact for a precision; a quantised one with a tenth to spare."""
    if kind in PRECISIONS:
        return plan.nbytes(kind)
    return int(plan.parameters * QUANTIZATIONS[kind] / 8 * 1.1) + plan.header_bytes


def _quantised(plan: GgufModel, kinds: Sequence[str], out: ArtifactWriter) -> dict[str, Any]:
    """Each quantised file, through one local file in the model's own precision."""
    from gguf import GGUFReader

    need = plan.nbytes(plan.own_precision) + max(estimate(plan, kind) for kind in kinds)
    require_space(tempfile.gettempdir(), need, "TMPDIR, where llama.cpp quantises,")
    odd = sorted({tensor.name for tensor in plan.tensors if len(tensor.shape) > 1 and tensor.shape[1] % SUPER_BLOCK})
    if odd and any("_k" in kind for kind in kinds):
        said = "%d tensors have rows that %d does not divide (%s): llama.cpp takes other types there"
        log.warning(said, len(odd), SUPER_BLOCK, odd[0])
    files: dict[str, Any] = {}
    with temporary_folder() as folder:
        source = Path(folder, "source.gguf")
        with open(source, "wb") as stream:
            write_gguf(plan, plan.own_precision, stream)
        for kind in kinds:
            target = Path(folder, f"model-{kind}.gguf")
            quantise(source, target, kind)
            out.add_file(target.name, target)
            types = Counter(tensor.tensor_type.name for tensor in GGUFReader(target).tensors)
            files[kind] = {"bytes": target.stat().st_size, "tensors": dict(sorted(types.items()))}
            target.unlink()
    return files


def tokens_differing(plan: GgufModel) -> int | None:
    """How many probe lines llama.cpp encodes otherwise than BOS and SentencePiece's ids; None where it is not there."""
    if not installed():
        log.warning("llama-cpp-python is not installed: its ids are not compared with training's")
        return None
    encoder = plan.model.encoder
    lines = probe_lines(encoder)
    with temporary_folder() as folder:
        path = Path(folder, "vocabulary.gguf")
        path.write_bytes(plan.header("f32", tensors=False))
        return encoder.differing(lines, encode(path, lines))


def probe_lines(encoder: Encoder) -> list[str]:
    """Seeded mixtures of the vocabulary's own pieces, where a wrong score or a tie shows, and odd white space."""
    return [*_SPACES, *mixtures(encoder.texts, PROBE_LINES - len(_SPACES), seed=0)]
