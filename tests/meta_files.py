"""A small model as the files of a Meta model."""

import hashlib
import io
from collections.abc import Mapping

import torch

from zhllama.weights.meta_format import PARAMS, SUMS, TOKENIZER, MetaParams, shard_name, split_to_shards


def meta_files(
    tensors: Mapping[str, torch.Tensor], params: MetaParams, tokenizer: bytes, shards: int
) -> dict[str, bytes]:
    """A small Hugging Face state dict as the files of a Meta model, `sha256sums.txt` among them: name → content."""
    files = {PARAMS: params.to_json(), TOKENIZER: tokenizer}
    for index, shard in enumerate(split_to_shards(tensors, params.n_heads, shards, params.kv_heads)):
        buffer = io.BytesIO()
        torch.save(shard, buffer)
        files[shard_name(index)] = buffer.getvalue()
    sums = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items())]
    return {**files, SUMS: "".join(sums).encode()}
