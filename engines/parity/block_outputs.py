"""An engine that also gives what crosses its block boundaries: its graph with those values marked as outputs.

Nothing else of the graph changes, and it is cut at block boundaries only: they are LayerNorm outputs, which every runtime
keeps between kernels anyway, while a cut inside a block would break the fusions that are to be tested. Even so an extra
output can keep a runtime from fusing across it, so `kernels` compares what runs with and without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.base import BuildOptions, Engine, backend
from engines.passport import EnginePassport
from engines.reference.pytorch import EMBEDDINGS
from nxm_export.contract.families import Family
from nxm_export.errors import ArtifactError, EngineError


@dataclass(frozen=True)
class Places:
    """Where a family's graphs are cut: the names of all runs of blocks, in order, with the block that each of them runs,
    and the linear layer that reads what the first one reads."""

    runs: Sequence[tuple[str, str]]
    query: str

    @classmethod
    def of(cls, family: Family, config: Mapping[str, Any]) -> Places:
        """The places of a model."""
        runs = list(zip(family.run_names(config), family.runs(config), strict=True))
        return cls(runs, family.linear(runs[0][1], "query"))

    @property
    def names(self) -> list[str]:
        """Names of the runs."""
        return [name for name, _ in self.runs]


def mark(model: Any, places: Places, source: str) -> dict[str, str]:
    """Make the boundaries outputs of `model` (an `onnx_ir.Model`), in place; their value names by boundary.

    A block's boundary is its last LayerNorm, found by its parameters' names; one that runs several times has as many. That
    in front of the first block is what the first query layer reads, before its quantizer. Raises `ArtifactError` for a
    graph without those names.
    """
    graph, query = model.graph, places.query
    norms: dict[str, list[Any]] = {block: [] for _, block in places.runs}
    for node in graph:
        if node.op_type == "LayerNormalization":
            names = [value.name or "" for value in node.inputs[1:] if value is not None]
            for block, outputs in norms.items():
                if any(name.startswith(f"{block}.") for name in names):
                    outputs.append(node.outputs[0])
    found, blocks = {}, [block for _, block in places.runs]
    for at, (name, block) in enumerate(places.runs):
        uses, run = blocks.count(block), blocks[:at].count(block)
        if norms[block] and len(norms[block]) % uses == 0:  # every run has equally many, and the last of them ends it
            found[name] = norms[block][len(norms[block]) // uses * (run + 1) - 1]
    product = next((node for node in graph if node.name == query), None)
    missing = [name for name in places.names if name not in found] + ([] if product is not None else [query])
    if product is None or missing:
        raise ArtifactError(
            f"{source}: it has no LayerNorm or product named {missing[0]}, so its blocks cannot be told apart; export it again"
        )
    value = product.inputs[0]
    while value.producer() is not None and value.producer().op_type in (
        "QuantizeLinear",
        "DequantizeLinear",
        "Reshape",
        "Cast",
    ):
        value = value.producer().inputs[0]
    boundaries = {EMBEDDINGS: value, **found}
    for value in boundaries.values():
        if not value.is_graph_output():
            graph.outputs.append(value)
    return {name: str(value.name) for name, value in boundaries.items()}


def cut_ort(
    directory: Path, passport: EnginePassport, places: Places, scratch: Path
) -> tuple[AbstractContextManager[Engine], dict[str, str], dict[str, list[int]]]:
    """(the cut engine, value names by boundary, operators whose number the cut changed: [as built, cut])."""
    from engines.ort.backend import OrtEngine, operators
    from nxm_export.graph.graph_weights import load_graph, save_graph

    file = scratch / passport.engine
    file.write_bytes(passport.read_engine(directory, {}))
    before = operators(file, passport)
    model = load_graph(file)
    names = mark(model, places, str(directory))
    save_graph(model, file)
    after = operators(file, passport)
    changed = {
        name: [before.get(name, 0), after.get(name, 0)]
        for name in sorted({*before, *after})
        if before.get(name, 0) != after.get(name, 0)
    }
    return OrtEngine(directory, file.read_bytes(), passport), names, changed


def cut_tensorrt(
    directory: Path, passport: EnginePassport, places: Places, graph: Path, scratch: Path
) -> tuple[AbstractContextManager[Engine], dict[str, str]]:
    """Build the cut `graph` as the engine was built; (the cut engine, value names by boundary).

    Raises `EngineUnavailable` where TensorRT or its GPU is missing.
    """
    from engines.base import copy_companions
    from nxm_export.graph.graph_weights import load_graph, save_graph

    model = load_graph(graph)
    names = mark(model, places, str(graph))
    source, out = scratch / "graph", scratch / "engine"
    source.mkdir()
    out.mkdir()
    save_graph(model, source / "model.onnx")
    copy_companions(directory, source)
    recorded: Mapping[str, Any] = passport.options
    options = BuildOptions(
        profiles=passport.profiles,
        sparse=bool(recorded.get("sparse", True)),
        level=recorded.get("level"),
        workspace_bytes=recorded.get("workspace_bytes"),
        build_route=recorded.get("build_route"),
    )
    runtime = backend(passport.backend)
    try:
        runtime.build(source / "model.onnx", out, options)
    except EngineError as error:
        raise type(error)(f"{directory}: its blocks cannot be marked as outputs: {error}") from error
    return runtime.load(out), names
