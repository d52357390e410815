"""What pretrain and finetune share: one file a concern. `options` and `report` are light; the rest imports torch."""
