"""File formats of tensors: safetensors, torch's zip, Meta's shards."""
