"""Run pretrain or finetune as a training job, and end as it ends.

In:  a model, a packed dataset, perhaps an adapter, the training's options, and what the job gets (nodes, GPUs, …).
Out: what the training published, under the training's own reference: an adapter (stages lora and sft) or a model
     (stage embeddings).
"""
