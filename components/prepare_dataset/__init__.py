"""Turn text or instructions into a packed dataset of token blocks.

In:  a tokenizer (or a model or adapter with one); text files, or Alpaca items and conversations as
     JSON; or several of either, weighted.
Out: a packed-dataset artifact: blocks of token ids with the documents' borders and label spans (zhllama/data/
     packed.py), a train and a validation split, and the held-out documents themselves, to evaluate on.
"""
