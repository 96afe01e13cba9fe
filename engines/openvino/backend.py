"""OpenVINO on the CPU: the engine file is the exported graph as it stands, symmetric INT8 pairs and all (weights that
lie in files beside it are taken in).

Everything that OpenVINO would choose by the machine is said: float layers run in float32 (its default is bfloat16
where the CPU has it, which is another network than the checkpoint's), one stream with a stated number of threads, or
as many streams of one thread, not pinned to cores (several engines in one server would be pinned to the same ones).
Shapes stay free; beside that model
the engine keeps one for every shape that it was built for (`engines.compiled_shapes`). All share the tables that are
only looked up.

Which products ran on integers is read off its execution graph, layer by layer: `products`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.base import (
    BackendCapabilities,
    Binding,
    BuildOptions,
    Closing,
    LoadOptions,
    as_bound,
    copy_companions,
    require_feeds,
    require_within,
    spec_of,
)
from engines.compiled_shapes import (
    Shape,
    cut,
    exact_shape,
    padded,
    padding_values,
    shapes_to_compile,
    smallest_holding,
)
from engines.devices import cpu_device
from engines.memory import tell_compiled_shapes
from engines.openvino.requests import RequestPool
from engines.passport import Bindings, BuildFacts, EnginePassport, load_passport
from engines.sample_inputs import sample_feeds, shape_at
from nxm_export.contract.io_spec import IOSpec
from nxm_export.contract.plan import CompressionPlan
from nxm_export.contract.quantizer_placement import names_in_graph
from nxm_export.errors import EngineError, EngineUnavailable
from nxm_export.storage.memory import require_memory

if TYPE_CHECKING:
    import onnx_ir as ir

    from engines.openvino.bindings import CompiledModel, Model, Port, RuntimeInfo

NAME = "openvino"
CAPABILITIES = BackendCapabilities("cpu", threads=True, throughput=True, runs_onnx=True, compiled_shapes=True)
ENGINE_FILE = "model.onnx"
PRECISION = "f32"
_PRODUCTS = ("FullyConnected", "MatMul")
_INTEGERS = ("i8", "u8")
_USE = re.compile(r"\.use\d+$")  # behind the name of a product whose weight another one reads, too
_TRANSPOSED = "/transpose_b"  # behind the name of a product: its weight as the kernel reads it


@dataclass(frozen=True)
class MatrixProduct:
    """A matrix product as it ran: the graph's name of it, the precision that its kernel computed in, the kernel."""

    name: str
    precision: str
    kernel: str


@dataclass(frozen=True)
class CompiledShape:
    """What runs at a shape that the engine keeps compiled: its layers, and how many products run on integers."""

    batch: int
    sequence: int
    integer_products: int
    layers: int


