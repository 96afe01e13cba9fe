"""TensorRT on the GPU it is built for: 10 and 11 strongly typed, 8.6 weakly typed (see
`engines.tensorrt.builder_process`).

An engine is tied to the TensorRT version and the GPU that timed its kernels; its passport says which, and `load`
refuses another one before anything is deserialized.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from engines.base import BackendCapabilities, BuildOptions, LoadOptions, Profile, copy_companions
from engines.passport import BuildFacts, EnginePassport, load_passport
from engines.sparsity.build_evidence import LAYERS_FILE, LOG_FILE
from engines.sparsity.engine_report import FACTS_FILE, read_sparsity_report, write_weight_facts
from engines.sparsity.sparsity_report import SparsityReport, SparsityTarget
from engines.tensorrt.builder_process import (
    CACHE_FILE,
    STRONGLY_TYPED_SINCE,
    BuildRequest,
    TimingCacheRequest,
    build_in_child,
    seal_cache,
    usable_cache,
)
from engines.tensorrt.cuda_driver import device_facts, device_memory
from engines.tensorrt.profiles import graph_inputs, profiles_for
from engines.tensorrt.runtime import TensorRTEngine
from nxm_export.errors import ArtifactError, EngineError, EngineUnavailable
from nxm_export.storage.memory import gigabytes

if TYPE_CHECKING:
    import onnx_ir as ir

    from engines.tensorrt.bindings import TensorRT

NAME = "trt"
CAPABILITIES = BackendCapabilities("gpu", optimization_profiles=True, sparse_kernels=True, layer_times=True)
ENGINE_FILE = "model.engine"
MODULE = "tensorrt"
INSTALL = (
    "pip install 'nxm-export[trt]', and TensorRT beside it: tensorrt-cu13, tensorrt-cu12 or older, by your driver "
    "(docs/tensorrt.md; building without a GPU: --backend trt_rtx)"
)


@dataclass(frozen=True)
class TensorRTFacts:
    """What the engine requires of a machine, and the sparsity report of its build."""

    backend: str
    requires: Mapping[str, str]
    sparsity: SparsityReport

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``: the report's fields stand beside the others."""
        return {"backend": self.backend, "requires": dict(self.requires), **self.sparsity.to_dict()}


def build(onnx: str | Path, out: Path, options: BuildOptions = BuildOptions()) -> EnginePassport:
    """Write an engine directory with ``model.engine``, ``build.log``, ``layers.json`` and the timing cache.

    Raises `EngineUnavailable` without TensorRT or a GPU, `ExportError` for a graph that TensorRT would refuse or
    degrade, `EngineError` for everything that the builder refuses.
    """
    from nxm_export.graph.external_data import graph_files
    from nxm_export.graph.reading.graph_weights import load_graph
    from nxm_export.graph.tensorrt_parser import parser_of, require_read_right
    from nxm_export.graph.verifier import verify_model

    onnx = Path(onnx)
    trt, device = _runtime(), device_facts()
    model = load_graph(onnx)
    source = graph_files(model, onnx)
    verify_model(model, str(onnx)).require()
    _require_typing(model, trt.__version__, onnx)
    require_read_right(model, parser_of(NAME, trt.__version__), str(onnx))
    profiles = profiles_for(options.profiles, onnx.parent, graph_inputs(model), options.max_batch_tokens)
    _require_gpu_memory(model, profiles, onnx)
    facts = _facts(trt, device)
    cache = _cache(options, facts)
    request = BuildRequest(
        MODULE,
        onnx=str(onnx),
        engine=str(out / ENGINE_FILE),
        directory=str(out),
        profiles=profiles,
        sparse=options.sparse != "never",
        level=options.level,
        workspace_bytes=options.workspace_bytes,
        build_route=options.build_route,
        timing_cache=cache,
        inspect=True,
    )
    built = build_in_child(request, out / LOG_FILE, options.progress)
    if (out / CACHE_FILE).is_file():
        seal_cache(out / CACHE_FILE, facts)
    copy_companions(onnx.parent, out)
    recorded = {
        "sparse": options.sparse,
        "level": options.level,
        "workspace_bytes": options.workspace_bytes,
        "build_route": options.build_route,
        "twin": options.twin,
        "strongly_typed": built.strongly_typed,
        "timing_cache": cache is not None,
    }
    target = SparsityTarget(NAME, trt.__version__, device["compute_capability"], sparse_flag=options.sparse != "never")
    write_weight_facts(out, model, target)
    passport = BuildFacts(
        device={"kind": "gpu", **device},
        requires=facts,
        options=recorded,
        graph=model.metadata_props,
        source=source,
        bindings=built.bindings,
        profiles=profiles,
        evidence=(FACTS_FILE, LAYERS_FILE, LOG_FILE),
    )
    return EnginePassport.issue(NAME, out / ENGINE_FILE, onnx, passport)


