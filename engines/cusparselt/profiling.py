"""Which kernels ran: a profiled run of an engine, product by product, written beside it as ``kernels.json``.

This alone is proof of a sparse product. Products are run step by step, each in a range of its own, so that the profiler
says whose kernels they are; then the CUDA graph is replayed, and its kernels are listed, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engines.cusparselt.executor import Executor
from nxm_export.errors import ArtifactError
from nxm_export.storage.atomic import write_atomic
from nxm_export.storage.json_files import encode, read_record

if TYPE_CHECKING:
    from torch import Tensor
    from torch.autograd.profiler_util import FunctionEvent

KERNELS_FILE = "kernels.json"
KERNELS_SCHEMA = "nxm-kernels/1"
_RANGE = "nxm product "


@dataclass(frozen=True)
class KernelRun:
    """One kernel, by its name, and the microseconds that it took."""

    name: str
    microseconds: float


@dataclass(frozen=True)
class ProfiledRun:
    """One run at `shape` (batch, sequence): kernels of each product by the name of its node, and the names in a replay
    of the CUDA graph, None where there is none."""

    engine_sha256: str
    shape: tuple[int, int]
    products: Mapping[str, tuple[KernelRun, ...]]
    replayed: tuple[str, ...] | None

    @property
    def rows(self) -> int:
        """Of a product over all tokens."""
        return self.shape[0] * self.shape[1]


def profiled(executor: Executor, feeds: Mapping[str, Tensor], shape: tuple[int, int], sha256: str) -> ProfiledRun:
    """Profile runs of `feeds`, of this shape."""
    from torch.profiler import ProfilerActivity, profile, record_function

    def around(node: str) -> AbstractContextManager[object]:
        return record_function(_RANGE + node)

    replay = executor.replayer(feeds)
    captured = executor.is_captured(feeds)
    executor.kernels.synchronize()
    on_gpu = [ProfilerActivity.CUDA] if executor.kernels.kind == "gpu" else []
    activities = [ProfilerActivity.CPU, *on_gpu]
    with profile(activities=activities) as steps:
        executor.step_by_step(feeds, around)
        executor.kernels.synchronize()
    names: tuple[str, ...] | None = None
    if captured:
        with profile(activities=activities) as whole:
            replay()
            executor.kernels.synchronize()
        names = tuple(sorted({event.name for event in whole.events() or [] if _on_gpu(event)}))
    return ProfiledRun(sha256, shape, products_of(steps.events() or []), names)


def products_of(events: Iterator[FunctionEvent] | list[FunctionEvent]) -> dict[str, tuple[KernelRun, ...]]:
    """The kernels of every product's range."""
    return {
        event.name.removeprefix(_RANGE): tuple(_kernels(event))
        for event in events
        if event.name.startswith(_RANGE) and not _on_gpu(event)
    }


def _kernels(event: FunctionEvent) -> Iterator[KernelRun]:
    for kernel in event.kernels:
        if not kernel.name.startswith(("Mem", "cuda", _RANGE)):  # a range is on the GPU's side of a profile, too
            yield KernelRun(kernel.name, round(float(kernel.duration), 3))
    for child in event.cpu_children:
        yield from _kernels(child)


def _on_gpu(event: FunctionEvent) -> bool:
    return str(event.device_type).endswith("CUDA")


def save_profile(directory: Path, run: ProfiledRun) -> None:
    """Write ``kernels.json`` beside an engine."""
    write_atomic(directory / KERNELS_FILE, encode(run, KERNELS_SCHEMA))


def read_profile(directory: Path, sha256: str) -> ProfiledRun | None:
    """The profiled run of an engine of this hash, None where there was none; raises `ArtifactError` for another's."""
    file = directory / KERNELS_FILE
    if not file.is_file():
        return None
    way_out = "delete it, or profile again with `nxm inspect --measure`"
    run = read_record(file, ProfiledRun, schema=KERNELS_SCHEMA, way_out=way_out)
    if run.engine_sha256 != sha256:
        raise ArtifactError(f"{file}: of another engine (sha256 {run.engine_sha256[:12]}...); {way_out}")
    return run
