"""An engine that also gives what crosses its block boundaries: its graph with those values as further outputs.

Nothing else of the graph changes. Block boundaries are LayerNorm outputs, which every runtime keeps between kernels
anyway, while an output inside a block would break the fusions that are to be tested. Even so an extra output can keep a
runtime from fusing across it, so the operators that run with and without are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engines.base import BuildOptions, Engine, backend
from engines.passport import EnginePassport
from engines.reference.pytorch import EMBEDDINGS
from nxm_export.contract.encoder_family import BLOCK, Family
from nxm_export.errors import ArtifactError, EngineError

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class BlockBoundaries:
    """Where the blocks of a family's graphs end: the names of all runs of blocks, in order, with the block that each of
    them runs, and the names that a linear layer that reads what the first one reads can have (a fused one is there as a
    whole or in parts). `norms` are those that read what the
    runs write, and none where a block ends with a norm of its own."""

    runs: Sequence[tuple[str, str]]
    first: Sequence[str]
    norms: Sequence[str] = ()

    @classmethod
    def of(cls, family: Family, config: Mapping[str, object]) -> BlockBoundaries:
        """The boundaries of a model."""
        runs = list(zip(family.run_names(config), family.runs(config), strict=True))
        reader = family.readers(runs[0][1], BLOCK)[0]
        first = [name.removesuffix(".weight") for name in dict.fromkeys((reader, *family.parts(reader)))]
        if not family.pre_norm:
            return cls(runs, first)
        norms = [f"{block}.{family.block_norm}" for _, block in runs[1:]]
        return cls(runs, first, [*norms, f"{family.base}.{family.final_norm}"])

    @property
    def names(self) -> list[str]:
        """Names of the runs."""
        return [name for name, _ in self.runs]


@dataclass(frozen=True)
class BlockOutputEngine:
    """An engine with `names`, its values by boundary, among its outputs. `kernels` are the operators of which it runs
    another number than the engine itself, (engine, this one); None where that cannot be told."""

    engine: Engine
    names: Mapping[str, str]
    kernels: Mapping[str, tuple[int, int]] | None


def add_block_outputs(model: ir.Model, boundaries: BlockBoundaries, source: str) -> dict[str, str]:
    """Make what crosses the boundaries outputs of `model`, in place; their value names by boundary.

    A block ends with its last LayerNorm, found by its parameters' names, or with what the next one's reads where its
    residual stream is never normalised; one that runs several times has as many. What crosses the boundary in front of
    the first block is what its first linear layers read, before their quantizer. Raises `ArtifactError` for a graph
    without those names.
    """
    ends = (_read_by_norms if boundaries.norms else _block_ends)(model.graph, boundaries)
    query = next((node for node in model.graph if node.name in boundaries.first), None)
    missing = [name for name in boundaries.names if name not in ends] + ([] if query else [boundaries.first[0]])
    if query is None or missing:
        raise ArtifactError(
            f"{source}: it has no LayerNorm or product named {missing[0]}, so its blocks cannot be "
            "told apart; export it again"
        )
    values = {EMBEDDINGS: _before_quantizer(query), **ends}
    for value in values.values():
        if not value.is_graph_output():
            model.graph.outputs.append(value)
    return {name: str(value.name) for name, value in values.items()}


def _block_ends(graph: ir.Graph, boundaries: BlockBoundaries) -> dict[str, ir.Value]:
    """What the last LayerNorm of every run of a block writes, by the name of the run; without runs that have none."""
    norms: dict[str, list[ir.Value]] = {block: [] for _, block in boundaries.runs}
    for node in graph:
        if node.op_type == "LayerNormalization":
            names = [value.name or "" for value in node.inputs[1:] if value is not None]
            for block, outputs in norms.items():
                if any(name.startswith(f"{block}.") for name in names):
                    outputs.append(node.outputs[0])
    ends, blocks = {}, [block for _, block in boundaries.runs]
    for at, (name, block) in enumerate(boundaries.runs):
        uses, run = blocks.count(block), blocks[:at].count(block)
        if norms[block] and len(norms[block]) % uses == 0:  # every run has equally many, and the last of them ends it
            ends[name] = norms[block][len(norms[block]) // uses * (run + 1) - 1]
    return ends


def _read_by_norms(graph: ir.Graph, boundaries: BlockBoundaries) -> dict[str, ir.Value]:
    """What the norm behind every run of a block reads, by the name of the run; without runs that have none."""
    ends = {}
    for node in graph:
        names = [value.name or "" for value in node.inputs[1:] if value is not None]
        for run, norm in zip(boundaries.names, boundaries.norms, strict=True):
            written = node.inputs[0]
            if node.op_type == "LayerNormalization" and any(name.startswith(f"{norm}.") for name in names) and written:
                ends[run] = written
    return ends


def _before_quantizer(query: ir.Node) -> ir.Value:
    value = query.inputs[0]
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type not in ("QuantizeLinear", "DequantizeLinear", "Reshape", "Cast"):
            break
        value = producer.inputs[0]
    if value is None:
        raise ArtifactError(f"{query.name}: it reads nothing, so the graph is damaged; export it again")
    return value


def ort_with_block_outputs(
    directory: Path, passport: EnginePassport, boundaries: BlockBoundaries, scratch: Path
) -> BlockOutputEngine:
    """An engine of ONNX Runtime, whose file is a graph, with block outputs."""
    from engines.ort.backend import OrtEngine, operators
    from nxm_export.graph.reading.graph_weights import load_graph, save_graph

    file = scratch / passport.engine
    file.write_bytes(passport.read_engine(directory, {}))
    before = operators(file, passport)
    model = load_graph(file)
    names = add_block_outputs(model, boundaries, str(directory))
    save_graph(model, file)
    after = operators(file, passport)
    changed = {
        name: (before.get(name, 0), after.get(name, 0))
        for name in sorted({*before, *after})
        if before.get(name, 0) != after.get(name, 0)
    }
    return BlockOutputEngine(OrtEngine(directory, file.read_bytes(), passport), names, changed)


def built_with_block_outputs(
    directory: Path, passport: EnginePassport, boundaries: BlockBoundaries, graph: Path, scratch: Path
) -> BlockOutputEngine:
    """An engine of any backend with block outputs, built from `graph` as the engine in `directory` was.

    Raises `EngineUnavailable` where the runtime or its hardware is missing.
    """
    from engines.base import copy_companions
    from nxm_export.graph.reading.graph_weights import load_graph, save_graph

    model = load_graph(graph)
    names = add_block_outputs(model, boundaries, str(graph))
    source, out = scratch / "graph", scratch / "engine"
    source.mkdir()
    out.mkdir()
    save_graph(model, source / "model.onnx")
    copy_companions(directory, source)
    options = BuildOptions(
        profiles=passport.profiles,
        sparse=passport.sparse,
        fuse=passport.options.get("fuse") is not False,
        level=passport.whole_option("level"),
        workspace_bytes=passport.whole_option("workspace_bytes"),
        build_route=passport.text_option("build_route"),
    )
    runtime = backend(passport.backend)
    try:
        runtime.build(source / "model.onnx", out, options)
    except EngineError as error:
        raise type(error)(f"{directory}: it cannot be built with block outputs: {error}") from error
    return BlockOutputEngine(runtime.load(out), names, None)
