"""What the processes of ``torchrun`` share: who is first, and how they agree. With one process, everything here is a
no-op.

Training is data-parallel by the Trainer; the rest of the work either is split here or done by every process alike. Only
the first process writes files.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def start() -> None:
    """Join the other processes, on the backend that the Trainer would choose (gloo on CPUs, NCCL on GPUs)."""
    if world_size() > 1:
        from accelerate import PartialState

        # Transformers passes this on under its old name; synchronising ADMM's buffers at every step would cost more
        # than the gradients do, and every process computes the same ones.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated", category=FutureWarning)
        PartialState(cpu=not torch.cuda.is_available())


def device() -> torch.device:
    """The accelerator of this process, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def wait() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        torch.distributed.barrier()


def gathered(part: Iterable[T]) -> list[T]:
    """The parts of all processes in a row, the first process's first."""
    if world_size() == 1:
        return list(part)
    parts: list[list[T]] = [[] for _ in range(world_size())]
    torch.distributed.all_gather_object(parts, list(part))
    return [item for items in parts for item in items]


def agreed(value: T) -> T:
    """The first process's value, in every process."""
    if world_size() == 1:
        return value
    shared = [value]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def summed(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, without gradient."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    torch.distributed.all_reduce(total)
    return total
