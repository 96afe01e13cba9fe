"""TensorRT-RTX: builds ahead of time, without a GPU; runs where a supported RTX GPU is.

Kernels are chosen when the engine is loaded on its GPU, so the build proves which products run on integers (the verbose
log prints the layers) and cannot prove sparsity: that column of the report says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, cast

from engines.base import BackendCapabilities, BuildOptions, LoadOptions, copy_companions
from engines.passport import BuildFacts, EnginePassport, load_passport
from engines.sparsity.build_evidence import LOG_FILE, ambiguous_names, integer_products, parse_layers
from engines.sparsity.engine_report import FACTS_FILE, read_sparsity_report, write_weight_facts
from engines.sparsity.sparsity_report import SparsityReport, SparsityTarget
from engines.tensorrt.builder_process import BuildRequest, build_in_child
from engines.tensorrt.cuda_driver import device_facts
from engines.tensorrt.profiles import graph_inputs, profiles_for
from engines.tensorrt.runtime import TensorRTEngine
from nxm_export.errors import EngineError, EngineUnavailable

if TYPE_CHECKING:
    import onnx_ir as ir

    from engines.tensorrt.bindings import TensorRT

NAME = "trt_rtx"
CAPABILITIES = BackendCapabilities("gpu", optimization_profiles=True, sparse_kernels=True, layer_times=True)
ENGINE_FILE = "model.engine"
MODULE = "tensorrt_rtx"
PACKAGE = "tensorrt-rtx-cu13"
COMPUTE_CAPABILITIES = ((8, 6), (8, 9), (12, 0))  # Ampere, Ada and Blackwell RTX


@dataclass(frozen=True)
class IntegerProducts:
    """How many quantized products of the graph the builder runs on integers, and which ones in float or, where the log
    does not tell two apart, perhaps in float."""

    planned_products: int
    integer_products: int
    float_products: tuple[str, ...]
    sparse_kernels: str = "unknown: kernels are chosen on the GPU, and this engine was built without one"


@dataclass(frozen=True)
class RtxFacts:
    """How many products run on integers (None where the passport does not say), and the sparsity report."""

    backend: str
    integer_products: int | None
    planned_products: int | None
    sparse_kernels: str | None
    sparsity: SparsityReport

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``: the report's fields stand beside the others."""
        facts = {key: getattr(self, key) for key in ("integer_products", "planned_products", "sparse_kernels")}
        return {"backend": self.backend, **facts, **self.sparsity.to_dict()}


def build(onnx: str | Path, out: Path, options: BuildOptions = BuildOptions()) -> EnginePassport:
    """Write an engine directory with ``model.engine`` and ``build.log``.

    Raises `EngineUnavailable` without TensorRT-RTX, `ExportError` for a graph that it would refuse or degrade,
    `EngineError` for everything that the builder refuses, and for INT8 convolutions that it built in float.
    """
    _require_installed()
    from nxm_export.graph.external_data import graph_files
    from nxm_export.graph.reading.graph_weights import load_graph
    from nxm_export.graph.tensorrt_parser import parser_of, require_read_right
    from nxm_export.graph.verifier import verify_model

    onnx = Path(onnx)
    model = load_graph(onnx)
    source = graph_files(model, onnx)
    verify_model(model, str(onnx)).require()
    require_read_right(model, parser_of(NAME, version(PACKAGE)), str(onnx))
    if options.build_route is not None:
        raise EngineError("TensorRT-RTX has no build routes; leave --build-route out, or build with --backend trt")
    profiles = profiles_for(options.profiles, onnx.parent, graph_inputs(model), options.max_batch_tokens)
    request = BuildRequest(  # without a timing cache: kernels are timed where the engine runs
        MODULE,
        onnx=str(onnx),
        engine=str(out / ENGINE_FILE),
        directory=str(out),
        profiles=profiles,
        sparse=options.sparse != "never",
        level=options.level,
        workspace_bytes=options.workspace_bytes,
        compute_capabilities=COMPUTE_CAPABILITIES,
        inspect=False,  # deserializing needs a GPU
    )
    built = build_in_child(request, out / LOG_FILE, options.progress)
    counts = _count(out / LOG_FILE, model)
    _require_integer_convolutions(model, counts.float_products, onnx)
    copy_companions(onnx.parent, out)
    capabilities = ", ".join(f"{major}.{minor}" for major, minor in COMPUTE_CAPABILITIES)
    target = SparsityTarget(NAME, version(PACKAGE), capabilities, sparse_flag=options.sparse != "never", has_gpu=False)
    write_weight_facts(out, model, target)
    facts = BuildFacts(
        device={"kind": "gpu", "compute_capabilities": capabilities},
        requires=_facts(),
        options={"sparse": options.sparse, "level": options.level, "twin": options.twin, **asdict(counts)},
        graph=model.metadata_props,
        source=source,
        bindings=built.bindings,
        profiles=profiles,
        evidence=(FACTS_FILE, LOG_FILE),
    )
    return EnginePassport.issue(NAME, out / ENGINE_FILE, onnx, facts)


