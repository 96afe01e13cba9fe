"""ONNX Runtime on the CPU: the engine that runs anywhere.

Build rewrites the graph's symmetric INT8 activations to UINT8 with zero point 128, which changes no result
(``q_u8 = q_s8 + 128``, same scale) and lets every linear layer run as an integer product: the kernels for x86 take
unsigned activations and signed weights, and with signed activations most layers would run in float. Products and
attention then become operators of ONNX Runtime's own (`engines.ort.graph_rewrites`), and an optimization of the runtime
that costs more than it saves is left out (`SLOW_FUSIONS`). What each is worth was measured: docs/performance.md.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

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
from engines.devices import cpu_device
from engines.ort.graph_rewrites import fused_attention, integer_products, plain_attention
from engines.passport import Bindings, BuildFacts, EnginePassport, load_passport
from nxm_export.errors import ArtifactError, EngineError, EngineUnavailable, notice

if TYPE_CHECKING:
    import onnx_ir as ir

NAME = "ort"
CAPABILITIES = BackendCapabilities("cpu", threads=True, throughput=True, runs_onnx=True, holds_scores=True)
ENGINE_FILE = "model.onnx"
# ONNX Runtime 1.32 on x86-64: SkipLayerNormalization takes three times as long as the Add and the LayerNormalization
# that it replaces, and BiasGelu twice as long as Add and Gelu.
SLOW_FUSIONS = ("SkipLayerNormFusion", "BiasGeluFusion")
# ONNX Runtime 1.32, at its basic level: of a Gemm or Conv between two pairs it rounds the bias to the product of both
# scales, which is coarse for weights of few bits, and a float weight to INT8. Nobody planned that. Without it such a
# product runs in float, unless it has codes and no bias.
UNPLANNED_ROUNDING = ("WeightBiasQuantization",)
LEFT_OUT = (*SLOW_FUSIONS, *UNPLANNED_ROUNDING)  # of every engine
FUSED_ATTENTION = ("MultiHeadAttention", "Attention")
ONNX_ATTENTION_SINCE = (1, 24)  # the runtime whose ``Attention`` of ONNX was tried here
_SINCE = ".".join(map(str, ONNX_ATTENTION_SINCE))
INTEGER_PRODUCTS = ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul", "MatMulInteger")


class SessionValue(Protocol):
    """An input or output of a session (``onnxruntime.NodeArg``): type as ``tensor(int64)``, sizes or their names."""

    name: str
    type: str
    shape: Sequence[int | str | None]


class Session(Protocol):
    """What is used of ``onnxruntime.InferenceSession``."""

    def get_inputs(self) -> Sequence[SessionValue]:
        """The graph's inputs, in their order."""
        ...

    def get_outputs(self) -> Sequence[SessionValue]:
        """The graph's outputs, in their order."""
        ...

    def run(self, names: None, feeds: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
        """All outputs, in their order."""
        ...

    def end_profiling(self) -> str:
        """End the profile of a session that was opened with one; returns its file."""
        ...


@dataclass(frozen=True)
class OrtFacts:
    """The operators that ONNX Runtime makes of a graph, by type, how many of them multiply integers, and how many
    attentions run as one operator and as operators of their own."""

    backend: str
    integer_products: int
    fused_attention: int
    plain_attention: int
    operators: Mapping[str, int]
    task: str | None

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``."""
        return asdict(self)


def build(onnx: str | Path, out: Path, options: BuildOptions = BuildOptions()) -> EnginePassport:
    """Write an engine directory: the rewritten graph, its passport and companions.

    Raises `EngineError`, `EngineUnavailable`, and `ArtifactError` for a file that is no ONNX graph.
    """
    _require_runtime()
    from nxm_export.graph.external_data import graph_files, save_in_one_file
    from nxm_export.graph.reading.graph_weights import load_graph

    onnx = Path(onnx)
    model = load_graph(onnx)
    source = graph_files(model, onnx)
    activations, products = unsigned_activations(model), integer_products(model)
    oldest = _oldest(options.oldest_onnxruntime)
    attention = fused_attention(model, onnx_attention=oldest >= ONNX_ATTENTION_SINCE)
    rewrites = {
        "unsigned_activations": activations,
        "integer_products": products,
        "fused_attention": attention.fused,
        "rotary_attention": attention.rotary,  # of the fused ones
        "plain_attention": attention.plain,
        "onnx_attention": sum(node.op_type == "Attention" and not node.domain for node in model.graph),
    }
    save_in_one_file(model, out / ENGINE_FILE, onnx)
    copy_companions(onnx.parent, out)
    # What it would refuse on every start, it refuses here.
    try:
        session = open_session(out / ENGINE_FILE, options.threads, LEFT_OUT)
    except EngineError as error:  # of the file that was given, not of the one that goes again
        raise EngineError(str(error).replace(str(out / ENGINE_FILE), str(onnx))) from error
    facts = BuildFacts(
        device=cpu_device(),
        requires={},  # ONNX files run on any machine, and on any version that has their operators
        options={"threads": options.threads, **rewrites, "disabled_optimizers": list(LEFT_OUT)},
        graph=model.metadata_props,
        source=source,
        bindings=Bindings(
            input_bindings(session),
            tuple(_binding(value) for value in session.get_outputs()),
        ),
    )
    return EnginePassport.issue(NAME, out / ENGINE_FILE, onnx, facts)


def load(directory: str | Path, options: LoadOptions = LoadOptions()) -> OrtEngine:
    """Load an engine directory; without a number of threads anywhere all cores of this process work."""
    directory = Path(directory)
    passport = load_passport(directory)
    _require_runtime()
    _require_attention(directory, passport)
    return OrtEngine(directory, passport.read_engine(directory, {}), passport, options)


class OrtEngine(Closing):
    """A session on an engine directory. See `engines.base.Engine`."""

    def __init__(
        self, directory: Path, model: bytes, passport: EnginePassport, options: LoadOptions = LoadOptions()
    ) -> None:
        self.directory = directory
        self._spec = spec_of(directory)
        # A session of one thread computes in the thread that calls it, so one session serves them all.
        self.runs_at_once, threads = options.runs(passport.threads)
        session = open_session(directory / ENGINE_FILE, threads, left_out(passport), model=model)
        self._session: Session | None = session
        self._bindings = input_bindings(session)
        self.inputs = tuple(binding.name for binding in self._bindings)
        self.outputs = tuple(value.name for value in session.get_outputs())

    @property
    def input_bindings(self) -> tuple[Binding, ...]:
        """The inputs as the engine file has them."""
        return self._bindings

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        session = self._session
        if session is None:
            raise EngineError(f"{self.directory}: this engine was closed")
        require_feeds(self, feeds)
        require_within(self._spec, feeds)
        bound = {binding.name: as_bound(binding, feeds[binding.name]) for binding in self._bindings}
        try:
            outputs = session.run(None, bound)
        except Exception as error:  # onnxruntime raises its own types, which are no stable API
            raise EngineError(f"{self.directory}: ONNX Runtime failed: {error}") from error
        return {name: array.astype(np.float32, copy=False) for name, array in zip(self.outputs, outputs, strict=True)}

    def close(self) -> None:
        """Drop the session."""
        self._session = None


def inspect(directory: str | Path) -> OrtFacts:
    """Facts of an engine directory: the fused operators that ONNX Runtime makes of the graph, by type."""
    directory = Path(directory)
    passport, spec = load_passport(directory), spec_of(directory)
    passport.require_here(directory, {})
    _require_runtime()
    _require_attention(directory, passport)
    graph = optimized_graph(directory / ENGINE_FILE, passport)
    counts = _by_type(graph)
    integer = sum(counts.get(operator, 0) for operator in INTEGER_PRODUCTS)
    fused = sum(counts.get(operator, 0) for operator in FUSED_ATTENTION)
    by_type = dict(sorted(counts.items()))
    return OrtFacts(NAME, integer, fused, plain_attention(graph), by_type, spec.task if spec else None)


def operators(file: Path, passport: EnginePassport, *, level: str | None = None) -> dict[str, int]:
    """How many operators of each type ONNX Runtime runs for an ONNX file, loaded as an engine of `passport`, or with
    every optimizer of a `level`."""
    return _by_type(optimized_graph(file, passport, level=level))


def _by_type(graph: ir.Graph) -> dict[str, int]:
    return dict(Counter(node.op_type for node in graph))


def optimized_graph(file: Path, passport: EnginePassport, *, level: str | None = None) -> ir.Graph:
    """What ONNX Runtime runs for an ONNX file, loaded as an engine of `passport`, or with every optimizer of a
    `level`."""
    import tempfile

    from nxm_export.graph.reading.graph_weights import load_graph

    with tempfile.TemporaryDirectory() as scratch:
        optimized = Path(scratch) / "optimized.onnx"
        without = left_out(passport) if level is None else ()
        open_session(file, passport.threads, without, optimized=optimized, level=level)
        return load_graph(optimized).graph


def left_out(passport: EnginePassport) -> list[str]:
    """The optimizers that an engine is loaded without, by its passport."""
    names = passport.options.get("disabled_optimizers", ())
    if not isinstance(names, (list, tuple)):
        raise ArtifactError(
            f"passport.json: options.disabled_optimizers must be a list, got {names!r}; build the engine again"
        )
    return [str(name) for name in names]


def unsigned_activations(model: ir.Model) -> int:
    """Rewrite every INT8 activation pair with zero point 0 to UINT8 with zero point 128, in place; returns the pairs.

    Exact: codes move by 128 and so does the zero point. Pairs on weights stay signed, and so do codes that anything
    but a DequantizeLinear reads.
    """
    import onnx_ir as ir

    tensor = ir.tensor(np.array(128, np.uint8), name="nxm_zero_point_u8")
    zero = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape([]))
    count = 0
    for node in model.graph.all_nodes():
        if node.op_type != "QuantizeLinear" or node.inputs[0] is None or node.inputs[0].const_value is not None:
            continue
        codes, readers = node.outputs[0], node.outputs[0].consumers()
        if codes.is_graph_output() or any(user.op_type != "DequantizeLinear" for user in readers):
            continue
        if not all(_is_signed_zero(half) for half in (node, *readers)):
            continue
        for half in (node, *readers):
            half.resize_inputs(3)
            half.replace_input_with(2, zero)
        node.attributes.pop("output_dtype", None)
        codes.dtype = ir.DataType.UINT8
        count += 1
    if count:
        model.graph.register_initializer(zero)
    return count


def _is_signed_zero(node: ir.Node) -> bool:
    """True when a QuantizeLinear states one zero point, INT8 and 0; a DequantizeLinear may leave it out."""
    import onnx_ir as ir

    if len(node.inputs) < 3 or node.inputs[2] is None:
        return node.op_type == "DequantizeLinear"
    zero = ir.convenience.get_const_tensor(node.inputs[2])
    return zero is not None and zero.dtype == ir.DataType.INT8 and zero.size == 1 and not np.any(zero.numpy())


def _require_runtime() -> None:
    try:
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError as error:
        raise EngineUnavailable("ONNX Runtime is not installed; pip install 'nxm-export[ort]'") from error
    except ImportError as error:  # a library that it needs, or memory to map its own
        raise EngineUnavailable(f"ONNX Runtime is installed and cannot be loaded ({error})") from error


def wants_newer_runtime(passport: EnginePassport) -> bool:
    """Whether an engine has operators that older ONNX Runtimes lack, such as that of Triton's container 24.10."""
    return bool(passport.whole_option("onnx_attention"))


def notice_runtime(directory: Path, passport: EnginePassport) -> None:
    """Say so where an engine that goes to another place wants a newer ONNX Runtime there than it may have."""
    if wants_newer_runtime(passport):
        notice(
            f"{directory}: wants onnxruntime {_SINCE} or later in Triton's container, which 24.10 does not have; for "
            "an older one, build the engine with --onnxruntime 1.19"
        )


def _oldest(asked: str | None) -> tuple[int, int]:
    """(major, minor) of the oldest ONNX Runtime that an engine is for: the installed one, or one that is `asked` for
    and older; raises `EngineError` for what is no version."""
    if asked is None:
        return _installed()
    version = re.fullmatch(r"(\d{1,4})\.(\d{1,4})(\.\d{1,9})?", asked, re.ASCII)
    if version is None:
        raise EngineError(f"{asked!r} is no version of onnxruntime; give it as 1.19 or 1.19.2")
    return min(_installed(), (int(version[1]), int(version[2])))


def _installed() -> tuple[int, int]:
    """(major, minor) of the ONNX Runtime that is installed here."""
    import onnxruntime

    major, minor = onnxruntime.__version__.split(".")[:2]
    return int(major), int(minor)


def _require_attention(directory: Path, passport: EnginePassport) -> None:
    """Raise `EngineUnavailable` where an engine has operators that came after the ONNX Runtime here."""
    if passport.whole_option("onnx_attention") and _installed() < ONNX_ATTENTION_SINCE:
        here = ".".join(map(str, _installed()))
        raise EngineUnavailable(
            f"{directory}: wants onnxruntime {_SINCE} or later, and {here} is installed; upgrade it, or build the "
            f"engine with --onnxruntime {here}"
        )


def input_bindings(session: Session) -> tuple[Binding, ...]:
    """The inputs of a session, in their order."""
    return tuple(_binding(value) for value in session.get_inputs())


def _binding(value: SessionValue) -> Binding:
    """A session's input or output; sizes with a name are free."""
    element = value.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    return Binding(value.name, {"float": "float32", "double": "float64"}.get(element, element), shape)


def open_session(
    file: Path,
    threads: int | None,
    without: Sequence[str] = (),
    *,
    optimized: Path | None = None,
    model: bytes | None = None,
    level: str | None = None,
    profile: Path | None = None,
) -> Session:
    """A session on `file`, or on the bytes `model` that were read from it, without the optimizers that are named.

    `optimized` is where it writes the graph that it runs, `profile` the beginning of the name of its profile's file.
    `level` is ONNX Runtime's optimization level, ``basic`` or ``all``, which is also its default. Raises `EngineError`,
    `EngineUnavailable`, and `ArtifactError` for a file that is not there.
    """
    _require_runtime()
    import onnxruntime as runtime

    if not file.is_file():
        raise ArtifactError(f"{file}: no such engine")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if level == "basic":
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        session: Session = runtime.InferenceSession(
            model or str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without)
        )
    except Exception as error:  # onnxruntime raises its own types, which are no stable API
        raise EngineError(f"{file}: ONNX Runtime cannot load it: {error}") from error
    return session
