"""Continue the pre-training of a model on text.

In:  a model, a packed dataset made with its tokenizer, and for stage lora perhaps an adapter to go on from.
Out: stage embeddings: the model with new embeddings (hf-model); stage lora: an adapter. Each with `metrics.jsonl` and
     `report.html`, its loss curve.
"""