def load(directory: str | Path, options: LoadOptions = LoadOptions()) -> TensorRTEngine:
    """Load an engine directory; hash, version and GPU are checked before anything is deserialized."""
    directory = Path(directory)
    passport = load_passport(directory)
    _require_installed()
    engine = passport.read_engine(directory, _facts())
    capability = device_facts()["compute_capability"]
    built = passport.device.get("compute_capabilities", "unknown")
    if capability not in built.split(", "):
        raise EngineError(
            f"{directory}: built for compute capability {built}, and this GPU has {capability}; "
            "TensorRT-RTX runs on RTX GPUs only"
        )
    trt = cast("TensorRT", importlib.import_module(MODULE))
    # RTX compiles kernels for a shape in the background, and runs general ones until then.
    rebuild = f"rebuild it: {passport.rebuild_command()}"
    return TensorRTEngine(trt, directory / ENGINE_FILE, engine, rebuild, kernels_are_final=False)


def inspect(directory: str | Path) -> RtxFacts:
    """Facts of an engine directory: how many products the builder runs on integers, and the report per weight."""
    directory = Path(directory)
    passport = load_passport(directory)
    passport.require_whole(directory)
    return RtxFacts(
        NAME,
        passport.whole_option("integer_products"),
        passport.whole_option("planned_products"),
        passport.text_option("sparse_kernels"),
        read_sparsity_report(directory),
    )


def _count(log: Path, model: ir.Model) -> IntegerProducts:
    """How many of the graph's quantized products run on integers, from the layers that the builder printed."""
    from nxm_export.graph.reading.graph_weights import graph_weights
    from nxm_export.graph.reading.sparsity_scan import node_names

    products = [weight.node.name or "" for weight in graph_weights(model) if weight.is_quantized]
    ambiguous = ambiguous_names(node_names(model))
    with log.open(encoding="utf-8", errors="replace") as lines:
        runs_integer = integer_products(parse_layers(lines), products, ambiguous)
    in_float = tuple(sorted(name for name, integer in zip(products, runs_integer, strict=True) if not integer))
    return IntegerProducts(len(products), sum(runs_integer), in_float)


def _require_integer_convolutions(model: ir.Model, float_products: Sequence[str], onnx: Path) -> None:
    """Refuse INT8 convolutions that the builder dequantized and multiplies in float: that is not what was asked for.

    Which ones it does that to is read from the layers it built, not guessed.
    """
    from nxm_export.graph.reading.graph_weights import graph_weights

    convolutions = {weight.node.name or "" for weight in graph_weights(model) if weight.node.op_type == "Conv"}
    in_float = sorted(convolutions & set(float_products))
    if in_float:
        raise EngineError(
            f"{onnx}: TensorRT-RTX runs {len(in_float)} INT8 convolutions in float, such as {in_float[0]}. "
            "Export with --lowering matmul, or build with --backend trt"
        )


def _facts() -> dict[str, str]:
    return {PACKAGE: version(PACKAGE)}


def _require_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in (MODULE, "polygraphy", "onnx_ir") if find_spec(name) is None]
    if missing:
        raise EngineUnavailable(f"{' and '.join(missing)} is not installed; pip install 'nxm-export[trt-rtx]'")
