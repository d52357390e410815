"""Adapters merged into a model that is loaded, as merge_adapters merges them into its files: the same reader, the same
arithmetic, the same bits. Memory: one tensor of the model three times in float32.
"""

from typing import Any

from zhllama.errors import InputError
from zhllama.weights.adapter import Adapter, Change


def merge_into(model: Any, adapter: Adapter, rows: int, tied: bool) -> bool:
    """Changes the weights of a model of transformers, which has `rows` rows in its embeddings afterwards, and one table
    for embedding and head where it had and they are still `tied`. Whether any weight is another one than before.
    InputError for numbers that are not finite."""
    import torch

    had = model.get_input_embeddings().weight.shape[0]
    changed = rows != had
    if changed:
        # the adapter overwrites every row, so the new ones may begin anyhow; the default would take minutes
        model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    if not tied and head.weight is model.get_input_embeddings().weight:
        # they are one no more
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    for name in sorted(adapter.touched):
        weight, change = model.get_parameter(name).detach(), Change(adapter, name)
        before = None if changed else weight.clone()
        brought = None
        if change.replaced is not None:
            whole = adapter.read(change.replaced)
            if adapter.scale != 1:
                brought, whole = whole, whole[had:]
            weight[len(weight) - len(whole) :] = whole
        values = weight.float()
        change.apply(0, weight, values, torch.empty_like(values), brought)
        if not torch.isfinite(weight).all():
            raise InputError(
                f"{adapter.where}: {name} is not finite after the merge; the adapter holds NaN or overflows "
                f"{str(weight.dtype).removeprefix('torch.')}, train it again"
            )
        changed = before is None or not torch.equal(before, weight)
    return changed
