"""What running an engine needs of this machine's memory at least, and whether it is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.base import BuildOptions, backend, spec_of
from engines.passport import EnginePassport, load_passport
from nxm_export.contract.checkpoint import read_config
from nxm_export.contract.families import family_of
from nxm_export.contract.token_budget import rows_within
from nxm_export.errors import notice
from nxm_export.storage.memory import GIGABYTE, available_memory, gigabytes, require_memory

if TYPE_CHECKING:
    import onnx_ir as ir

Shape = tuple[int, int]  # batch, sequence
# Of a model compiled for a shape: its weights, laid out anew, and kernels. Measured: 15 MB for 1 MB of weights in
# INT8, 28 to 36 MB for 11 MB, 67 to 77 MB for 45 MB, and 53 to 64 MB for 43 MB in FP32.
_PACKED, _KERNELS = 1.2, 14 * 10**6


def engine_memory(directory: Path, passport: EnginePassport, shapes: Iterable[Shape]) -> dict[Shape, int] | None:
    """Bytes that a loaded engine needs for a run of each of `shapes`; None for one whose file is no graph: what it
    needs on its GPU was decided when it was built."""
    from nxm_export.graph.reading.graph_weights import load_graph
    from nxm_export.graph.run_memory import run_memory

    capabilities = backend(passport.backend).CAPABILITIES
    if not capabilities.runs_onnx:
        return None
    model = load_graph(directory / passport.engine)
    return {shape: run_memory(model, *shape, scores=capabilities.holds_scores) for shape in shapes}


def tell_memory(graph: Path, name: str, options: BuildOptions) -> None:
    """Say what the largest batch of an engine will need, where that is a gigabyte or more, before it is built from
    the file `graph` by the backend `name`; raises `EngineError` where not even its weights fit this machine.

    The batch is that of the largest profile, or of the budget of tokens at the longest input. More than there is here
    is no reason not to build: the engine may run elsewhere.
    """
    spec = spec_of(graph.parent)
    if not graph.is_file() or spec is None:
        return
    from nxm_export.graph.reading.graph_weights import load_graph
    from nxm_export.graph.run_memory import run_memory

    weights = sum(part.stat().st_size for part in graph.parent.glob(f"{graph.name}*") if part.is_file())
    require_memory(2 * weights, f"{graph}: building an engine", "build it on a larger machine")
    budget = [(rows_within(spec.max_length, options.max_batch_tokens), spec.max_length)]
    model, capabilities = load_graph(graph), backend(name).CAPABILITIES
    shapes = [profile.maximum for profile in options.profiles] or budget
    needed = {shape: run_memory(model, *shape, scores=capabilities.holds_scores) for shape in shapes}
    shape = max(needed, key=lambda shape: needed[shape])
    if needed[shape] < GIGABYTE:
        return
    available = available_memory() if capabilities.device == "cpu" else None
    here = f", and {gigabytes(available)} are available here" if available is not None else ""
    notice(
        f"{graph}: a batch of {shape[0]}x{shape[1]} (batch x sequence) needs at least {gigabytes(needed[shape])} of "
        f"memory{here}; fewer rows (--max-batch-tokens, --profile) or a lower --max-length of `nxm export` need less"
    )


def compiled_memory(model: ir.Model, shape: Shape) -> int:
    """Bytes that a model compiled for a shape adds to a loaded engine, estimated from its weights and from what a run
    holds. Tables that are only looked up are shared."""
    from nxm_export.graph.run_memory import run_memory

    weights = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None and any(use.node.op_type != "Gather" for use in value.uses())
    )
    return _KERNELS + int(_PACKED * weights) + run_memory(model, *shape, scores=False)


def tell_compiled_shapes(graph: Path, model: ir.Model, shapes: Sequence[Shape]) -> int:
    """Say what compiled shapes will add to every loaded copy of an engine that is built from the file `graph`; returns
    the bytes. Raises `EngineError` where this machine has not as much."""
    needed = {shape: compiled_memory(model, shape) for shape in shapes}
    total = sum(needed.values())
    if not needed:
        return 0
    require_memory(total, f"{graph}: compiling {len(needed)} shapes", "give fewer of --shape")
    each = ", ".join(f"{shape[0]}x{shape[1]} {size / 1e6:.0f} MB" for shape, size in needed.items())
    notice(f"{graph}: compiled shapes add about {total / 1e6:.0f} MB of memory to every loaded copy ({each})")
    return total


def reference_memory(checkpoint: Path, tokens: int) -> int:
    """Bytes that the PyTorch reference holds in float64 for a batch of so many tokens: its weights, and what goes in
    and out of its widest layer. Its attention runs in blocks, and adds nothing that grows."""
    config = read_config(checkpoint)
    shapes = family_of(config, source=str(checkpoint)).weights(config).values()
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return 2 * weights + 3 * 8 * tokens * max(map(max, shapes))


def require_room(directory: Path, shapes: Iterable[Shape], purpose: str, way_out: str, *, copies: int = 1) -> None:
    """Raise `EngineError` where a run at one of `shapes` in each of `copies` of an engine, which are loaded, is clearly
    beyond this machine."""
    needed = engine_memory(directory, load_passport(directory), shapes)
    if needed:
        shape = max(needed, key=lambda shape: needed[shape])
        times = f" in each of {copies} copies" if copies > 1 else ""
        shown = "x".join(map(str, shape))
        require_memory(copies * needed[shape], f"{directory}: {purpose} {shown} (batch x sequence){times}", way_out)
