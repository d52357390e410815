"""An average of the weights over the course, which is published in place of the last ones.

torch's own arithmetic (torch.optim.swa_utils): average = decay · average + (1 − decay) · weights after each step, in
float32. Early on less is kept, (1 + n) / (10 + n) after n steps, or a short course would hardly leave its beginning: so
the average reaches back over at most a ninth of the steps. What is averaged are the optimizer's own float32 weights:
under ZeRO-1 and 2 each process keeps its part of them, and takes no step together with the others for it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback

from zhllama.errors import InputError
from zhllama.training.model import trainable, trained_weights


def decay_after(steps: int, decay: float) -> float:
    """Of the average so far, what is kept in the step that follows `steps` others."""
    return min(decay, (1 + steps) / (10 + steps))


class Average(TrainerCallback):
    """Of what a Trainer trains. To be made by all processes, when it has wrapped its model."""

    def __init__(self, trainer: Any, decay: float) -> None:
        self._trainer, self._model, self._decay = trainer, trainer.model, decay
        self._zero = trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else None
        if self._zero is not None and not hasattr(self._zero, "single_partition_of_fp32_groups"):
            raise InputError("--ema: this DeepSpeed configuration keeps its float32 weights elsewhere; give zero2")
        self._averages = [weight.clone() for weight in self._weights()]
        self.steps = 0

    def _weights(self) -> list[torch.Tensor]:
        """Where the optimizer has them: this process's part of them under ZeRO."""
        if self._zero is not None:
            return [part.detach() for part in self._zero.single_partition_of_fp32_groups]
        return [parameter.detach() for parameter in trainable(self._model).values()]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._trainer.accelerator.optimizer_step_was_skipped:
            self.step()

    def step(self) -> None:
        """Takes in the weights as a step left them."""
        get_ema_multi_avg_fn(decay_after(self.steps, self._decay))(self._averages, self._weights(), self.steps)
        self.steps += 1

    def whole(self) -> dict[str, torch.Tensor]:
        """The averages by the names of the model's parameters, float32, on the CPU. All processes call it together."""
        self._exchange()
        found = trained_weights(self._model)
        self._exchange()
        return found

    def restore(self, steps: int, whole: Mapping[str, torch.Tensor]) -> None:
        """Puts back what `whole` gave after `steps` steps. KeyError for the averages of another model."""
        self.steps = steps
        self._exchange()
        for name, parameter in trainable(self._model).items():
            if self._zero is None:
                parameter.detach().copy_(whole[name])
            else:
                from deepspeed.utils import safe_set_full_fp32_param

                safe_set_full_fp32_param(parameter, whole[name].to(parameter.device))
        self._exchange()

    @contextmanager
    def put_in(self) -> Iterator[None]:
        """The model with the averages for its weights, to be measured; then it has its own again, to the last bit. All
        processes together."""
        if self._zero is None:
            self._exchange()
            yield
            self._exchange()
            return
        whole = self.whole()
        own = {name: parameter.detach().clone() for name, parameter in trainable(self._model).items()}
        for weights in (whole, own):
            for name, parameter in trainable(self._model).items():
                parameter.detach().copy_(weights[name])
            if weights is whole:
                yield

    def _exchange(self) -> None:
        """Averages where the weights are, and the other way round."""
        for average, weight in zip(self._averages, self._weights(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
