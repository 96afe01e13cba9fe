"""Random tensors that are the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers of this shape, float32, by the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(samples: int, size: int, seed: int) -> Tensor:
    """Normal numbers (samples, size) whose columns are mixed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, size, generator=generator) @ torch.randn(size, size, generator=generator)
