"""Attention for models that make their masks themselves: what is masked gets a finite number added to its scores.

transformers masks with the smallest number of the type. In half precision that overflows to minus infinity beside a
negative score, and a row of which everything is masked is then no number. A head that divides by how many tokens there
are gets no number for a row of padding alone, which batches are filled up with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from nxm_export.hf.attention_choice import choose_attention

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MASKED = -1e4  # added to the attention scores of padding: finite in float16, and exp() of it is 0
_NAME = "nxm_finite"  # of both functions in transformers


def use_finite_masks(model: torch.nn.Module) -> None:
    """Let `model` attend by plain products in the type of its operands, under masks of 0 and `MASKED`, windows among
    them."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, cast("Callable[..., object]", _mask))
    choose_attention(model, _NAME)


def read_rows_of_padding(model: torch.nn.Module) -> None:
    """Let a model whose head takes the mean of the tokens read the first token of a row that is padding alone, so that
    its output is a number. No other row changes, and no other model."""
    if getattr(getattr(model, "config", None), "classifier_pooling", None) == "mean":
        model.register_forward_pre_hook(_with_a_token, with_kwargs=True)


def _with_a_token(
    _: torch.nn.Module, arguments: tuple[object, ...], named: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The same call with a mask (batch, sequence) of which every row has a token."""
    import torch

    mask = named.get("attention_mask")
    if not isinstance(mask, torch.Tensor):
        return arguments, named
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    empty = mask.sum(1, keepdim=True) == 0
    return arguments, {**named, "attention_mask": mask + (empty & first).to(mask.dtype)}


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
