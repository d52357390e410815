"""The vocabulary contract, SentencePiece, tokenizer files, prompts."""
