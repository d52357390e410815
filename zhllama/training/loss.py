"""Cross entropy over a large vocabulary, without the logits.

Logits of 2,048 tokens over 50,000 pieces are 400 MB in float32, and their softmax and gradient as much again. Here the
head is applied to some rows at a time, and to labelled positions only (an instruction's answer is a few tokens of its
block). The gradients of a chunk are computed while its logits are there, in the forward pass: three products with the
head, where recomputing in the backward takes four. With E = exp(logits − max) and s its row sums, softmax = E/s; the
division is done on [rows, hidden] instead of [rows, vocabulary], which leaves four passes over the chunk: max,
subtract, exp, sum. On a GPU the same is done by Liger's fused kernel where liger-kernel is installed.
"""

import importlib.util
from typing import Any, Literal, NamedTuple

import torch

from zhllama.data.packed import IGNORED
from zhllama.training.hardware import CHUNK_BYTES, SMALLEST_CHUNK


class Score(NamedTuple):
    """Sums over labelled positions: of losses, of right first guesses, and how many there are."""

    loss: torch.Tensor
    correct: torch.Tensor
    labels: int


def labelled(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, block, width], [batch, block] → [n, width], [n]: the positions that have a label."""
    at = (labels != IGNORED).flatten().nonzero().squeeze(1)
    return hidden.flatten(0, 1).index_select(0, at), labels.flatten().index_select(0, at)


def loss_kernel(device: torch.device) -> Literal["liger", "chunked"]:
    """Which of the two computes the loss on a device: Liger's needs a GPU and the package liger-kernel."""
    return "liger" if device.type == "cuda" and importlib.util.find_spec("liger_kernel") else "chunked"


def summed_loss(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of −log softmax(hidden · headᵀ)[label], differentiable in `hidden` [n, width] and `head` [vocabulary,
    width]. The products run in hidden's dtype, sums and exponentials in float32."""
    loss: torch.Tensor
    # a kernel over no rows at all cannot be started
    if len(labels) and loss_kernel(hidden.device) == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32)
        loss = fused(head.to(hidden.dtype), hidden, labels)
    else:
        loss = _SummedLoss.apply(hidden, head, labels)
    return loss


@torch.no_grad()
def score(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> Score:
    """The same sum, with the right first guesses counted; no gradients."""
    total = hidden.new_zeros((), dtype=torch.float32)
    correct = hidden.new_zeros((), dtype=torch.int64)
    head = head.to(hidden.dtype)
    for rows, logits in _chunks(hidden, head):
        highest, guess = logits.max(dim=1)
        picked = logits.gather(1, labels[rows, None]).squeeze(1)
        total += (logits.sub_(highest[:, None]).exp_().sum(dim=1).log() + highest - picked).sum()
        correct += (guess == labels[rows]).sum()
    return Score(total, correct, len(labels))


def _chunks(hidden: torch.Tensor, head: torch.Tensor) -> Any:
    """(slice, logits in float32 [rows, vocabulary]) in turn, all in one buffer that the caller may overwrite."""
    vocabulary = head.shape[0]
    rows = max(SMALLEST_CHUNK, CHUNK_BYTES.get(hidden.device.type, 2**26) // (4 * vocabulary))
    buffer = torch.empty((min(rows, len(hidden)), vocabulary), dtype=torch.float32, device=hidden.device)
    for first in range(0, len(hidden), rows):
        at = slice(first, min(first + rows, len(hidden)))
        logits = buffer[: at.stop - first]
        if hidden.dtype == torch.float32:
            torch.mm(hidden[at], head.T, out=logits)
        else:
            logits.copy_(hidden[at] @ head.T)
        yield at, logits


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            total = hidden.new_zeros((), dtype=torch.float32)
            weight = head.to(hidden.dtype)
            # float32 here: the sums over chunks, and under float16 what loss scaling has not yet lifted
            to_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
            to_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if head.requires_grad else None
            for rows, logits in _chunks(hidden, weight):
                label = labels[rows]
                highest = logits.amax(dim=1, keepdim=True)
                picked = logits.gather(1, label[:, None])
                exponentials = logits.sub_(highest).exp_()
                sums = exponentials.sum(dim=1, keepdim=True)
                total += (sums.log() + highest - picked).sum()
                # d loss / d logits = exponentials / sums − one-hot(label)
                factors = exponentials.to(hidden.dtype)
                torch.div((factors @ weight).float(), sums, out=to_hidden[rows])
                to_hidden[rows] -= weight.index_select(0, label)
                if to_head is not None:
                    scaled = hidden[rows] / sums
                    if scaled.dtype == factors.dtype == torch.float32:
                        to_head.addmm_(factors.T, scaled)
                    else:
                        to_head += factors.T @ scaled.to(hidden.dtype)
                    to_head.index_add_(0, label, hidden[rows].float(), alpha=-1)
        ctx.save_for_backward(to_hidden, to_head)
        ctx.dtypes = hidden.dtype, head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        to_hidden, to_head = ctx.saved_tensors
        hidden_type, head_type = ctx.dtypes
        return (
            to_hidden.mul_(gradient).to(hidden_type),
            None if to_head is None else to_head.mul_(gradient).to(head_type),
            None,
        )
