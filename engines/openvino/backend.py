"""OpenVINO on the CPU: the engine file is the exported graph as it stands, symmetric INT8 pairs and all.

Everything that OpenVINO would choose by the machine is said: float layers run in float32 (its default is bfloat16 where
the CPU has it, which is another network than the checkpoint's), one stream with a stated number of threads, not pinned to
cores (several engines in one server would be pinned to the same ones). Shapes stay free.

Which products ran on integers is read off its execution graph, layer by layer: `products`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import (
    Binding,
    BuildOptions,
    Closing,
    copy_companions,
    require_feeds,
    require_within,
    spec_of,
)
from engines.passport import EnginePassport, cpu_device, load_passport
from nxm_export.errors import EngineError, EngineUnavailable

NAME = "openvino"
ENGINE_FILE = "model.onnx"
PRECISION = "f32"
_PRODUCTS = ("FullyConnected", "MatMul")
_INTEGERS = ("i8", "u8")


@dataclass(frozen=True)
class Product:
    """A matrix product as it ran: the graph's name of it, the precision that its kernel computed in, the kernel."""

    name: str
    precision: str
    kernel: str


def build(onnx: str | Path, out: Path, options: BuildOptions = BuildOptions()) -> EnginePassport:
    """Write an engine directory: the graph unchanged, its passport and companions.

    The passport's options say which planned products run on integers here and which do not. Raises `EngineError`,
    `EngineUnavailable`, and `ArtifactError` for a file that is no ONNX graph.
    """
    _runtime()
    from nxm_export.graph.graph_weights import load_graph
    from nxm_export.graph.verifier import embedded_plan

    onnx = Path(onnx)
    model = load_graph(onnx)
    if onnx.with_name(f"{onnx.name}.data").exists():
        raise EngineError(f"{onnx}: weights beside the file (over 2 GB) do not fit into one, which an engine has to be")
    shutil.copyfile(onnx, out / ENGINE_FILE)
    copy_companions(onnx.parent, out)
    compiled = _compile(out / ENGINE_FILE, (out / ENGINE_FILE).read_bytes(), options.threads)
    plan = embedded_plan(model, str(onnx))
    planned = [name for name, spec in plan.weights.items() if spec.weight_bits] if plan else []
    integer, in_float = _split(planned, products(compiled))
    return EnginePassport.issue(
        NAME,
        out / ENGINE_FILE,
        onnx,
        device=cpu_device(),
        requires={},  # ONNX files run on any machine and version
        options={
            "threads": options.threads,
            "precision": PRECISION,
            "planned_products": len(planned),
            "integer_products": len(integer),
            "float_products": in_float,
        },
        graph=model.metadata_props,
        bindings={
            "inputs": [asdict(_binding(port)) for port in compiled.inputs],
            "outputs": [asdict(_binding(port)) for port in compiled.outputs],
        },
    )


def load(directory: str | Path, *, threads: int | None = None) -> OpenVinoEngine:
    """Load an engine directory; `threads` overrides what it was built with (None there means all cores of this process)."""
    directory = Path(directory)
    passport = load_passport(directory)
    return OpenVinoEngine(directory, passport.read_engine(directory, {}), threads or passport.options.get("threads"))


class OpenVinoEngine(Closing):
    """A compiled model with one inference request. See `engines.base.Engine`."""

    def __init__(self, directory: Path, model: bytes, threads: int | None) -> None:
        self.directory = directory
        self._spec = spec_of(directory)
        compiled = _compile(directory / ENGINE_FILE, model, threads)
        self.inputs = tuple(_name(port) for port in compiled.inputs)
        self.outputs = tuple(_name(port) for port in compiled.outputs)
        self._request: Any = compiled.create_infer_request()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        if self._request is None:
            raise EngineError(f"{self.directory}: this engine was closed")
        require_feeds(self, feeds)
        require_within(self._spec, feeds)
        contiguous = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        try:
            self._request.infer(contiguous, share_inputs=True)
            return {
                name: np.array(
                    self._request.get_output_tensor(index).data, np.float32
                )  # a copy: the next run writes there
                for index, name in enumerate(self.outputs)
            }
        except RuntimeError as error:
            raise EngineError(f"{self.directory}: OpenVINO failed: {error}") from error

    def close(self) -> None:
        """Drop the request and with it the model."""
        self._request = None


