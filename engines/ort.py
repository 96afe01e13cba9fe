"""ONNX Runtime on the CPU: the engine that runs anywhere.

Build rewrites the graph's symmetric INT8 activations to UINT8 with zero point 128, which changes no result
(``q_u8 = q_s8 + 128``, same scale) and lets ONNX Runtime fuse every linear layer into an integer product: its kernels
for x86 take unsigned activations and signed weights, and with signed activations most layers would run in float.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import Binding, BuildOptions, Closing, copy_companions, require_feeds, require_length
from engines.passport import EnginePassport, cpu_device, load_passport
from nxm_export.errors import ArtifactError, EngineError, EngineUnavailable
from nxm_export.spec import load_spec

NAME = "ort"
ENGINE_FILE = "model.onnx"


def build(onnx: str | Path, out: Path, options: BuildOptions = BuildOptions()) -> EnginePassport:
    """Write an engine directory: the rewritten graph, its passport and companions. Raises `EngineError`."""
    from nxm_export.weights import load_graph

    _runtime()
    onnx = Path(onnx)
    model = load_graph(onnx)
    rewritten = unsigned_activations(model)
    import onnx_ir as ir

    ir.save(model, out / ENGINE_FILE)
    copy_companions(onnx.parent, out)
    session = _session(out / ENGINE_FILE, options.threads)  # refuses here what it would refuse on every start
    return EnginePassport.issue(
        NAME,
        out / ENGINE_FILE,
        onnx,
        device=cpu_device(),
        requires={},  # ONNX files run on any machine and version
        options={"threads": options.threads, "unsigned_activations": rewritten},
        graph=model.metadata_props,
        bindings={
            "inputs": [asdict(_binding(value)) for value in session.get_inputs()],
            "outputs": [asdict(_binding(value)) for value in session.get_outputs()],
        },
    )


def load(directory: str | Path, *, threads: int | None = None) -> OrtEngine:
    """Load an engine directory; `threads` overrides what it was built with (None there means all physical cores)."""
    directory = Path(directory)
    passport = load_passport(directory)
    return OrtEngine(directory, passport.read_engine(directory, {}), threads or passport.options.get("threads"))


class OrtEngine(Closing):
    """A session on an engine directory. See `engines.base.Engine`."""

    def __init__(self, directory: Path, model: bytes, threads: int | None) -> None:
        self.directory = directory
        self._max_length = load_spec(directory).max_length
        self._session: Any = _session(directory / ENGINE_FILE, threads, model=model)
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        if self._session is None:
            raise EngineError(f"{self.directory}: this engine was closed")
        require_feeds(self, feeds)
        require_length(self._max_length, feeds)
        try:
            return dict(zip(self.outputs, self._session.run(None, dict(feeds)), strict=True))
        except Exception as error:  # onnxruntime raises its own types, which are no stable API
            raise EngineError(f"{self.directory}: ONNX Runtime failed: {error}") from error

    def close(self) -> None:
        """Drop the session."""
        self._session = None


def inspect(directory: str | Path) -> dict[str, Any]:
    """Facts of an engine directory: the fused operators that ONNX Runtime makes of the graph, by type."""
    import tempfile

    directory = Path(directory)
    passport = load_passport(directory)
    passport.require_here(directory, {})
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "optimized.onnx"
        _session(directory / ENGINE_FILE, passport.options.get("threads"), optimized=file)
        from nxm_export.weights import load_graph

        counts: dict[str, int] = {}
        for node in load_graph(file).graph:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    integer = sum(
        counts.get(op, 0)
        for op in ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul", "MatMulInteger")
    )
    return {
        "backend": NAME,
        "integer_products": integer,
        "operators": dict(sorted(counts.items())),
        "spec": load_spec(directory).task,
    }


def unsigned_activations(model: Any) -> int:
    """Rewrite every INT8 activation pair with zero point 0 to UINT8 with zero point 128, in place; returns the pairs.

    Exact: codes move by 128 and so does the zero point. Pairs on weights stay signed.
    """
    import onnx_ir as ir

    zero = ir.Value(name="nxm_zero_point_u8", const_value=ir.tensor(np.array(128, np.uint8), name="nxm_zero_point_u8"))
    zero.dtype, zero.shape = ir.DataType.UINT8, ir.Shape([])
    count = 0
    for node in model.graph:
        if node.op_type != "QuantizeLinear" or node.inputs[0].const_value is not None:
            continue
        old = (
            ir.convenience.get_const_tensor(node.inputs[2])
            if len(node.inputs) > 2 and node.inputs[2] is not None
            else None
        )
        if old is None or old.dtype != ir.DataType.INT8 or np.any(old.numpy()):
            continue
        readers = [user for user in node.outputs[0].consumers() if user.op_type == "DequantizeLinear"]
        if len(readers) != len(node.outputs[0].consumers()):
            continue
        for pair_half in (node, *readers):
            pair_half.replace_input_with(2, zero)
        node.outputs[0].dtype = ir.DataType.UINT8
        count += 1
    if count:
        model.graph.register_initializer(zero)
    return count


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineUnavailable("ONNX Runtime is not installed; pip install 'nxm-export[ort]'") from error
    return onnxruntime


def _binding(value: Any) -> Binding:
    """A session's input or output; sizes with a name are free."""
    element = value.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    return Binding(value.name, {"float": "float32", "double": "float64"}.get(element, element), shape)


def _session(file: Path, threads: int | None, optimized: Path | None = None, model: bytes | None = None) -> Any:
    """A session on `file`, or on the bytes `model` that were read from it."""
    runtime = _runtime()
    if not file.is_file():
        raise ArtifactError(f"{file}: no such engine")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return runtime.InferenceSession(model or str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own types, which are no stable API
        raise EngineError(f"{file}: ONNX Runtime cannot load it: {error}") from error
