"""The average of the weights: torch's own arithmetic, and the weights themselves untouched by it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from zhllama.training.averaging import Average, decay_after


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    made = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
    made[0].bias.requires_grad_(False)
    return made


def trainer_of(model: nn.Module, skipped: bool = False) -> Any:
    accelerator = SimpleNamespace(optimizer_step_was_skipped=skipped)
    return SimpleNamespace(model=model, model_wrapped=model, is_deepspeed_enabled=False, accelerator=accelerator)


def stepped(model: nn.Module) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight))


def test_early_on_less_is_kept():
    assert [decay_after(steps, 0.9) for steps in (0, 1, 80, 10_000)] == [0.1, 2 / 11, 0.9, 0.9]
    assert decay_after(10_000, 0.999) == 0.999


def test_it_is_what_torchs_averaged_model_is(model):
    average, theirs = Average(trainer_of(model), 0.6), AveragedModel(model)
    # torch takes the first step's weights as they are
    theirs.n_averaged += 1
    for steps in range(20):
        stepped(model)
        average.step()
        theirs.multi_avg_fn = get_ema_multi_avg_fn(min(0.6, (1 + steps) / (10 + steps)))
        theirs.update_parameters(model)
    expected = {name: weight for name, weight in theirs.module.named_parameters() if weight.requires_grad}
    found = average.whole()
    assert found.keys() == expected.keys() == {"0.weight", "1.weight", "1.bias"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_model_has_the_average_while_it_is_measured_and_its_own_weights_again(model):
    average = Average(trainer_of(model), 0.9)
    stepped(model)
    average.step()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    whole = average.whole()
    with average.put_in():
        assert all(torch.equal(model.state_dict()[name], weight) for name, weight in whole.items())
        assert not torch.equal(model[0].weight, before["0.weight"])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_one_that_goes_on_from_a_checkpoint_is_the_same(model):
    whole = Average(trainer_of(model), 0.9)
    stepped(model)
    whole.step()
    resumed = Average(trainer_of(model), 0.9)
    resumed.restore(whole.steps, whole.whole())
    for _ in range(3):
        stepped(model)
        whole.step()
        resumed.step()
    assert all(torch.equal(weight, resumed.whole()[name]) for name, weight in whole.whole().items())


def test_a_step_that_was_skipped_is_not_averaged(model):
    average = Average(trainer_of(model, skipped=True), 0.9)
    average.on_step_end(None, None, None)
    assert average.steps == 0
