"""Second-order one-shot pruning: the best start that costs no training.

For a linear layer y = W x the squared output error of changing W to Z is ``tr((W - Z) H (W - Z)^T)`` with
``H = E[x x^T]``. Pruning one weight and adjusting the ones after it to make up for it is the Optimal Brain Surgeon
(Hassibi & Stork 1993), done column by column for N:M groups as in SparseGPT (Frantar & Alistarh 2023): within each
group of M columns the weights with the smallest ``w**2 / [H^-1]_jj`` go, and their error is spread over the columns to
come.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressors.projections import nm_mask
from nxm_export.contract.plan import NMPattern

_BLOCK = 128  # columns whose updates to the rest are applied together, for speed only


@torch.no_grad()
def prune(weight: Tensor, hessian: Tensor, pattern: NMPattern, damping: float = 0.01) -> Tensor:
    """An N:M matrix (out, in) close to `weight` in output error under `hessian` (in, in), errors compensated.

    `damping`, times the mean diagonal of the hessian, keeps the inverse finite for inputs that hardly vary.
    """
    w = weight.float().clone()
    columns = w.shape[1]
    inverse = inverse_factor(hessian, damping)  # upper (in, in)
    block = max(1, _BLOCK // pattern.m) * pattern.m
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros_like(w[:, start:stop])
        keep = torch.ones_like(w[:, start:stop], dtype=torch.bool)
        for j in range(start, stop):
            if j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                scores = w[:, group].square() / inverse.diagonal()[group].square()
                keep[:, j - start : j - start + pattern.m] = nm_mask(scores, pattern)
            pruned = w[:, j] * keep[:, j - start]
            error = (w[:, j] - pruned) / inverse[j, j]
            w[:, j:stop] -= error[:, None] * inverse[j, j:stop]
            w[:, j] = pruned
            errors[:, j - start] = error
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return w.to(weight.dtype)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped hessian."""
    h = hessian.double()
    h = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (damping * h.diagonal().mean()).clamp(min=1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
