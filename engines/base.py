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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from nxm_export.errors import EngineError
from nxm_export.spec import SPEC_FILE, TOKENIZER_FILE

BACKENDS = {"ort": "engines.ort", "trt_rtx": "engines.trt_rtx"}


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
    """What a build may be told. `threads` is for CPU backends, `profiles` and `sparse` for TensorRT."""

    threads: int | None = None
    profiles: Sequence[Profile] = ()
    sparse: bool = True


class Engine(Protocol):
    """A loaded engine. Use it as a context manager; `run` returns arrays that the caller owns."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, float32, for int64 inputs (batch, sequence) by name."""
        ...

    def close(self) -> None:
        """Free what the engine holds; calling it again does nothing."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Closing:
    """The context manager half of `Engine`."""

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


def require_length(limit: int, feeds: Mapping[str, np.ndarray]) -> None:
    """Raise `EngineError` for sequences longer than `limit`, the model's positions."""
    length = next(iter(feeds.values())).shape[1]
    if length > limit:
        raise EngineError(f"a sequence of {length} tokens is longer than the model's {limit}; truncate it")
