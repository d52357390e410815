"""Extend a vocabulary by Chinese pieces, and the model by their embedding rows.

In:  a Hugging Face model with its tokenizer. Of SentencePiece: none, one or several Chinese SentencePiece models. A
     byte-level one: what train_tokenizer made of its merges.
Out: an hf-model artifact: the model with more rows in embed_tokens and lm_head (their file alone is written anew), and
     the extended tokenizer as tokenizer.json and tokenizer_config.json, with tokenizer.model or, where the base has
     them, vocab.json and merges.txt.
"""
