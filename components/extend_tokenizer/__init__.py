"""Extend LLaMA's vocabulary by the pieces of Chinese SentencePiece models, and the model by their embedding rows.

In:  a Hugging Face model with its tokenizer.model; none, one or several Chinese SentencePiece models.
Out: an hf-model artifact: the model with more rows in embed_tokens and lm_head (their file alone is written anew), and
     the extended tokenizer as tokenizer.model, tokenizer.json and tokenizer_config.json.
"""
