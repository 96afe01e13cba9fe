"""Calibration: streaming statistics of activations, in constant memory, to static per-tensor scales.

An observer keeps a histogram of |x| whose range doubles when a larger value comes, so its memory does not depend on how
many samples it sees. Padding is excluded: pad positions hold values that no real input produces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nxm_export.errors import DataError

BINS = 4096
_LEAST_RANGE, _RANGES = 0.1, 91  # of the largest |x|: where ranges that cut something off begin, and how many are tried
_COUNTED = 2**24  # values at once: torch counts in float32, which goes no further by ones


class HistogramObserver:
    """Histogram of |x|, on the device of the first tensor it sees. `where` is what reads or writes x, for errors."""

    def __init__(self, where: str = "the model") -> None:
        self.where = where
        self.counts: Tensor | None = None  # (BINS,) float64
        self.limit = 0.0  # upper edge of the last bin
        self.largest = 0.0

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Add the values of `x`, any shape; empty tensors count nothing."""
        magnitude = x.detach().abs().flatten().float()
        if magnitude.numel() == 0:
            return
        largest = float(magnitude.max())
        if largest != largest or largest == float("inf"):
            raise DataError(
                f"{self.where}: calibration saw a NaN or infinite activation; the model is broken before compression"
            )
        self.largest = max(self.largest, largest)
        if self.counts is None:
            self.limit = largest if largest > 0 else 1.0
            self.counts = torch.zeros(BINS, dtype=torch.float64, device=x.device)
        while largest > self.limit:  # double the range: two old bins become one
            folded = self.counts.reshape(-1, 2).sum(dim=1)
            self.counts = torch.cat([folded, torch.zeros_like(folded)])
            self.limit *= 2
        for part in torch.split(magnitude, _COUNTED):
            self.counts += torch.histc(part, bins=BINS, min=0.0, max=self.limit).double()

    def percentile(self, q: float) -> float:
        """The value that `q` percent of the observed |x| do not exceed (upper edge of its bin)."""
        if self.counts is None:
            raise DataError(
                f"{self.where}: calibration saw no activation; give at least one sample that is not padding"
            )
        total = self.counts.cumsum(0)
        bin_ = int(torch.searchsorted(total, total[-1] * (q / 100.0)))
        return min((min(bin_, BINS - 1) + 1) * self.limit / BINS, self.largest) or self.limit / BINS

    def scale(self, qmax: int, q: float | None) -> float:
        """Static symmetric scale: the `q`-th percentile of |x| maps to `qmax`; None: the scale of least squared
        error."""
        return self._least_error_scale(qmax) if q is None else self.percentile(q) / qmax

    def _least_error_scale(self, qmax: int) -> float:
        """The scale, of `_RANGES` that map the largest |x| or less to `qmax`, whose rounding and clipping together have
        the least squared error over all that was observed."""
        scales = torch.linspace(_LEAST_RANGE, 1.0, _RANGES, dtype=torch.float64) * (self.percentile(100.0) / qmax)
        assert self.counts is not None
        values = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.limit / BINS)
        restored = torch.round(values / scales[:, None]).clamp_(max=qmax) * scales[:, None]
        errors = (restored - values).square() @ self.counts.cpu()  # (ranges,)
        return float(scales[errors.argmin()])
