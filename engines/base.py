"""What every runtime offers: ``build`` an engine directory from ONNX, ``load`` it, ``inspect`` it.

A backend is a module with those three functions (see `Backend`), named in `BACKENDS` and imported when it is asked
for. What only some backends can do stands in their `BackendCapabilities`. An engine directory works when copied
alone::

    model.engine or model.onnx   what the runtime reads, in its own format
    passport.json                what made it: hashes, versions, device, profiles, plan, command
    spec.json, tokenizer.json    what goes in and out
    origin.json                  which checkpoint it was made from
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, cast, runtime_checkable

import numpy as np

from nxm_export.contract.choices import HINT, HINTS, SPARSE_USE, SPARSE_USES
from nxm_export.contract.io_spec import SPEC_FILE, TOKENIZER_FILE, IOSpec, load_spec
from nxm_export.contract.origin import ORIGIN_FILE
from nxm_export.contract.token_budget import MAX_BATCH_TOKENS
from nxm_export.errors import EngineError
from nxm_export.progress import Progress, silent

if TYPE_CHECKING:
    from typing_extensions import Self

    from engines.passport import EnginePassport
    from engines.sparsity.sparsity_report import SparsityReport

MOST_SHAPES = 16  # that an engine keeps compiled: each takes memory and time to load
MOST_THREADS = 65536
COMPANIONS = (SPEC_FILE, TOKENIZER_FILE)  # what is served beside the engine: the passport has their hashes
BACKENDS = {
    "ort": "engines.ort.backend",
    "openvino": "engines.openvino.backend",
    "trt": "engines.tensorrt.backend",
    "trt_rtx": "engines.tensorrt.rtx_backend",
    "cusparselt": "engines.cusparselt.backend",
}


@dataclass(frozen=True)
class BackendCapabilities:
    """What a backend's engines run on, and which optional powers it has.

    `threads`: building and loading take a number of CPU threads. `runs_onnx`: the engine file is an ONNX graph.
    `throughput`: engines can be loaded for throughput (see `LoadOptions`), and are a `ParallelEngine` then.
    `holds_scores`: a run holds attention's scores, which grow with the square of the length.
    `optimization_profiles`: engines are built for ranges of shapes. `sparse_kernels`: 2:4 weights can run on sparse
    kernels, and an engine directory has the facts of a sparsity report. `layer_times`: a loaded engine is a
    `LayerTimedEngine`. `profiled_kernels`: the module is a `ProfiledBackend`, and its facts have the sparsity report.
    `always_sparse`: a build can be told to use sparse kernels even where dense ones are faster. `compiled_shapes`:
    engines can keep models compiled for shapes known ahead (`BuildOptions.shapes`).
    """

    device: Literal["cpu", "gpu"]
    threads: bool = False
    throughput: bool = False
    runs_onnx: bool = False
    holds_scores: bool = False
    optimization_profiles: bool = False
    sparse_kernels: bool = False
    layer_times: bool = False
    profiled_kernels: bool = False
    always_sparse: bool = False
    compiled_shapes: bool = False


@dataclass(frozen=True)
class Profile:
    """Shapes (batch, sequence) that an engine is built for: the least, the best, and the most."""

    minimum: tuple[int, int]
    optimum: tuple[int, int]
    maximum: tuple[int, int]

    def __post_init__(self) -> None:
        for low, middle, high in zip(self.minimum, self.optimum, self.maximum, strict=True):
            if not 1 <= low <= middle <= high:
                raise EngineError(
                    f"profile sizes must rise from 1: minimum {self.minimum}, optimum {self.optimum}, "
                    f"maximum {self.maximum}"
                )


@dataclass(frozen=True)
class Binding:
    """An input or output as the engine file itself has it: NumPy's name of its type, and -1 where a size is free.

    `Engine.run` hides the type (int64 in, float32 out); whoever feeds the file by other means must not.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_tokens(self) -> bool:
        """True for integers of (batch, sequence): `Engine.run` takes them as int64, whichever integers the file has."""
        return len(self.shape) == 2 and self.dtype in ("int64", "int32")

    def __str__(self) -> str:
        sizes = ", ".join("?" if size < 0 else str(size) for size in self.shape)
        return f"{self.name} of {self.dtype} ({sizes})"


