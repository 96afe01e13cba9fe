"""Which backend is the fastest here, for these shapes? Built with each, timed interleaved, and the winner is chosen.

The candidates are the installed ones of `cpu_backends()`, in that order, and ``cusparselt`` where there is a GPU for
it. With an engine on a GPU, all are timed by the wall clock between call and result, copies to the GPU and back and the
launches of kernels included. The first is the reference; another wins only when it is faster beyond noise: when the
geometric mean over the shapes of its speed-ups lies above 1, and that of the lower ends of their 95 % intervals, too. A
shape that is given twice counts twice, so that a mix of shapes can be said. A backend that can keep models compiled for
shapes does so for those that were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engines.base import (
    Binding,
    BuildOptions,
    Closing,
    Engine,
    LoadOptions,
    QueuedEngine,
    backend,
    cpu_backends,
    spec_of,
)
from engines.benchmark.latency import VOCABULARY, BenchReport, bench, feeds_for, fitted_shapes
from nxm_export.errors import EngineError, EngineUnavailable
from nxm_export.storage.json_files import to_json_object

SCHEMA = "nxm-choice/1"
SHAPES = ((1, 32), (1, 128), (8, 32), (8, 128))  # (batch, sequence), unless the user says others
ROUNDS = 15

Measure = Callable[[Mapping[str, Engine], Sequence[tuple[int, int]]], BenchReport]


@dataclass(frozen=True)
class Candidate:
    """A candidate: median milliseconds by shape, and its speed-up over the first as a geometric mean with lower and
    upper end."""

    backend: str
    latency_ms: tuple[float, ...]
    speedup: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Choice:
    """The backend that was chosen, why, and what was measured; `left_out` says why other backends were no
    candidates."""

    backend: str
    why: str
    shapes: tuple[tuple[int, int], ...]
    candidates: tuple[Candidate, ...]
    left_out: Mapping[str, str]

    def to_dict(self) -> dict[str, object]:
        """The form of the passport's ``options.auto`` and of ``--json``."""
        return to_json_object(self)


def candidates() -> tuple[str, ...]:
    """The backends that are tried here: those of the CPU, then ``cusparselt`` where nothing is missing for it."""
    from engines.cusparselt.machine import what_is_missing

    return (*cpu_backends(), *(("cusparselt",) if what_is_missing() is None else ()))


