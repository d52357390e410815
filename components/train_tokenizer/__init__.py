"""Train a SentencePiece model on Chinese text, or more merges of a byte-level vocabulary.

In:  a folder, prefix or artifact of text files (.txt, a line a sample, or .jsonl with a `text` field).
     With `--base`, a model with a byte-level tokenizer.
Out: a tokenizer artifact: `tokenizer.model` (BPE, byte fallback), or the base's `tokenizer.json` with its new pieces;
     and `report.json` (tokens per character, coverage, examples).
"""
