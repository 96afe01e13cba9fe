"""The word-embedding table in INT8: codes in [-127, 127] and one scale per row (token), the largest |value| of the row / 127.

A training step looks up its tokens' rows and rounds those; so it costs what a batch's tokens cost, however many tokens there are. The
scale follows the row, nothing is clipped, and the straight-through gradient of the rounding is 1 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nxm_export.contract.checkpoint import EMBEDDING_QMAX


def row_codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (..., features), scales (..., 1)), both float32, of table rows (..., features).

    A scale is never below the smallest normal number, which runtimes may flush to 0: rows of zeros have codes 0 and a scale.
    """
    smallest = torch.finfo(torch.float32).smallest_normal
    rows = rows.float()
    scales = rows.abs().amax(dim=-1, keepdim=True).div_(EMBEDDING_QMAX).clamp_(min=smallest)
    return torch.div(rows, scales).round_().clamp_(-EMBEDDING_QMAX, EMBEDDING_QMAX).add_(
        0.0
    ), scales  # + 0.0: no code is -0.0


class _Rounded(torch.autograd.Function):
    """Rows on their own grids; the gradient passes."""

    @staticmethod
    def forward(ctx: object, rows: Tensor) -> Tensor:
        codes, scales = row_codes(rows)
        return codes.mul_(scales)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


rounded: Callable[[Tensor], Tensor] = _Rounded.apply


class QuantEmbedding(nn.Embedding):
    """An embedding table that is deployed in INT8. Where `rounds` is off it gives its float rows, for comparison."""

    def __init__(self, table: nn.Embedding, name: str) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = (
            table.num_embeddings,
            table.embedding_dim,
            table.padding_idx,
        )
        self.max_norm, self.norm_type = table.max_norm, table.norm_type
        self.scale_grad_by_freq, self.sparse = table.scale_grad_by_freq, table.sparse
        self.weight, self.name, self.rounds = table.weight, name, True

    def forward(self, ids: Tensor) -> Tensor:
        """Rows (..., features) of token `ids` (...)."""
        rows = super().forward(ids)
        return rounded(rows) if self.rounds else rows

    @torch.no_grad()
    def baked(self) -> tuple[Tensor, Tensor]:
        """(float32 table exactly on its grid, scales (tokens,))."""
        codes, scales = row_codes(self.weight)
        return codes.mul_(scales), scales.squeeze(-1)

    def plain(self, weight: Tensor) -> nn.Embedding:
        """The same module without rounding, with `weight` in it."""
        table = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        table.weight = nn.Parameter(weight)
        return table


def quant_embeddings(model: nn.Module) -> list[QuantEmbedding]:
    """The tables of a prepared model that are deployed in INT8: one, or none."""
    return [module for module in model.modules() if isinstance(module, QuantEmbedding)]
