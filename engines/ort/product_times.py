"""What the products of ONNX Runtime's engines take, by its own profiler.

The graph that the profiled session runs is written by that session, so that a node of the profile is tied to the
constant that it multiplies by.
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.base import as_bound, require_within, spec_of
from engines.ort.backend import ENGINE_FILE, INTEGER_PRODUCTS, Session, input_bindings, left_out, open_session
from engines.passport import load_passport
from engines.product_times import ProductTime
from engines.sample_inputs import require_shape, sample_feeds
from nxm_export.errors import EngineError
from nxm_export.storage.json_files import as_objects, read_foreign_json

FLOAT_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")  # with a bias at most: nothing else is in their time
_VOCABULARY = 1000
_SETTLING = 1  # turns before any is counted
_PROFILE_WAY_OUT = "it is ONNX Runtime's own profile: try again, or with another version of onnxruntime"


@dataclass(frozen=True)
class _Profiled:
    """A session that profiles, its inputs, and the file that it wrote its graph to."""

    directory: Path
    session: Session
    feeds: dict[str, np.ndarray]
    optimized: Path
    quantized: frozenset[str]  # the weights that the engine file stores as integers

    def run(self) -> None:
        """One run; raises `EngineError`."""
        try:
            self.session.run(None, self.feeds)
        except Exception as error:  # onnxruntime raises its own types, which are no stable API
            raise EngineError(f"{self.directory}: ONNX Runtime failed: {error}") from error


def product_times(
    directories: Sequence[Path], shape: tuple[int, int], rounds: int, threads: int
) -> list[tuple[ProductTime, ...]]:
    """Of every engine directory the products with constants, with median milliseconds over `rounds` runs at `shape`
    (batch, sequence) on so many `threads`. Engines take turns; each runs once unseen before a run that counts, since
    the caches hold the engine before.

    Raises `EngineError` for a shape that an engine does not take.
    """
    with tempfile.TemporaryDirectory() as scratch:
        opened = [_opened(path, shape, threads, Path(scratch) / str(at)) for at, path in enumerate(directories)]
        for _ in range(_SETTLING + rounds):
            for each in opened:
                each.run()
                each.run()
        return [_times(each, 2 * (_SETTLING + rounds)) for each in opened]


def _opened(directory: Path, shape: tuple[int, int], threads: int, scratch: Path) -> _Profiled:
    from nxm_export.graph.reading.graph_weights import graph_weights, load_graph, parameter_of

    passport = load_passport(directory)
    scratch.mkdir()
    session = open_session(
        directory / ENGINE_FILE,
        threads,
        left_out(passport),
        model=passport.read_engine(directory, {}),
        optimized=scratch / "optimized.onnx",
        profile=scratch / "profile",
    )
    bindings, spec = input_bindings(session), spec_of(directory)
    require_shape(bindings, *shape)
    vocabulary = min(_VOCABULARY, spec.limits.get("input_ids", _VOCABULARY)) if spec else None
    feeds = sample_feeds(bindings, *shape, vocabulary)
    require_within(spec, feeds)
    bound = {binding.name: as_bound(binding, feeds[binding.name]) for binding in bindings}
    stored = load_graph(directory / ENGINE_FILE)
    quantized = frozenset(parameter_of(weight.name) for weight in graph_weights(stored) if weight.is_quantized)
    return _Profiled(directory, session, bound, scratch / "optimized.onnx", quantized)


def _times(profiled: _Profiled, runs: int) -> tuple[ProductTime, ...]:
    """The products of the graph that ran so often; every second run counts, but those of the first turns."""
    from nxm_export.graph.reading.graph_weights import graph_weights, load_graph, parameter_of

    taken: dict[str, list[float]] = defaultdict(list)  # milliseconds of every run, by event
    for event in as_objects(read_foreign_json(Path(profiled.session.end_profiling()), _PROFILE_WAY_OUT)):
        name, duration = event.get("name"), event.get("dur")
        if event.get("cat") == "Node" and isinstance(name, str) and isinstance(duration, (int, float)):
            taken[name].append(duration / 1e3)
    weights = list(graph_weights(load_graph(profiled.optimized)))
    read = Counter(str(weight.node.name) for weight in weights)
    products = []
    for weight in weights:
        node, op, name = str(weight.node.name), weight.node.op_type, parameter_of(weight.name)
        problem = None
        if op not in (*FLOAT_PRODUCTS, *INTEGER_PRODUCTS):
            problem = f"it runs inside the operator {op}, whose time holds more than the product's"
        elif op in FLOAT_PRODUCTS and (weight.is_quantized or name in profiled.quantized):
            problem = f"it is stored as integers and runs in float ({op})"
        elif read[node] > 1 or len(taken[f"{node}_kernel_time"]) != runs:
            problem = f"ONNX Runtime's profile does not tell its node {node!r} from others"
        counted = taken[f"{node}_kernel_time"][2 * _SETTLING + 1 :: 2]
        median = None if problem else float(np.median(counted))
        if median == 0.0:
            problem = "it took less than a microsecond, the step of ONNX Runtime's profile; give a larger shape"
        products.append(
            ProductTime(name, weight.k, weight.n, "int8" if op in INTEGER_PRODUCTS else "float", median, problem)
        )
    return tuple(products)
