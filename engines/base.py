"""What every runtime offers: ``build`` an engine directory from ONNX, ``load`` it, ``inspect`` it.

A backend is a module with those three functions, named in `BACKENDS` and imported when it is asked for. An engine
directory works when copied alone::

    model.engine or model.onnx   what the runtime reads, in its own format
    passport.json                what made it: hashes, versions, device, profiles, plan, command
    spec.json, tokenizer.json    what goes in and out
"""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from nxm_export.contract.io_spec import SPEC_FILE, TOKENIZER_FILE, IOSpec, load_spec
from nxm_export.errors import EngineError

BACKENDS = {
    "ort": "engines.ort.backend",
    "openvino": "engines.openvino.backend",
    "trt": "engines.tensorrt.backend",
    "trt_rtx": "engines.tensorrt.rtx_backend",
}
CPU_BACKENDS = ("ort", "openvino")  # what they run is an ONNX file, and their `load` takes `threads`


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
                    f"profile sizes must rise from 1: minimum {self.minimum}, optimum {self.optimum}, maximum {self.maximum}"
                )


@dataclass(frozen=True)
class Binding:
    """An input or output as the engine file itself has it: NumPy's name of its type, and -1 where a size is free.

    `Engine.run` hides the type (int64 in, float32 out); whoever feeds the file by other means must not.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BuildOptions:
    """What a build may be told. `threads` is for `CPU_BACKENDS`, the rest for TensorRT.

    `profiles` default to one for everything; `sparse` allows sparse kernels; `level` is the builder's optimization level
    (0 to 5, None = TensorRT's own); `workspace_bytes` limits scratch memory; `build_route` is passed on where the builder
    lists its options as public. `timing_cache` is read and extended: a damaged or foreign one is an error with
    `require_timing_cache`, else a new one is begun; without one, ``timing.cache`` beside the engine is new.
    `twin` names the engine's part in a comparison (see `nxm build --twins`).
    """

    threads: int | None = None
    profiles: Sequence[Profile] = ()
    sparse: bool = True
    level: int | None = None
    workspace_bytes: int | None = None
    build_route: str | None = None
    timing_cache: Path | None = None
    require_timing_cache: bool = False
    twin: str | None = None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None


class Engine(Protocol):
    """A loaded engine. Use it as a context manager; `run` returns arrays that the caller owns."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    clock: str

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, float32, for int64 inputs (batch, sequence) by name."""
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


class Closing:
    """The context manager half of `Engine`, and timing by the wall clock."""

    clock = "wall clock"

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

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def backend(name: str) -> Any:
    """The module of a backend; raises `EngineError` with the list. What it needs is imported when it is used."""
    if name not in BACKENDS:
        raise EngineError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return importlib.import_module(BACKENDS[name])


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
    for name in (SPEC_FILE, TOKENIZER_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def require_feeds(engine: Engine, feeds: Mapping[str, np.ndarray]) -> None:
    """Raise `EngineError` unless `feeds` are exactly the engine's inputs, as int64 arrays of one shape (batch, sequence)."""
    if set(feeds) != set(engine.inputs):
        raise EngineError(f"the engine takes {', '.join(engine.inputs)}; got {', '.join(feeds) or 'nothing'}")
    shapes = {array.shape for array in feeds.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or 0 in next(iter(shapes)):
        raise EngineError(f"inputs must share one non-empty shape (batch, sequence); got {sorted(shapes)}")
    wrong = [name for name, array in feeds.items() if array.dtype != np.int64]
    if wrong:
        raise EngineError(f"inputs must be int64; {', '.join(wrong)} is {feeds[wrong[0]].dtype}")


def require_within(spec: IOSpec | None, feeds: Mapping[str, np.ndarray]) -> None:
    """Raise `EngineError` for sequences and values beyond what the model has positions and rows for, where that is known."""
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