@dataclass(frozen=True)
class OpenVinoFacts:
    """Every matrix product with the precision that it runs in here, all layers by type and precision, and the same of
    every compiled shape in two numbers."""

    backend: str
    integer_products: int
    products: tuple[MatrixProduct, ...]
    operators: Mapping[str, int]
    task: str | None
    shapes: tuple[CompiledShape, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``."""
        return asdict(self)


@dataclass(frozen=True)
class _Layer:
    """A layer of an execution graph, in OpenVINO's words; `names` are the original ones, joined by commas, and `reads`
    the names of the layers that it reads."""

    kind: str
    precision: str
    kernel: str
    names: str
    reads: tuple[str, ...]

    @property
    def name(self) -> str:
        """The graph's name of it: of a product with a weight that of the weight's transpose, which has the product's
        own name where a fusion took it from the product itself."""
        transposed = next((name for name in self.reads[1:2] if name.endswith(_TRANSPOSED)), None)
        return self.names.partition(",")[0] if transposed is None else transposed.removesuffix(_TRANSPOSED)


@dataclass(frozen=True)
class CompiledModels:
    """A model that takes what the graph takes, and one for every shape known ahead; `streams` requests of each run at
    once."""

    free: CompiledModel
    shapes: Mapping[Shape, CompiledModel] = field(default_factory=dict)
    streams: int = 1


def build(onnx: str | Path, out: Path, options: BuildOptions = BuildOptions()) -> EnginePassport:
    """Write an engine directory: the graph unchanged but that it is one file, its passport and companions.

    The passport's options say which planned products run on integers here and which do not, in the model of free
    shapes and in every compiled one. Raises `EngineError`, `EngineUnavailable`, and `ArtifactError` for a file that is
    no ONNX graph.
    """
    _require_runtime()
    from nxm_export.graph.external_data import graph_files, has_external_data, save_in_one_file
    from nxm_export.graph.reading.graph_weights import load_graph, sparse_tensors
    from nxm_export.graph.verifier import embedded_plan

    onnx = Path(onnx)
    model = load_graph(onnx)
    source = graph_files(model, onnx)
    if has_external_data(model) or sparse_tensors(model):  # it reads neither
        save_in_one_file(model, out / ENGINE_FILE, onnx)
    else:
        shutil.copyfile(onnx, out / ENGINE_FILE)
    copy_companions(onnx.parent, out)
    names = [value.name for value in model.graph.inputs]
    graph = read_model(onnx, (out / ENGINE_FILE).read_bytes())
    shapes = shapes_to_compile(options.shapes, _bindings(graph.inputs, names), spec_of(out))
    shapes_bytes = tell_compiled_shapes(onnx, model, shapes)
    models = compile_models(onnx, graph, options.threads, shapes)
    plan = embedded_plan(model, str(onnx))
    planned = _planned(model, plan) if plan else []
    integer, in_float = _split(planned, [products(compiled) for compiled in (models.free, *models.shapes.values())])
    facts = BuildFacts(
        device=cpu_device(),
        requires={},  # ONNX files run on any machine and version
        options={
            "threads": options.threads,
            "shapes": shapes,
            "shapes_bytes": shapes_bytes,
            "precision": PRECISION,
            "planned_products": len(planned),
            "integer_products": len(integer),
            "float_products": in_float,
        },
        graph=model.metadata_props,
        source=source,
        bindings=Bindings(
            _bindings(models.free.inputs, names),
            _bindings(models.free.outputs, [value.name for value in model.graph.outputs]),
        ),
    )
    return EnginePassport.issue(NAME, out / ENGINE_FILE, onnx, facts)


def load(directory: str | Path, options: LoadOptions = LoadOptions()) -> OpenVinoEngine:
    """Load an engine directory; without a number of threads anywhere all cores of this process work."""
    directory = Path(directory)
    passport = load_passport(directory)
    models = _load(directory, passport, passport.read_engine(directory, {}), options)
    return OpenVinoEngine(directory, models, spec_of(directory), passport.bindings)


class OpenVinoEngine(Closing):
    """A compiled model with an inference request for every run at once, and such for shapes known ahead. See
    `engines.base.Engine`."""

    def __init__(self, directory: Path, models: CompiledModels, spec: IOSpec | None, recorded: Bindings) -> None:
        """`recorded` are the inputs and outputs of the graph, whose names count where the runtime has several."""
        self.directory, self._spec = directory, spec
        self._bindings = _bindings(models.free.inputs, [binding.name for binding in recorded.inputs])
        self.inputs = tuple(binding.name for binding in self._bindings)
        outputs = _bindings(models.free.outputs, [binding.name for binding in recorded.outputs])
        self.outputs = tuple(binding.name for binding in outputs)
        self.runs_at_once = models.streams
        self._requests: RequestPool | None = RequestPool(models.free, models.streams)
        self._compiled = {shape: RequestPool(compiled, models.streams) for shape, compiled in models.shapes.items()}
        self._pads = padding_values(self._bindings, self._spec, self.outputs) if self._compiled else None

    @property
    def input_bindings(self) -> tuple[Binding, ...]:
        """The inputs as the engine file has them."""
        return self._bindings

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, of the compiled shape that `compiled_shape` names or of the model that takes any."""
        requests, compiled = self._requests, self._compiled
        if requests is None:
            raise EngineError(f"{self.directory}: this engine was closed")
        require_feeds(self, feeds)
        require_within(self._spec, feeds)
        shape = self.compiled_shape(feeds)
        if shape is None:
            return self._infer(requests, feeds)
        if self._pads is None:
            return self._infer(compiled[shape], feeds)
        rows, length = next(iter(feeds.values())).shape
        if shape == (rows, length):
            return self._infer(compiled[shape], feeds)
        outputs = self._infer(compiled[shape], padded(feeds, shape, self._pads))
        axes = {} if self._spec is None else self._spec.outputs
        return {name: cut(array, axes[name], rows, length) for name, array in outputs.items()}

    def compiled_shape(self, feeds: Mapping[str, np.ndarray]) -> Shape | None:
        """The compiled shape (batch, sequence) that runs `feeds`: of their sizes, or a larger one that they are padded
        to; None: the model that takes any shape."""
        if self._pads is None:
            return exact_shape(self._compiled, self._bindings, feeds)
        return smallest_holding(self._compiled, *next(iter(feeds.values())).shape)

    def _infer(self, requests: RequestPool, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        contiguous = {
            binding.name: np.ascontiguousarray(as_bound(binding, feeds[binding.name])) for binding in self._bindings
        }
        try:
            with requests.free() as request:
                request.infer(contiguous, share_inputs=True)
                return {  # copies: the next run writes there
                    name: np.array(request.get_output_tensor(index).data, np.float32)
                    for index, name in enumerate(self.outputs)
                }
        except RuntimeError as error:
            raise EngineError(f"{self.directory}: OpenVINO failed: {_in_a_line(error)}") from error

    def close(self) -> None:
        """Drop the requests and with them the models."""
        self._requests = None
        self._compiled = {}


def inspect(directory: str | Path) -> OpenVinoFacts:
    """Facts of an engine directory: every matrix product with the precision it runs in here, and all layers by type."""
    directory = Path(directory)
    passport, spec = load_passport(directory), spec_of(directory)
    models = _load(directory, passport, passport.read_engine(directory, {}))
    multiplied = tuple(products(models.free))
    counts: dict[str, int] = {}
    for layer in _layers(models.free):
        key = f"{layer.kind} {layer.precision}"
        counts[key] = counts.get(key, 0) + 1
    task, by_type = spec.task if spec else None, dict(sorted(counts.items()))
    shapes = tuple(
        CompiledShape(*shape, _integers(products(compiled)), len(_layers(compiled)))
        for shape, compiled in models.shapes.items()
    )
    return OpenVinoFacts(NAME, _integers(multiplied), multiplied, by_type, task, shapes)


def _integers(multiplied: Iterable[MatrixProduct]) -> int:
    return sum(product.precision in _INTEGERS for product in multiplied)


def products(compiled: CompiledModel) -> list[MatrixProduct]:
    """The matrix products of a compiled model as its execution graph has them, after a run where one can be made up."""
    inputs = _bindings(compiled.inputs, ())
    with contextlib.suppress(EngineError, RuntimeError):  # values that a graph of others does not take
        feeds = sample_feeds(inputs, 1, 8, None)  # kernels for free shapes are chosen at the first run
        compiled.create_infer_request().infer({each.name: as_bound(each, feeds[each.name]) for each in inputs})
    return [
        MatrixProduct(layer.name, layer.precision, layer.kernel)
        for layer in _layers(compiled)
        if layer.kind in _PRODUCTS
    ]


def _layers(compiled: CompiledModel) -> list[_Layer]:
    """Every layer of the execution graph."""
    layers = []
    for operation in compiled.get_runtime_model().get_ordered_ops():
        facts = operation.get_rt_info()

        def text(key: str, facts: RuntimeInfo = facts) -> str:
            value = facts[key] if key in facts else ""  # noqa: SIM401 (this map has no get)
            return str(getattr(value, "value", value))

        reads = tuple(value.get_node().get_friendly_name() for value in operation.input_values())
        facts_of = (text("layerType"), text("runtimePrecision"), text("primitiveType"), text("originalLayersNames"))
        layers.append(_Layer(*facts_of, reads))
    return layers


def _planned(model: ir.Model, plan: CompressionPlan) -> list[str]:
    """The matrices of a graph that are planned in integers: the plan's, and of a fused one that is split its parts."""
    present = {f"{node.name}.weight" for node in model.graph}
    whole = [name for name, spec in plan.weights.items() if spec.weight_bits]
    return [part for name in whole for part in names_in_graph(plan, name, present)]


def _split(planned: list[str], models: list[list[MatrixProduct]]) -> tuple[list[str], list[str]]:
    """(planned weights all of whose products run on integers in each of several models, those of which one does not or
    is not to be found in one of them), by the products of each."""
    integer: list[dict[str, bool]] = []
    for multiplied in models:
        integer.append({})
        for product in multiplied:
            name = _USE.sub("", product.name.partition("/")[0])
            integer[-1][name] = integer[-1].get(name, True) and product.precision in _INTEGERS
    names = {name: all(found.get(name.removesuffix(".weight"), False) for found in integer) for name in planned}
    return [name for name, runs in names.items() if runs], [name for name, runs in names.items() if not runs]


def _require_runtime() -> None:
    try:
        import openvino  # noqa: F401
    except ModuleNotFoundError as error:
        raise EngineUnavailable("OpenVINO is not installed; pip install 'nxm-export[openvino]'") from error
    except ImportError as error:  # a library that it needs, or memory to map its own
        raise EngineUnavailable(f"OpenVINO is installed and cannot be loaded ({error})") from error


def settings(threads: int | None, streams: int = 1) -> dict[str, str | int | bool]:
    """What every model is compiled with: the threads of all streams (None: all cores of this process), and the streams,
    which are the requests that run at once."""
    return {
        "INFERENCE_PRECISION_HINT": PRECISION,
        "INFERENCE_NUM_THREADS": threads or len(os.sched_getaffinity(0)),
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": streams,
        "ENABLE_CPU_PINNING": False,
    }


def _load(
    directory: Path, passport: EnginePassport, model: bytes, options: LoadOptions = LoadOptions()
) -> CompiledModels:
    """The models of an engine directory, from the bytes of its file."""
    if passport.shapes:
        require_memory(
            passport.whole_option("shapes_bytes") or 0,
            f"{directory}: loading it with its {len(passport.shapes)} compiled shapes",
            "build it with fewer of --shape",
        )
    file, (streams, threads) = directory / ENGINE_FILE, options.runs(passport.threads)
    return compile_models(file, read_model(file, model), streams * threads, passport.shapes, streams)


def read_model(file: Path, model: bytes | Path) -> Model:
    """The graph of an ONNX file's bytes, or of a file of OpenVINO's own; `file` is what errors name."""
    _require_runtime()
    import openvino

    try:
        graph: Model = openvino.Core().read_model(*((str(model),) if isinstance(model, Path) else (model, b"")))
    except RuntimeError as error:
        raise EngineError(f"{file}: OpenVINO cannot load it: {_in_a_line(error)}") from error
    for port in graph.inputs:
        shape = port.get_partial_shape()
        if shape.is_static and 0 in [length.get_length() for length in shape]:  # it divides by it, and dies
            raise EngineError(
                f"{file}: input {port.get_any_name()} has the fixed shape {shape}: there is nothing to run"
            )
    return graph


def compile_models(
    file: Path, graph: Model, threads: int | None, shapes: Sequence[Shape] = (), streams: int = 1
) -> CompiledModels:
    """`graph` compiled as it is, and for each of `shapes`, with `settings`; `file` is what errors name."""
    import openvino

    core = openvino.Core()
    bindings = _bindings(graph.inputs, ())
    at = ""
    try:
        free: CompiledModel = core.compile_model(graph, "CPU", settings(threads, streams))
        compiled: dict[Shape, CompiledModel] = {}
        for shape in shapes:
            at = f" for the shape {shape[0]}x{shape[1]}"
            fixed = graph.clone()
            fixed.reshape({each.name: list(shape_at(each, *shape)) for each in bindings if each.shape})
            compiled[shape] = core.compile_model(fixed, "CPU", settings(threads, streams))
    except RuntimeError as error:
        raise EngineError(f"{file}: OpenVINO cannot load it{at}: {_in_a_line(error)}") from error
    return CompiledModels(free, compiled, streams)


def _in_a_line(error: RuntimeError) -> str:
    """OpenVINO's words without the places in its source that they come from."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return "; ".join(said or lines)


def _bindings(ports: Sequence[Port], names: Collection[str | None]) -> tuple[Binding, ...]:
    """A model's inputs or outputs. A port may have several names, as behind an Identity: it is the one in `names`,
    those of the graph, that counts."""
    return tuple(_binding(port, names) for port in ports)


def _binding(port: Port, names: Collection[str | None]) -> Binding:
    """A model's input or output; sizes that are not fixed are free, and one whose number of axes is has none."""
    sizes = port.get_partial_shape()
    shape = () if sizes.rank.is_dynamic else tuple(size.get_length() if size.is_static else -1 for size in sizes)
    name = next((name for name in sorted(port.get_names()) if name in names), port.get_any_name())
    return Binding(name, np.dtype(port.get_element_type().to_dtype()).name, shape)
