"""Fetch weights and verify them: Meta's LLaMA files, Hugging Face models, LoRA adapters.

In:  an s3:// prefix, an https:// address, a folder, or a Hugging Face repository (owner/name).
Out: meta-weights, hf-model or adapter, by what is there: the files as they are, each checked against its SHA-256.
"""
