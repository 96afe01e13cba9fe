"""Which engines a run has: by the backends that were asked for, what this machine can run, and the plan.

::

    ort-cpu-fp32                     the dense model: the baseline of every run
    ort-cpu-int8, -outputs           the compressed one, with quantizers at inputs alone, and at outputs, too
    openvino-cpu-int8
    BACKEND-fp16-int8                on a GPU, and where it runs here its twins for the verdict on 2:4:
    BACKEND-fp16-int8-dense, BACKEND-fp16-float

In place of ``int8`` stands ``sparse`` where a plan leaves all weights in float.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from nxm_export.contract.choices import AUTO_BACKEND, BACKEND, BACKEND_NAMES, SPARSE_USE, SparseUse
from nxm_export.errors import EngineError, EngineUnavailable
from nxm_export.pipeline.environment import missing_for
from nxm_export.pipeline.sparsity_twins import DENSE, FLOAT, SPARSE

BASELINE = "ort-cpu-fp32"
QUANTIZED = "int8"  # the kind of engines whose plan gives weights bits
AHEAD_OF_TIME = "trt_rtx"  # builds engines without a GPU


@dataclass(frozen=True)
class RunGraph:
    """A graph of a run: the model directory that it comes from, and how it is exported (`placement` None: all that was
    trained)."""

    source: str
    target: str
    placement: str | None


GRAPHS = {
    "dense": RunGraph("dense", "cpu", None),
    "cpu": RunGraph("checkpoint", "cpu", "inputs"),
    "cpu-outputs": RunGraph("checkpoint", "cpu", "inputs-outputs"),
    "trt": RunGraph("checkpoint", "trt", None),
    "trt-float": RunGraph("checkpoint", "trt", "float"),
    "trt8": RunGraph("checkpoint", "trt8", None),
    "trt8-float": RunGraph("checkpoint", "trt8", "float"),
}


@dataclass(frozen=True)
class RunEngine:
    """An engine of a run: the graph and backend that it is built from and by, where sparse kernels may run, and
    its part among twins. A `main` one may become the engine that the run's numbers are about."""

    name: str
    graph: str
    backend: str
    sparse: SparseUse = SPARSE_USE
    twin: str | None = None
    main: bool = False


@dataclass(frozen=True)
class RunBackends:
    """The backends of a run: `names` are built, `twins` with twins, and the fastest of `candidates` is kept. `left_out`
    says why others of ``auto`` are not there."""

    names: tuple[str, ...]
    candidates: tuple[str, ...]
    twins: frozenset[str] = frozenset()
    left_out: Mapping[str, str] = field(default_factory=dict)


def run_backends(asked: Sequence[str]) -> RunBackends:
    """The backends that a run builds for: those that were asked for, of ``auto`` all that run here; for nobody's wish
    ONNX Runtime, what runs on a GPU that is here, and TensorRT-RTX ahead of time.

    Raises `EngineError` for a name that is no backend, and `EngineUnavailable`, with what to install, for one that was
    asked for and cannot run here, and where ONNX Runtime cannot, which runs the baseline.
    """
    unknown = [name for name in asked if name not in (*BACKEND_NAMES, AUTO_BACKEND)]
    if unknown:
        raise EngineError(f"unknown backend {unknown[0]!r}; choose of {', '.join((*BACKEND_NAMES, AUTO_BACKEND))}")
    if AUTO_BACKEND in asked and len(set(asked)) > 1:
        raise EngineError(f"{AUTO_BACKEND} takes every backend that runs here; give it alone, or name backends")
    automatic = AUTO_BACKEND in asked
    wanted = tuple(dict.fromkeys(asked)) if asked and not automatic else BACKEND_NAMES
    looked_at = dict.fromkeys((*wanted, BACKEND))  # the baseline's is in every run
    missing = {name: why for name in looked_at if (why := missing_for(name)) is not None}
    for name in (*(wanted if asked and not automatic else ()), BACKEND):
        if name in missing:
            raise EngineUnavailable(f"backend {name} cannot run here: {missing[name]}")
    here = tuple(name for name in wanted if name not in missing)
    twins = frozenset(here) - set(_cpu_backends())
    if automatic:
        return RunBackends(here, here, twins, missing)
    if asked:
        return RunBackends(here, here, twins)
    names = tuple(name for name in wanted if name in (BACKEND, AHEAD_OF_TIME) or name in twins)
    return RunBackends(names, (BACKEND,), twins)


def graphs_of(backends: RunBackends, kind: str) -> dict[str, RunGraph]:
    """The graphs that the engines of a run need, by name."""
    needed = {"cpu", *(engine.graph for engine in _engines(backends, kind))}
    return {name: graph for name, graph in GRAPHS.items() if name in needed}


def engines_of(backends: RunBackends, kind: str, graphs: Sequence[str]) -> list[RunEngine]:
    """The engines of a run that its `graphs` allow; of twins the dense one first, which is the reference of ratios."""
    return [engine for engine in _engines(backends, kind) if engine.graph in graphs]


def _engines(backends: RunBackends, kind: str) -> Iterator[RunEngine]:
    yield RunEngine(BASELINE, "dense", BACKEND)
    for name in backends.names:
        if name in _cpu_backends():
            yield RunEngine(f"{name}-cpu-{kind}", "cpu", name, main=True)
            if name == BACKEND:
                yield RunEngine(f"{name}-cpu-{kind}-outputs", "cpu-outputs", name)
            continue
        graph, engine = _gpu_graph(name), f"{name}-fp16-{kind}"
        if name not in backends.twins or kind != QUANTIZED:
            yield RunEngine(engine, graph, name, main=True)
            continue
        yield RunEngine(f"{engine}-dense", graph, name, sparse="never", twin=DENSE)
        yield RunEngine(engine, graph, name, twin=SPARSE, main=True)
        yield RunEngine(f"{name}-fp16-float", f"{graph}-float", name, sparse="never", twin=FLOAT)


def _cpu_backends() -> tuple[str, ...]:
    from engines.base import cpu_backends

    return cpu_backends()


def _gpu_graph(backend: str) -> str:
    """The graph that a backend takes: TensorRT 8.6 has no opset 21."""
    if backend != "trt":
        return "trt"
    try:
        return "trt8" if version("tensorrt").startswith("8.") else "trt"
    except PackageNotFoundError:
        return "trt"
