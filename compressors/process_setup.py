"""A process that trains: what it does with freed memory, its threads, and the other processes of ``torchrun``."""

from __future__ import annotations

import torch

from compressors import distributed
from compressors.freed_memory import keep_freed_memory


def prepare_process(threads: int | None = None) -> None:
    """Set up this process for training, with `threads` on the CPU (None: as many as torch takes by itself)."""
    keep_freed_memory()
    distributed.start()
    if threads is not None:
        torch.set_num_threads(threads)
