"""A Trainer whose checkpoints are the CheckpointManager's, and that stops where the manager says."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from zhllama.errors import InputError
from zhllama.training.checkpointing import CheckpointManager


def at_smallest_scale(error: Exception) -> bool:
    """Whether DeepSpeed says that its loss scale cannot come down any more (it has no class of its own for that)."""
    return type(error) is Exception and "loss scale already at minimum" in str(error)


class CheckpointingTrainer(Trainer):
    """A Trainer whose checkpoints are the CheckpointManager's."""

    def __init__(self, manager: CheckpointManager, **settings: Any) -> None:
        super().__init__(**settings)
        self._checkpoint_manager = manager
        manager.attach(self)
        self.add_callback(manager)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._checkpoint_manager.see_loss(loss)
        return loss

    def train(self, *arguments: Any, **named: Any) -> Any:
        try:
            return super().train(*arguments, **named)
        except Exception as error:
            if at_smallest_scale(error):
                raise InputError(self._checkpoint_manager.overflowed(self.state.global_step)) from error
            raise

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._checkpoint_manager.restore(self)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the model's weights are put back with the optimizer's, when both are wrapped."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self._checkpoint_manager.restore_random()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._checkpoint_manager.save(self)

    def _maybe_log_save_evaluate(self, *arguments: Any, **named: Any) -> None:
        """What follows a step; a cancel that came meanwhile is not left waiting for the next step's end."""
        evaluates_or_saves = self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(*arguments, **named)
        # after the last step little is left: the result is published
        more = self.state.global_step < self.state.max_steps
        if self._checkpoint_manager.stopping or (
            evaluates_or_saves and more and self._checkpoint_manager.told_to_stop()
        ):
            self._checkpoint_manager.stop(self)

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        """Nothing when no step is left, as after a checkpoint of the last one: the loop would make one more."""
        if not self.control.should_training_stop and self.state.global_step < self.state.max_steps:
            super()._run_epoch(*arguments, **named)