class _ByWallClock(Closing):
    """An engine that is timed between call and result, whatever its own clock is."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs

    @property
    def input_bindings(self) -> tuple[Binding, ...]:
        return self._engine.input_bindings

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._engine.run(feeds)


def build_candidates(onnx: Path, work: Path, options: BuildOptions) -> tuple[dict[str, Path], dict[str, str]]:
    """Build `onnx` with every backend of `candidates` into a directory of `work` each; (directories, why others are
    left out).

    A backend that is missing here is left out, one that refuses the graph, too, with its words; with none left the
    first one's error is raised.
    """
    built: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    errors = []
    for name in candidates():
        directory = work / name
        directory.mkdir()
        able = backend(name).CAPABILITIES.compiled_shapes
        try:
            backend(name).build(onnx, directory, options if able else replace(options, shapes=()))
        except EngineError as error:
            errors.append(error)
            left_out[name] = str(error)
        else:
            built[name] = directory
    if not built:
        real = [error for error in errors if not isinstance(error, EngineUnavailable)]
        raise (real or errors)[0]
    return built, left_out


def choose(
    engines: Mapping[str, Path],
    left_out: Mapping[str, str],
    shapes: Sequence[tuple[int, int]] | None = None,
    *,
    threads: int | None = None,
    measure: Measure | None = None,
) -> Choice:
    """Time engine directories by `measure` (`engines.benchmark.latency`, unless another is given) and say which to
    keep.

    Without `shapes` they are `SHAPES`, as far as the model takes them. An engine that cannot be loaded or run at one of
    them, or whose outputs are not finite there, is left out. Raises `EngineError` for shapes that the model does not
    take, and when no engine is left.
    """
    spec = spec_of(next(iter(engines.values())))
    vocabulary = min(VOCABULARY, spec.limits.get("input_ids", VOCABULARY)) if spec else None
    refused = dict(left_out)
    with ExitStack() as stack:
        loaded: dict[str, Engine] = {}
        for name, directory in engines.items():
            try:
                loaded[name] = stack.enter_context(backend(name).load(directory, LoadOptions(threads)))
            except EngineError as error:
                refused[name] = str(error)
        default = [(batch, min(sequence, spec.max_length) if spec else sequence) for batch, sequence in SHAPES]
        requested = tuple(shapes) if shapes else fitted_shapes(loaded.values(), default)
        for name, engine in list(loaded.items()):
            tried = (_unusable(engine, feeds_for(engine, *shape, vocabulary, 0)) for shape in dict.fromkeys(requested))
            why = next((why for why in tried if why is not None), None)
            if why is not None:
                refused[name] = why
                del loaded[name]
        if not loaded:
            reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
            raise EngineError(
                f"no backend can be timed with made-up inputs ({reasons}); build with one of them, such as --backend "
                "ort, or run `nxm compare --bisect`"
            )
        if any(isinstance(engine, QueuedEngine) for engine in loaded.values()):
            loaded = {name: _ByWallClock(engine) for name, engine in loaded.items()}
        if measure is None:
            report = bench(loaded, tuple(dict.fromkeys(requested)), rounds=ROUNDS, vocabulary=vocabulary)
        else:
            report = measure(loaded, requested)
    return judge(report, requested, refused)


def _unusable(engine: Engine, feeds: Mapping[str, np.ndarray]) -> str | None:
    """Why an engine is no candidate, None when it runs `feeds` and its outputs are finite."""
    try:
        outputs = engine.run(feeds)
    except EngineError as error:
        return str(error)
    return None if all(np.isfinite(array).all() for array in outputs.values()) else "its outputs are not finite"


def judge(report: BenchReport, shapes: Sequence[tuple[int, int]], left_out: Mapping[str, str]) -> Choice:
    """The choice that timings of candidates (in order, the reference first) lead to."""
    timings: dict[str, dict[tuple[int, int], float]] = {}
    for timing in report.timings:
        timings.setdefault(timing.name, {})[timing.batch, timing.sequence] = timing.median
    ratios = {(ratio.name, ratio.batch, ratio.sequence): ratio for ratio in report.ratios}
    first, candidates = next(iter(timings)), []
    for name, by_shape in timings.items():
        own = [ratios[name, batch, sequence] for batch, sequence in shapes] if name != first else []
        mean = _geometric([ratio.speedup for ratio in own])
        ends = tuple(_geometric([ratio.interval[end] for ratio in own]) for end in (0, 1))
        candidates.append(Candidate(name, tuple(by_shape[shape] for shape in shapes), mean, (ends[0], ends[1])))
    # One that may be faster still, but is not proven to be, takes nothing from the fastest that is.
    faster = [candidate for candidate in candidates if candidate.interval[0] > 1.0]
    chosen = max(faster, key=lambda candidate: candidate.speedup, default=candidates[0])
    why = _why(candidates, chosen, left_out)
    return Choice(chosen.backend, why, tuple(shapes), tuple(candidates), dict(left_out))


def _why(candidates: Sequence[Candidate], chosen: Candidate, left_out: Mapping[str, str]) -> str:
    if len(candidates) == 1:
        others = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        return (
            f"{chosen.backend} is the only candidate ({others})"
            if others
            else f"{chosen.backend} is the only candidate"
        )
    low, high = chosen.interval
    if chosen is not candidates[0]:
        return (
            f"{chosen.backend} is {chosen.speedup:.2f}x as fast as {candidates[0].backend} over these shapes "
            f"({low:.2f} to {high:.2f})"
        )
    runner_up = max(candidates[1:], key=lambda candidate: candidate.speedup)
    low, high = runner_up.interval
    if high < 1.0:
        return (
            f"{runner_up.backend} is slower: {runner_up.speedup:.2f}x as fast as {chosen.backend} "
            f"({low:.2f} to {high:.2f})"
        )
    return (
        f"a tie: {runner_up.backend} is {runner_up.speedup:.2f}x as fast as {chosen.backend} "
        f"({low:.2f} to {high:.2f}), "
        f"which is within noise, and {chosen.backend} comes first"
    )


def _geometric(values: Sequence[float]) -> float:
    return math.exp(math.fsum(math.log(value) for value in values) / len(values)) if values else 1.0
