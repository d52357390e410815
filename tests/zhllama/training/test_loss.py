"""The chunked loss is the naive one, in value and gradients, whatever the chunk, the labels and the type."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zhllama.data.packed import IGNORED
from zhllama.training import loss as chunked
from zhllama.training.loss import labelled, loss_kernel, score, summed_loss

WIDTH, VOCABULARY = 24, 301


def example(rows: int, seed: int = 0, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(rows, WIDTH, generator=chance) * spread).requires_grad_()
    head = torch.randn(VOCABULARY, WIDTH, generator=chance).requires_grad_()
    return hidden, head, torch.randint(0, VOCABULARY, (rows,), generator=chance)


def gradients(loss: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, of)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 90), chunk_rows=st.integers(16, 64), seed=st.integers(0, 99), spread=st.sampled_from([1, 30])
)
def test_loss_and_gradients_are_those_of_whole_logits(rows, chunk_rows, seed, spread):
    hidden, head, labels = example(rows, seed, spread)
    before = chunked.CHUNK_BYTES["cpu"]
    chunked.CHUNK_BYTES["cpu"] = chunk_rows * 4 * VOCABULARY
    try:
        found = summed_loss(hidden, head, labels)
        found_gradients = gradients(found / rows, hidden, head)
    finally:
        chunked.CHUNK_BYTES["cpu"] = before
    naive = F.cross_entropy(hidden @ head.T, labels, reduction="sum")
    torch.testing.assert_close(found, naive, rtol=1e-5, atol=1e-4)
    for one, other in zip(found_gradients, gradients(naive / rows, hidden, head), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_in_half_precision_the_gradients_stay_within_what_it_resolves(half):
    hidden, head, labels = example(200)
    naive = F.cross_entropy(hidden.to(half).float() @ head.to(half).float().T, labels, reduction="sum")
    wanted = gradients(naive, hidden, head)
    found = summed_loss(hidden.to(half), head, labels)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(naive.item(), rel=1e-2)
    for one, other in zip(gradients(found, hidden, head), wanted, strict=True):
        assert F.cosine_similarity(one.flatten().float(), other.flatten(), dim=0) > 0.999


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    hidden, head, labels = example(20)
    head.requires_grad_(False)
    summed_loss(hidden, head, labels).backward()
    assert hidden.grad is not None
    assert head.grad is None


def test_without_labels_the_loss_is_nought_and_so_are_the_gradients():
    hidden, head, labels = example(8)
    rows, wanted = labelled(hidden[None], torch.full_like(labels, IGNORED)[None])
    loss = summed_loss(rows, head, wanted)
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(loss, hidden, head))


def test_only_labelled_rows_are_used():
    hidden, _, labels = example(12)
    labels[[0, 3, 11]] = IGNORED
    rows, wanted = labelled(hidden.view(3, 4, WIDTH), labels.view(3, 4))
    kept = [1, 2, *range(4, 11)]
    assert torch.equal(rows, hidden[kept])
    assert torch.equal(wanted, labels[kept])


def test_the_score_counts_right_first_guesses():
    hidden, head, labels = example(50)
    logits = hidden @ head.T
    labels[:20] = logits[:20].argmax(dim=1)
    labels[20:] = logits[20:].argmin(dim=1)
    found = score(hidden, head, labels)
    assert (int(found.correct), found.labels) == (20, 50)
    naive = F.cross_entropy(logits, labels, reduction="sum")
    assert found.loss.item() == pytest.approx(naive.item(), rel=1e-5)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "installed", "chosen"),
    [("cuda", True, "liger"), ("cuda", False, "chunked"), ("cpu", True, "chunked")],
    ids=["GPU with Liger", "GPU without", "no GPU"],
)
def test_ligers_kernel_is_taken_on_a_gpu_where_it_is_installed(device, installed, chosen, monkeypatch):
    monkeypatch.setattr(chunked.importlib.util, "find_spec", lambda name: object() if installed else None)
    assert loss_kernel(torch.device(device)) == chosen


def test_liger_is_called_so_that_it_gives_the_same_sum_and_a_float32_gradient(monkeypatch):
    """Its kernel needs a GPU: a class of the same signature, which computes it naively, stands for it."""

    class Fused:
        def __init__(self, ignore_index: int, reduction: str, accum_dtype: torch.dtype) -> None:
            assert (ignore_index, accum_dtype) == (IGNORED, torch.float32)
            self.reduction = reduction

        def __call__(self, weight: torch.Tensor, rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            assert weight.dtype == rows.dtype
            return F.cross_entropy((rows @ weight.T).float(), target, reduction=self.reduction)

    module = types.ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = Fused
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    hidden, head, labels = example(40)
    wanted = summed_loss(hidden.bfloat16(), head, labels)
    monkeypatch.setattr(chunked, "loss_kernel", lambda device: "liger")
    found = summed_loss(hidden.bfloat16(), head, labels)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-2)
    (gradient,) = gradients(found, head)
    assert gradient.dtype == torch.float32
    assert summed_loss(hidden[:0], head, labels[:0]).item() == 0