@dataclass(frozen=True)
class BuildOptions:
    """What a build may be told. `threads` is for backends with `BackendCapabilities.threads`, `shapes` for those with
    `BackendCapabilities.compiled_shapes`, the rest for TensorRT.

    `shapes` are those (batch, sequence) that matter: the engine keeps a model compiled for each, beside the one that
    takes any. Raises `EngineError` for sizes below 1, for more than `MOST_SHAPES`, and for a number of threads that no
    machine has.
    `profiles` default to some that together take every length, with at most `max_batch_tokens` (rows x tokens) in a
    batch; `sparse` is where sparse kernels may run: ``auto`` where they are faster, ``never`` nowhere, ``always``, for
    backends with `BackendCapabilities.always_sparse`, for every 2:4 matrix that has one, even where dense is faster;
    `level` is the builder's optimization
    level (0 to 5, None = TensorRT's own); `workspace_bytes` limits scratch memory; `build_route` is passed on where
    the builder lists its options as public. `timing_cache` is read and extended: a damaged or foreign one is an error
    with `require_timing_cache`, else a new one is begun; without one, ``timing.cache`` beside the engine is new.
    `fuse` lets ``cusparselt`` compile what lies between products (torch.compile) when it is loaded.
    `oldest_onnxruntime` is for ``ort``: the oldest version, such as ``1.19``, that is to load the engine (None = the
    installed one).
    `twin` names the engine's part in a comparison (see `nxm build --twins`).
    """

    threads: int | None = None
    shapes: Sequence[tuple[int, int]] = ()
    profiles: Sequence[Profile] = ()
    max_batch_tokens: int = MAX_BATCH_TOKENS
    sparse: Literal["auto", "always", "never"] = SPARSE_USE
    fuse: bool = True
    oldest_onnxruntime: str | None = None
    level: int | None = None
    workspace_bytes: int | None = None
    build_route: str | None = None
    timing_cache: Path | None = None
    require_timing_cache: bool = False
    twin: str | None = None
    progress: Progress = silent

    def __post_init__(self) -> None:
        _require_threads(self.threads)
        if self.sparse not in SPARSE_USES:
            raise EngineError(f"sparse kernels are for {', '.join(SPARSE_USES)}, got {self.sparse!r}")
        different = dict.fromkeys(self.shapes)
        empty = next((shape for shape in different if min(shape) < 1), None)
        if empty is not None:
            raise EngineError(f"the shape {empty[0]}x{empty[1]} holds nothing; sizes begin at 1")
        if len(different) > MOST_SHAPES:
            raise EngineError(
                f"{len(different)} shapes were given, and an engine keeps {MOST_SHAPES} compiled at most, since each "
                "takes memory and time to load; give those that are run most (any other shape runs, too)"
            )


def _require_threads(threads: int | None) -> None:
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise EngineError(
            f"an engine runs on 1 to {MOST_THREADS} threads, got {threads}; leave them out for all cores, or for those "
            "it was built with"
        )


@dataclass(frozen=True)
class LoadOptions:
    """How an engine is loaded. `threads` overrides the number that it was built with, where its backend has
    `BackendCapabilities.threads`; on a GPU there are none to choose.

    `hint` is what the threads are for: ``latency`` is one run at a time, on all of them; ``throughput`` is as many runs
    at a time as threads, each on one, where the backend has `BackendCapabilities.throughput`. Raises `EngineError` for
    another hint, and for a number of threads that no machine has.
    """

    threads: int | None = None
    hint: str = HINT

    def __post_init__(self) -> None:
        _require_threads(self.threads)
        if self.hint not in HINTS:
            raise EngineError(f"unknown hint {self.hint!r}; choose one of {', '.join(HINTS)}")

    def runs(self, built_with: int | None) -> tuple[int, int]:
        """(runs at once, threads of each) of an engine on the CPU that was built with a number of threads; without any
        number, all cores of this process."""
        threads = self.threads or built_with or len(os.sched_getaffinity(0))
        return (threads, 1) if self.hint == "throughput" else (1, threads)


