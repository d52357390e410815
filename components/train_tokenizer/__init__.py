"""Train a SentencePiece model on Chinese text.

In:  a folder, prefix or artifact of text files (.txt, a line a sample, or .jsonl with a `text` field).
Out: a tokenizer artifact: `tokenizer.model` (BPE, byte fallback) and `report.json` (tokens per character, coverage,
     examples).
"""
