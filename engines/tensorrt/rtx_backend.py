"""TensorRT-RTX: builds ahead of time, without a GPU; runs where a supported RTX GPU is.

Kernels are chosen when the engine is loaded on its GPU, so the build proves which products run on integers (the verbose
log prints the layers) and cannot prove sparsity: that column of the report says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engines.base import BuildOptions, copy_companions, spec_of
from engines.passport import EnginePassport, load_passport
from engines.sparsity.build_evidence import integer_products, parse_layers
from engines.sparsity.report import read_truth, write_truth
from engines.tensorrt.builder_process import LOG_FILE, build_in_child
from engines.tensorrt.cuda_driver import device_facts
from engines.tensorrt.profiles import default_profile, require_positions
from engines.tensorrt.runtime import TensorRTEngine
from nxm_export.errors import EngineError, EngineUnavailable

NAME = "trt_rtx"
ENGINE_FILE = "model.engine"
MODULE = "tensorrt_rtx"
PACKAGE = "tensorrt-rtx-cu13"
COMPUTE_CAPABILITIES = ((8, 6), (8, 9), (12, 0))  # Ampere, Ada and Blackwell RTX


def build(onnx: str | Path, out: Path, options: BuildOptions = BuildOptions()) -> EnginePassport:
    """Write an engine directory with ``model.engine`` and ``build.log``.

    Raises `EngineUnavailable` without TensorRT-RTX, `ExportError` for a graph that it would refuse or degrade, `EngineError`
    for everything that the builder refuses, and for INT8 convolutions that it built in float.
    """
    _require_installed()
    from nxm_export.graph.graph_weights import load_graph
    from nxm_export.graph.verifier import verify

    onnx = Path(onnx)
    model = load_graph(onnx)
    verify(onnx).require()
    if options.build_route is not None:
        raise EngineError("TensorRT-RTX has no build routes; leave --build-route out, or build with --backend trt")
    profiles = list(options.profiles) or [default_profile(_max_length(onnx.parent))]
    require_positions(profiles, _max_length(onnx.parent))
    request: dict[str, Any] = {
        "module": MODULE,
        "onnx": str(onnx),
        "engine": str(out / ENGINE_FILE),
        "directory": str(out),
        "profiles": [asdict(profile) for profile in profiles],
        "sparse": options.sparse,
        "level": options.level,
        "workspace_bytes": options.workspace_bytes,
        "build_route": None,
        "timing_cache": None,  # it has none: kernels are timed where the engine runs
        "compute_capabilities": [list(capability) for capability in COMPUTE_CAPABILITIES],
        "inspect": False,  # deserializing needs a GPU
    }
    found = build_in_child(request, out / LOG_FILE, options.progress)
    counts = _count(out / LOG_FILE, model)
    _require_integer_convolutions(model, counts["float_products"], onnx)
    copy_companions(onnx.parent, out)
    targets = ", ".join(f"{major}.{minor}" for major, minor in COMPUTE_CAPABILITIES)
    device = {"gpu": "none", "compute_capability": targets}
    write_truth(out, model, backend=NAME, version=version(PACKAGE), device=device, sparse_flag=options.sparse)
    return EnginePassport.issue(
        NAME,
        out / ENGINE_FILE,
        onnx,
        device={"kind": "gpu", "compute_capabilities": targets},
        requires=_facts(),
        options={"sparse": options.sparse, "level": options.level, "twin": options.twin} | counts,
        profiles=request["profiles"],
        graph=model.metadata_props,
        bindings=found["bindings"],
    )


def load(directory: str | Path) -> TensorRTEngine:
    """Load an engine directory; hash, version and GPU are checked before anything is deserialized."""
    directory = Path(directory)
    passport = load_passport(directory)
    _require_installed()
    engine = passport.read_engine(directory, _facts())
    capability = device_facts()["compute_capability"]
    built = passport.device["compute_capabilities"]
    if capability not in built.split(", "):
        raise EngineError(
            f"{directory}: built for compute capability {built}, and this GPU has {capability}; TensorRT-RTX runs on RTX GPUs only"
        )
    trt = importlib.import_module(MODULE)
    return TensorRTEngine(trt, directory / ENGINE_FILE, engine, f"rebuild it: {passport.rebuild_command()}")


def inspect(directory: str | Path) -> dict[str, Any]:
    """Facts of an engine directory: how many products the builder runs on integers, and the report per weight."""
    passport = load_passport(directory)
    keys = ("integer_products", "planned_products", "sparse_kernels")
    counts = {key: passport.options.get(key) for key in keys}
    return {"backend": NAME, **counts, **read_truth(Path(directory)).to_dict()}


def _count(log: Path, model: Any) -> dict[str, Any]:
    """How many of the graph's quantized products run on integers, from the layers that the builder printed."""
    from nxm_export.graph.graph_weights import graph_weights

    products = [weight.node.name or "" for weight in graph_weights(model) if weight.is_quantized]
    with log.open(encoding="utf-8", errors="replace") as lines:
        found = integer_products(parse_layers(lines), products)
    return {
        "planned_products": len(found),
        "integer_products": sum(found.values()),
        "float_products": sorted(name for name, integer in found.items() if not integer),
        "sparse_kernels": "unknown: kernels are chosen on the GPU, and this engine was built without one",
    }


def _require_integer_convolutions(model: Any, float_products: Sequence[str], onnx: Path) -> None:
    """Refuse INT8 convolutions that the builder dequantized and multiplies in float: that is not what was asked for.

    Which ones it does that to is read from the layers it built, not guessed.
    """
    from nxm_export.graph.graph_weights import graph_weights

    convolutions = {weight.node.name or "" for weight in graph_weights(model) if weight.node.op_type == "Conv"}
    found = sorted(convolutions & set(float_products))
    if found:
        raise EngineError(
            f"{onnx}: TensorRT-RTX runs {len(found)} INT8 convolutions in float, such as {found[0]}. "
            "Export with --lowering matmul, or build with --backend trt"
        )


def _max_length(directory: Path) -> int:
    spec = spec_of(directory)
    return spec.max_length if spec else 512


def _facts() -> dict[str, str]:
    return {PACKAGE: version(PACKAGE)}


def _require_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in (MODULE, "polygraphy", "onnx_ir") if find_spec(name) is None]
    if missing:
        raise EngineUnavailable(f"{' and '.join(missing)} is not installed; pip install 'nxm-export[trt-rtx]'")