class Engine(Protocol):
    """A loaded engine. Use it as a context manager; `run` returns arrays that the caller owns."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    clock: str

    @property
    def input_bindings(self) -> tuple[Binding, ...]:
        """The inputs as the engine file has them."""
        ...

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, float32, for inputs by name: tokens are int64 (batch, sequence), others as their binding."""
        ...

    def timer(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """A function that runs `feeds` once and returns the milliseconds it took, by the clock that `clock` names."""
        ...

    def close(self) -> None:
        """Free what the engine holds; calling it again does nothing."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class ParallelEngine(Protocol):
    """A loaded engine whose `Engine.run` may be called in `runs_at_once` threads at a time, which keep it busy."""

    runs_at_once: int


@runtime_checkable
class ShapedEngine(Protocol):
    """A loaded engine that may run inputs in a larger shape, which it has compiled or captured, and cut its outputs."""

    def compiled_shape(self, feeds: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
        """The compiled shape (batch, sequence) that runs `feeds`; None: they run as they are."""
        ...


@runtime_checkable
class LayerTimedEngine(Protocol):
    """The optional power of a loaded engine that `BackendCapabilities.layer_times` speaks of."""

    def layer_times(self, feeds: Mapping[str, np.ndarray], rounds: int) -> dict[str, float]:
        """Mean milliseconds of every layer of the engine, over `rounds` runs of `feeds`."""
        ...


@runtime_checkable
class QueuedEngine(Protocol):
    """A loaded engine on a GPU: it can be given runs before the last one has ended, and keeps them in a queue."""

    def queue_timer(self, feeds: Mapping[str, np.ndarray], runs: int) -> Callable[[], float]:
        """A function that queues `runs` runs of `feeds`, already on the GPU, waits for the last, and returns the
        milliseconds of all by `Engine.clock`."""
        ...

    def launches_graph(self, feeds: Mapping[str, np.ndarray]) -> bool:
        """Whether a run of this shape, which a timer was made for, is launched as one CUDA graph, not kernel by
        kernel."""
        ...


class EngineFacts(Protocol):
    """What `Backend.inspect` returns: facts of an engine directory, a frozen dataclass of each backend's own."""

    @property
    def backend(self) -> str:
        """The name of the backend in `BACKENDS`."""
        ...

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``."""
        ...


class Backend(Protocol):
    """A module of `BACKENDS`."""

    @property
    def NAME(self) -> str:  # noqa: N802  (a constant of the module)
        """Its name in `BACKENDS`."""
        ...

    @property
    def CAPABILITIES(self) -> BackendCapabilities:  # noqa: N802  (a constant of the module)
        """What its engines run on and what it can do beyond the three functions."""
        ...

    def build(self, onnx: str | Path, out: Path, options: BuildOptions = ...) -> EnginePassport:
        """Write an engine directory into the existing directory `out`; returns its passport.

        Raises `EngineError`, `EngineUnavailable` where the runtime is missing, and `ArtifactError` for a file that is
        no ONNX graph.
        """
        ...

    def load(self, directory: str | Path, options: LoadOptions = ...) -> Engine:
        """Load an engine directory, after checking its hash and what its passport requires of the machine."""
        ...

    def inspect(self, directory: str | Path) -> EngineFacts:
        """Facts of an engine directory."""
        ...


@runtime_checkable
class ProfiledFacts(Protocol):
    """Facts with a sparsity report of the backend's own."""

    @property
    def sparsity(self) -> SparsityReport:
        """What is known of every matrix."""
        ...

    @property
    def profiled(self) -> object | None:
        """The run that the report rests on, None where none was profiled."""
        ...


@runtime_checkable
class ProfiledBackend(Protocol):
    """The optional power of a backend that `BackendCapabilities.profiled_kernels` speaks of."""

    def profile(self, directory: str | Path) -> None:
        """Profile a run of an engine, and write the names of its kernels beside it, where `inspect` reads them."""
        ...


class Closing:
    """The context manager half of `Engine`, timing by the wall clock, and inputs that are tokens of any shape."""

    clock = "wall clock"
    inputs: tuple[str, ...]

    @property
    def input_bindings(self) -> tuple[Binding, ...]:
        """The inputs as the engine file has them."""
        return tuple(Binding(name, "int64", (-1, -1)) for name in self.inputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        raise NotImplementedError

    def timer(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """A function that runs `feeds` once and returns the milliseconds between call and result."""

        def once() -> float:
            began = time.perf_counter()
            self.run(feeds)
            return (time.perf_counter() - began) * 1e3

        return once

    def close(self) -> None:
        """Free what the engine holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def backend(name: str) -> Backend:
    """The module of a backend; raises `EngineError` with the list. What it needs is imported when it is used."""
    if name not in BACKENDS:
        raise EngineError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return cast(Backend, importlib.import_module(BACKENDS[name]))  # tests hold every module against the protocol


def cpu_backends() -> tuple[str, ...]:
    """The names of the backends whose engines run on the CPU, in the order of `BACKENDS`."""
    return tuple(name for name in BACKENDS if backend(name).CAPABILITIES.device == "cpu")


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this project in a process of its own, from where this process has it.

    ``python -m`` would look in the working directory first, and a run directory has folders named like packages.
    """
    root = str(Path(__file__).parent.parent)
    code = (
        f"import runpy, sys; sys.path[0] = {root!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", code, *arguments]


def spec_of(directory: Path) -> IOSpec | None:
    """The spec of an engine directory, or None for an engine that was built from an ONNX file without one."""
    return load_spec(directory) if (directory / SPEC_FILE).is_file() else None


def copy_companions(source: Path, out: Path) -> None:
    """Copy what makes an engine directory self-contained from the graph's directory; an ONNX file alone has none."""
    for name in (*COMPANIONS, ORIGIN_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def require_feeds(engine: Engine, feeds: Mapping[str, np.ndarray]) -> None:
    """Raise `EngineError` unless `feeds` are the engine's inputs: tokens as int64 arrays of one shape (batch,
    sequence), others in their own type, and all in the sizes that the engine has fixed."""
    if set(feeds) != set(engine.inputs):
        raise EngineError(f"the engine takes {', '.join(engine.inputs)}; got {', '.join(feeds) or 'nothing'}")
    bindings = engine.input_bindings
    tokens = {binding.name: feeds[binding.name] for binding in bindings if binding.is_tokens}
    shapes = {array.shape for array in tokens.values()}
    if tokens and (len(shapes) != 1 or len(next(iter(shapes))) != 2 or 0 in next(iter(shapes))):
        raise EngineError(f"inputs must share one non-empty shape (batch, sequence); got {sorted(shapes)}")
    wrong = [name for name, array in tokens.items() if array.dtype != np.int64]
    if wrong:
        raise EngineError(f"inputs must be int64; {', '.join(wrong)} is {feeds[wrong[0]].dtype}")
    for binding in bindings:
        array, sizes = feeds[binding.name], binding.shape
        fits = len(sizes) == array.ndim and all(
            size in (-1, given) for size, given in zip(sizes, array.shape, strict=True)
        )
        if not fits or not (binding.is_tokens or array.dtype.name == binding.dtype):
            raise EngineError(f"the engine takes {binding}; got {array.dtype} of shape {array.shape}")


def as_bound(binding: Binding, array: np.ndarray) -> np.ndarray:
    """`array` in the type that the engine file has: some take tokens as int32. Raises `EngineError` for a value that
    does not fit."""
    if not binding.is_tokens or binding.dtype == array.dtype.name:
        return array
    if array.size and (array.max() > 2**31 - 1 or array.min() < -(2**31)):
        raise EngineError(f"{binding.name} holds values beyond 32 bits, which this engine's input has")
    return array.astype(binding.dtype)


def require_within(spec: IOSpec | None, feeds: Mapping[str, np.ndarray]) -> None:
    """Raise `EngineError` for sequences and values beyond what the model takes, where that is known."""
    if spec is None:
        return
    require_length(spec.max_length, feeds)
    for name, array in feeds.items():
        limit = spec.limits.get(name)
        if limit is not None and (array.min() < 0 or array.max() >= limit):
            raise EngineError(f"{name} holds {array.min()} to {array.max()}, and the model takes 0 to {limit - 1}")


def require_length(limit: int, feeds: Mapping[str, np.ndarray]) -> None:
    """Raise `EngineError` for sequences longer than `limit`, the model's positions."""
    length = next(iter(feeds.values())).shape[1]
    if length > limit:
        raise EngineError(f"a sequence of {length} tokens is longer than the model's {limit}; truncate it")