def inspect(directory: str | Path) -> dict[str, Any]:
    """Facts of an engine directory: every matrix product with the precision it runs in here, and all layers by type."""
    directory = Path(directory)
    passport, spec = load_passport(directory), spec_of(directory)
    compiled = _compile(directory / ENGINE_FILE, passport.read_engine(directory, {}), passport.options.get("threads"))
    found = products(compiled)
    counts: dict[str, int] = {}
    for layer in _layers(compiled):
        key = f"{layer['layerType']} {layer['runtimePrecision']}"
        counts[key] = counts.get(key, 0) + 1
    return {
        "backend": NAME,
        "integer_products": sum(product.precision in _INTEGERS for product in found),
        "products": [asdict(product) for product in found],
        "operators": dict(sorted(counts.items())),
        "task": spec.task if spec else None,
    }


def products(compiled: Any) -> list[Product]:
    """The matrix products of a compiled model as its execution graph has them, after a run where one can be made up."""
    inputs = [port.get_partial_shape() for port in compiled.inputs]
    if all(len(shape) == 2 for shape in inputs):  # kernels for free shapes are chosen at the first run
        ones = {_name(port): np.ones((1, 8), port.get_element_type().to_dtype()) for port in compiled.inputs}
        compiled.create_infer_request().infer(ones)
    return [
        Product(layer["originalLayersNames"].partition(",")[0], layer["runtimePrecision"], layer["primitiveType"])
        for layer in _layers(compiled)
        if layer["layerType"] in _PRODUCTS
    ]


def _layers(compiled: Any) -> list[dict[str, str]]:
    """Type, precision, kernel and original names of every layer of the execution graph."""
    wanted = ("layerType", "runtimePrecision", "primitiveType", "originalLayersNames")
    found = []
    for layer in compiled.get_runtime_model().get_ordered_ops():
        facts = layer.get_rt_info()
        values = {key: facts[key] if key in facts else "" for key in wanted}  # noqa: SIM401 (this map has no get)
        found.append({key: str(getattr(value, "value", value)) for key, value in values.items()})
    return found


def _split(planned: list[str], found: list[Product]) -> tuple[list[str], list[str]]:
    """(planned weights whose products run on integers, those that do not or are not to be found)."""
    integer = {product.name.partition("/")[0] for product in found if product.precision in _INTEGERS}
    names = {name: name.removesuffix(".weight") in integer for name in planned}
    return [name for name, runs in names.items() if runs], [name for name, runs in names.items() if not runs]


def _runtime() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise EngineUnavailable("OpenVINO is not installed; pip install 'nxm-export[openvino]'") from error
    return openvino


def settings(threads: int | None) -> dict[str, Any]:
    """What every model is compiled with; None is all cores of this process."""
    return {
        "INFERENCE_PRECISION_HINT": PRECISION,
        "INFERENCE_NUM_THREADS": threads or len(os.sched_getaffinity(0)),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }


def _compile(file: Path, model: bytes, threads: int | None) -> Any:
    core = _runtime().Core()
    try:
        return core.compile_model(core.read_model(model, b""), "CPU", settings(threads))
    except RuntimeError as error:
        raise EngineError(f"{file}: OpenVINO cannot load it: {error}") from error


def _name(port: Any) -> str:
    return str(port.get_any_name())


def _binding(port: Any) -> Binding:
    """A model's input or output; sizes that are not fixed are free."""
    shape = tuple(size.get_length() if size.is_static else -1 for size in port.get_partial_shape())
    return Binding(_name(port), np.dtype(port.get_element_type().to_dtype()).name, shape)
