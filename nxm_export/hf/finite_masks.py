"""Attention for models that make their masks themselves: what is masked gets a finite number added to its scores.

transformers masks with the smallest number of the type. In half precision that overflows to minus infinity beside a
negative score, and a row of which everything is masked is then no number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nxm_export.hf.protocols import HasAttention

MASKED = -1e4  # added to the attention scores of padding: finite in float16, and exp() of it is 0
_NAME = "nxm_finite"  # of both functions in transformers


def use_finite_masks(model: torch.nn.Module) -> None:
    """Let `model` attend by plain products in the type of its operands, under masks of 0 and `MASKED`, windows among
    them."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, cast("Callable[..., object]", _mask))
    cast("HasAttention", model).set_attn_implementation(_NAME)


def _mask(
    *, mask_function: Callable[..., object], dtype: torch.dtype, attention_mask: Tensor | None = None, **sizes: object
) -> Tensor:
    """(batch, 1, queries, keys) to be added to the scores; the parameters are those that transformers passes."""
    from transformers.masking_utils import eager_mask

    mask = cast("Callable[..., Tensor]", eager_mask)(
        mask_function=mask_function,
        dtype=dtype,
        attention_mask=attention_mask,
        **{**sizes, "allow_is_bidirectional_skip": False},
    )
    return mask.clamp(min=MASKED)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of query, key and value (batch, heads, sequence, head); the signature is transformers'."""
    scores = query @ key.transpose(2, 3) * scaling + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None
