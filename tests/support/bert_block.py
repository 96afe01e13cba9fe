"""A stand-in for one block of BERT: linear layers under its names, and nothing else."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from nxm_export.contract.families import FAMILIES

CONFIG = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
FAMILY = FAMILIES["bert"]


class Block(nn.Module):
    """A stand-in with the module names of one BERT block; only the linear layers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = nn.Module()
        self.bert.encoder = nn.Module()
        layer = nn.Module()
        layer.attention = nn.Module()
        layer.attention.self = nn.Module()
        layer.attention.output = nn.Module()
        layer.intermediate, layer.output = nn.Module(), nn.Module()
        for name in ("query", "key", "value"):
            setattr(layer.attention.self, name, nn.Linear(8, 8))
        layer.attention.output.dense = nn.Linear(8, 8)
        layer.intermediate.dense, layer.output.dense = nn.Linear(8, 16), nn.Linear(16, 8)
        self.bert.encoder.layer = nn.ModuleList([layer])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        layer: Any = self.bert.encoder.layer[0]  # type: ignore[index, union-attr]  # of modules put together here
        x = torch.stack([input_ids.float() * (i + 1) for i in range(8)], dim=-1)
        attended = layer.attention.self
        x = layer.attention.output.dense(attended.query(x) + attended.key(x) + attended.value(x))
        return cast(Tensor, layer.output.dense(layer.intermediate.dense(x).relu()))
