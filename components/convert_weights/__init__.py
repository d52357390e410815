"""Convert Meta's checkpoint, or a GGUF, to a Hugging Face model.

In:  meta-weights: `consolidated.NN.pth` (any number), `params.json`, `tokenizer.model`; or a gguf.
Out: an hf-model: safetensors with the embeddings in a file of their own, config, tokenizer files. The weights keep
     their dtype, bit for bit (what is quantised becomes float32); only names, shards and the order of rows in the
     query and key projections change.
"""
