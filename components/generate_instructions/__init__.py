"""Instruction data from an OpenAI-compatible model.

In:  the address and name of a model (its key in OPENAI_API_KEY), and, if wanted, items as examples.
Out: an instructions artifact, `instructions.json` (an Alpaca list), every item checked and none twice.
"""
