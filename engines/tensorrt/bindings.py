"""What is used of TensorRT's objects, as types: its bindings come without any that hold for all versions.

The names are those of the Python API of TensorRT 8.6, 10, 11 and TensorRT-RTX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol


class Named(Protocol):
    """A member of an enumeration."""

    name: str


class Tensor(Protocol):
    """An input or output of a network; a size that is free is -1."""

    name: str
    dtype: Named
    shape: Iterable[int]


class Network(Protocol):
    """A network that a parser made."""

    num_inputs: int
    num_outputs: int

    def get_input(self, index: int) -> Tensor:
        """An input."""
        ...

    def get_output(self, index: int) -> Tensor:
        """An output."""
        ...


class ParserError(Protocol):
    """One error of the ONNX parser."""

    def node(self) -> int:
        """The index of the ONNX node that it is about, -1 for none."""
        ...

    def desc(self) -> str:
        """Its text."""
        ...


class Parser(Protocol):
    """The ONNX parser."""

    num_errors: int

    def parse_from_file(self, path: str) -> bool:
        """Parse a file; False where there are errors."""
        ...

    def get_error(self, index: int) -> ParserError:
        """One error."""
        ...


class BuilderConfig(Protocol):
    """A builder's configuration."""

    build_route: str

    def create_timing_cache(self, data: bytes) -> object | None:
        """A timing cache of these bytes."""
        ...

    def set_timing_cache(self, cache: object, ignore_mismatch: bool) -> bool:
        """Use it; False where it is of another version or GPU."""
        ...


class ExecutionContext(Protocol):
    """A context that runs an engine."""

    profiler: object

    def execute_async_v3(self, stream: int) -> bool:
        """Enqueue a run."""
        ...

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Say an input's shape."""
        ...

    def get_tensor_shape(self, name: str) -> Iterable[int]:
        """A tensor's shape, -1 where it is not known yet."""
        ...

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Bind device memory."""
        ...

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        """Choose a profile."""
        ...


class Inspector(Protocol):
    """The engine inspector."""

    execution_context: ExecutionContext

    def get_engine_information(self, form: object) -> str:
        """The report on all layers."""
        ...


class CudaEngine(Protocol):
    """A deserialized engine."""

    num_io_tensors: int
    num_optimization_profiles: int

    def get_tensor_name(self, index: int) -> str:
        """The name of an input or output."""
        ...

    def get_tensor_mode(self, name: str) -> object:
        """Whether it is an input (see `TensorRT.TensorIOMode`)."""
        ...

    def get_tensor_dtype(self, name: str) -> Named:
        """Its type."""
        ...

    def get_tensor_shape(self, name: str) -> Iterable[int]:
        """Its shape, -1 where free."""
        ...

    def get_tensor_profile_shape(self, name: str, index: int) -> Sequence[Iterable[int]]:
        """Minimum, optimum and maximum in a profile."""
        ...

    def create_execution_context(self) -> ExecutionContext | None:
        """A new context; None where memory is short."""
        ...

    def create_engine_inspector(self) -> Inspector:
        """An inspector."""
        ...


class Runtime(Protocol):
    """What deserializes engines."""

    def deserialize_cuda_engine(self, data: bytes) -> CudaEngine | None:
        """The engine; None where it cannot be loaded, and the logger has the reason."""
        ...


class IOModes(Protocol):
    """``TensorIOMode``."""

    INPUT: object


class InformationFormats(Protocol):
    """``LayerInformationFormat``."""

    JSON: object


class Verbosities(Protocol):
    """``ProfilingVerbosity``."""

    DETAILED: object


class MemoryPools(Protocol):
    """``MemoryPoolType``."""

    WORKSPACE: object


class Severities(Protocol):
    """``ILogger.Severity``."""

    ERROR: object
    INTERNAL_ERROR: object


class Loggers(Protocol):
    """``ILogger``: a class that ours are derived from."""

    Severity: Severities

    def __init__(self) -> None: ...


class TacticSources(Protocol):
    """``TacticSource``."""

    __members__: Mapping[str, object]


class TensorRT(Protocol):
    """The module ``tensorrt`` or ``tensorrt_rtx``."""

    __version__: str
    TensorIOMode: IOModes
    LayerInformationFormat: InformationFormats
    ProfilingVerbosity: Verbosities
    MemoryPoolType: MemoryPools
    TacticSource: TacticSources
    ILogger: type[Loggers]
    IProfiler: type[object]
    IProgressMonitor: type[object]

    @property
    def Runtime(self) -> Callable[[object], Runtime]:  # noqa: N802  (TensorRT's name)
        """Makes a runtime for a logger."""
        ...

    @property
    def OnnxParser(self) -> Callable[[Network, object], Parser]:  # noqa: N802  (TensorRT's name)
        """Makes a parser into a network for a logger."""
        ...
