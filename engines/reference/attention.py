"""Attention of the PyTorch reference, written out, some queries at a time.

The scores of all queries at once are rows x heads x length^2 numbers: 6.4 GB in float64 for one row of 8192 tokens and
12 heads. A query's probabilities depend on its own scores alone, so blocks of queries give the same values in memory
that does not grow with the length. Where a boolean mask leaves a block of queries only keys side by side, as a window
does, no other key is multiplied: its probability would be exactly 0. All is computed in the type of the operands: some
families compute softmax in float32 whatever the type. INT8 attention multiplies what `change_operands` makes of each
operand.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from nxm_export.contract.encoder_family import OPERANDS
from nxm_export.hf.attention_choice import choose_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    Change = Callable[[Tensor], Tensor]

NAME = "nxm_reference"
SCORES = 2**22  # numbers of a block: 32 MB in float64
PROBABILITIES = "probabilities"  # the operand that attention computes itself
_CHANGES = "nxm_changes"


def use_blocked_attention(model: nn.Module) -> None:
    """Let the attention of a model whose attention can be chosen run in blocks of queries."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, blocked_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # boolean, an eighth of the additive ones in float64
    choose_attention(model, NAME)


def change_operands(attention: nn.Module, changes: Mapping[str, Change]) -> None:
    """Let `changes` make what an attention module multiplies: its operands (`OPERANDS`), and its `PROBABILITIES`.

    They are kept with the module: several references are loaded at once, and the function is registered for all.
    """
    setattr(attention, _CHANGES, changes)


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """What attention gives, (rows, length, heads, features), for queries, keys and values of (rows, heads, length,
    features); the parameters are those that transformers passes. The mask is boolean, or added to the scores."""
    import torch

    rows, heads, length, features = query.shape
    scale = features**-0.5 if scaling is None else scaling
    changes: Mapping[str, Change] = getattr(module, _CHANGES, {})

    def changed(operand: str, x: Tensor) -> Tensor:
        return changes[operand](x) if operand in changes else x

    query, key, value = (changed(operand, x) for operand, x in zip(OPERANDS, (query, key, value), strict=True))
    keys, values, read = key.contiguous().transpose(-1, -2), value.contiguous(), key.shape[2]
    step = min(length, max(1, SCORES // (rows * heads * read)))
    # Written to the same memory every time: of what is freed between small results, the C library gives little back.
    all_scores, all_probabilities = (query.new_empty(rows * heads * step * read) for _ in range(2))
    context = query.new_empty((rows, heads, length, value.shape[-1]))
    for start in range(0, length, step):
        size = min(step, length - start)
        mask = None if attention_mask is None else attention_mask[:, :, start : start + size]
        seen = _seen(mask, read)
        shape = (rows, heads, size, seen.stop - seen.start)
        scores, probabilities = (memory[: math.prod(shape)].view(shape) for memory in (all_scores, all_probabilities))
        torch.matmul(query[:, :, start : start + size], keys[..., seen], out=scores).mul_(scale)
        if mask is not None:
            if mask.dtype == torch.bool:
                scores.masked_fill_(~mask[..., seen], torch.finfo(scores.dtype).min)
            else:
                scores += mask
        torch.softmax(scores, -1, out=probabilities)
        context[:, :, start : start + size] = changed(PROBABILITIES, probabilities) @ values[:, :, seen]
    return context.transpose(1, 2).contiguous(), None


def _seen(mask: Tensor | None, read: int) -> slice:
    """The keys, of `read`, from the first to the last that any query of a block may see; all of them where a query may
    see none, whose probabilities are then all alike."""
    import torch

    if mask is None or mask.dtype != torch.bool or not bool(mask.any(-1).all()):
        return slice(0, read)
    columns = mask.flatten(0, -2).any(0).nonzero()
    return slice(int(columns[0]), int(columns[-1]) + 1)
