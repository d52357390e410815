"""Merge LoRA adapters into a model, in the order given.

In:  an hf-model and one or several adapters (peft folders: adapter_config.json, adapter_model.safetensors or .bin).
Out: an hf-model with the last adapter's tokenizer, and `report.json`: every tensor that changed, and by how much.
"""