def load(directory: str | Path, options: LoadOptions = LoadOptions()) -> TensorRTEngine:
    """Load an engine directory; hash, TensorRT version and GPU are checked before anything is deserialized."""
    directory = Path(directory)
    passport = load_passport(directory)
    trt = _runtime()
    engine = passport.read_engine(directory, _facts(trt, device_facts()))
    return TensorRTEngine(trt, directory / ENGINE_FILE, engine, f"rebuild it: {passport.rebuild_command()}")


def inspect(directory: str | Path) -> TensorRTFacts:
    """Facts of an engine directory: the sparsity report of its build (see `engines.sparsity.judgement`)."""
    directory = Path(directory)
    passport = load_passport(directory)
    passport.require_whole(directory)
    return TensorRTFacts(NAME, passport.requires, read_sparsity_report(directory))


def _runtime() -> TensorRT:
    try:
        return cast("TensorRT", importlib.import_module(MODULE))
    except ImportError as error:
        if getattr(error, "name", None) == MODULE:
            raise EngineUnavailable(f"TensorRT is not installed; {INSTALL}") from error
        raise EngineUnavailable(f"TensorRT is installed and cannot be loaded ({error}); {INSTALL}") from error


def _facts(trt: TensorRT, device: Mapping[str, str]) -> dict[str, str]:
    return {"tensorrt": trt.__version__, "gpu": device["gpu"], "compute_capability": device["compute_capability"]}


def _require_typing(model: ir.Model, version: str, onnx: Path) -> None:
    """A graph of ours made for the other kind of TensorRT would run slowly or not at all: refuse it."""
    strongly = int(version.split(".")[0]) >= STRONGLY_TYPED_SINCE
    target, opset = model.metadata_props.get("nxm.target"), model.opset_imports.get("")
    if not strongly and (opset or 0) > 17:
        raise EngineError(f"{onnx}: opset {opset}, and TensorRT {version} reads at most 17; export with --target trt8")
    if strongly and target == "trt8":
        raise EngineError(
            f"{onnx}: exported for the weakly typed TensorRT 8, and TensorRT {version} would run its float parts in "
            "float32; export with --target trt"
        )


def _require_gpu_memory(model: ir.Model, profiles: Sequence[Profile], onnx: Path) -> None:
    """Raise `EngineError` for a profile whose largest batch is clearly beyond the GPU: even with fused attention, which
    holds no scores."""
    from nxm_export.graph.run_memory import run_memory

    needed = {p.maximum: run_memory(model, *p.maximum, scores=False) for p in profiles}
    shape = max(needed, key=lambda shape: needed[shape])
    available = device_memory()
    if needed[shape] > available:
        raise EngineError(
            f"{onnx}: a batch of {shape[0]}x{shape[1]} (batch x sequence) needs at least {gigabytes(needed[shape])}, "
            f"and the GPU has {gigabytes(available)}; lower --max-batch-tokens, or give --profile with fewer rows"
        )


def _cache(options: BuildOptions, facts: Mapping[str, str]) -> TimingCacheRequest | None:
    if options.timing_cache is None:
        return None
    reason = usable_cache(options.timing_cache, facts)
    if reason is None:
        return TimingCacheRequest(str(options.timing_cache), options.require_timing_cache)
    if options.require_timing_cache:
        raise ArtifactError(
            f"{options.timing_cache} cannot be used as a timing cache: {reason}; delete it or leave --timing-cache out"
        )
    return None
