"""What pretrain and finetune share: one file a concern. No torch where the commands and the planner look."""
