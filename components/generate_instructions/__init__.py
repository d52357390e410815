"""Instruction data: written by an OpenAI-compatible model, or imported from public data sets.

In:  the address and name of a model (its key in OPENAI_API_KEY or a file), items as examples or to keep clear of; or
     data sets: Alpaca JSON or JSONL, ShareGPT, Parquet, the Hub's.
Out: an instructions artifact: `instructions.json` (an Alpaca list), every item checked and none twice, `card.json` and
     `report.html` (counts, lengths, topics, what was left out, cost).
"""
