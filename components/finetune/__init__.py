"""Tune a model on instructions.

In:  a model, a packed dataset of instructions made with its tokenizer, and perhaps an adapter to go on from.
Out: an adapter, with `metrics.jsonl` and `report.html`, its loss curve.
"""
