"""Convert Meta's checkpoint to a Hugging Face model.

In:  meta-weights: `consolidated.NN.pth` (any number), `params.json`, `tokenizer.model`.
Out: an hf-model: safetensors with the embeddings in a file of their own, config, tokenizer files. The weights keep
     their dtype, bit for bit; only names, shards and the order of rows in the query and key projections change.
"""
