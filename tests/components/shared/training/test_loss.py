"""The chunked loss is the naive one, in value and gradients, whatever the chunk, the labels and the type."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from components.shared.packed import IGNORED
from components.shared.training import loss as chunked
from components.shared.training.loss import labelled, score, summed_loss

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


def test_in_bfloat16_the_gradients_stay_within_its_precision():
    hidden, head, labels = example(200)
    naive = F.cross_entropy(hidden.bfloat16().float() @ head.bfloat16().float().T, labels, reduction="sum")
    wanted = gradients(naive, hidden, head)
    found = summed_loss(hidden.bfloat16(), head, labels)
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
