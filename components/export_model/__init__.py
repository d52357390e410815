"""Export a Hugging Face model to other programs' formats.

In:  an hf-model.
Out: exported files. meta: `consolidated.NN.pth`, `params.json`, `tokenizer.model` and their `sha256sums.txt`. gguf:
     `model-<type>.gguf` for each type asked for, and `tokenizer.model`.
"""
