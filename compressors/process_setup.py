"""A process that trains: what it does with freed memory, its threads, and the other processes of ``torchrun``."""

from __future__ import annotations

import torch

from compressors import distributed
from compressors.freed_memory import keep_freed_memory
from nxm_export.errors import notice


def prepare_process(threads: int | None = None) -> None:
    """Set up this process for training, with `threads` on the CPU (None: as many as torch takes by itself)."""
    keep_freed_memory()
    distributed.start()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus > 1 and distributed.world_size() == 1:
        notice(
            f"{gpus} GPUs are here, and one process trains on one of them; nxm compress and nxm search use all when "
            f"started with torchrun --nproc-per-node {gpus} -m nxm_export in place of nxm"
        )
    if threads is not None:
        torch.set_num_threads(threads)
