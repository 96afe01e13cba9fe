"""A TensorRT engine at work: deserialize, choose a profile per shape, run, time. TensorRT 8.6, 10, 11 and TensorRT-RTX.

Own code instead of polygraphy's runner, because the profile must be chosen per call, sequences beyond it refused by
name, and time taken by CUDA events on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.base import Binding, Closing, Profile, as_bound, require_feeds, require_within, spec_of
from engines.tensorrt.cuda_driver import Device
from engines.tensorrt.messages import forget_errors, logger_of, said_errors
from engines.tensorrt.profiles import pick
from nxm_export.errors import EngineError, notice

if TYPE_CHECKING:
    from engines.tensorrt.bindings import CudaEngine, ExecutionContext, Runtime, TensorRT

_NUMPY: Mapping[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT32": np.int32,
    "INT64": np.int64,
    "INT8": np.int8,
    "BOOL": np.bool_,
}
# In the first run of a shape TensorRT does what no graph holds. And a graph takes longer to make than a run: none pays
# where shapes change all the time.
_RUNS_BEFORE_CAPTURE = 8


class TensorRTEngine(Closing):
    """A deserialized engine on the first GPU. See `engines.base.Engine`.

    `engine` are the bytes of `file`, as they were hashed. Batches beyond the largest profile run in slices; sequences
    beyond it are refused. Device buffers grow and are used again. After some runs of a shape, as long as no other
    one comes between, a CUDA graph launches all kernels at once: of small batches launching takes most. Not so
    without `kernels_are_final`, where the runtime takes better kernels for a shape after a while: a graph would keep
    those of the first runs.
    """

    clock = "CUDA events"

    def __init__(
        self, trt: TensorRT, file: Path, engine: bytes, rebuild: str, *, kernels_are_final: bool = True
    ) -> None:
        self._trt, self.file, self._rebuild = trt, file, rebuild
        self._spec = spec_of(file.parent)
        self._contexts: dict[int, ExecutionContext] = {}
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> (address, bytes)
        self._shapes: dict[str, tuple[int, ...]] | None = None  # of the inputs that the context in use is bound for
        self._runs = 0  # of these shapes, one behind another
        self._graph: int | None = None  # of these shapes
        self._can_capture = kernels_are_final
        self._runtime: Runtime | None = None
        self._engine: CudaEngine | None = None
        self._device: Device | None = Device()
        try:
            self._load(trt, engine)
        except BaseException:
            self.close()
            raise

    def _load(self, trt: TensorRT, engine: bytes) -> None:
        forget_errors()
        self._runtime = trt.Runtime(logger_of(trt))  # an engine needs it as long as it lives
        loaded = self._engine = self._runtime.deserialize_cuda_engine(engine)
        if loaded is None:
            raise EngineError(
                f"{self.file}: TensorRT cannot load it: {said_errors() or 'no reason given'}; {self._rebuild}"
            )
        names = [loaded.get_tensor_name(i) for i in range(loaded.num_io_tensors)]
        is_input = {name: loaded.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(name for name in names if is_input[name])
        self.outputs = tuple(name for name in names if not is_input[name])
        self._types = {name: self._type(loaded, name) for name in names}
        self._bindings = tuple(
            Binding(name, np.dtype(self._types[name]).name, tuple(map(int, loaded.get_tensor_shape(name))))
            for name in self.inputs
        )
        self.profiles = tuple(self._profile(loaded, i) for i in range(loaded.num_optimization_profiles))

    @property
    def input_bindings(self) -> tuple[Binding, ...]:
        """The inputs as the engine file has them."""
        return self._bindings

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, float32."""
        require_feeds(self, feeds)
        require_within(self._spec, feeds)
        batch, sequence = _batch_and_sequence(feeds[self.inputs[0]].shape)
        largest = max((p.maximum[0] for p in self.profiles if p.minimum[1] <= sequence <= p.maximum[1]), default=batch)
        parts = [
            self._run({name: array[start : start + largest] for name, array in feeds.items()})
            for start in range(0, batch, largest)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}

    def timer(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """A function that runs `feeds`, already on the device, and returns the milliseconds between two CUDA events."""
        return self.queue_timer(feeds, 1)

    def queue_timer(self, feeds: Mapping[str, np.ndarray], runs: int) -> Callable[[], float]:
        """See `engines.base.QueuedEngine`."""
        require_feeds(self, feeds)
        device, context = self._prepared_to_time(feeds)
        start, end = device.event(), device.event()
        shapes = _shapes_of(feeds)

        def timed() -> float:
            nonlocal context
            if shapes != self._shapes:  # another shape has run since, whose time this would be
                _, context = self._prepared_to_time(feeds)
            # Engines of one bench share no buffers, so the inputs are still there from the preparation.
            device.activate()
            forget_errors()
            device.record(start)
            for _ in range(runs):
                self._enqueue(device, context)
            device.record(end)
            return device.elapsed_ms(start, end)

        return timed

    def launches_graph(self, feeds: Mapping[str, np.ndarray]) -> bool:
        """See `engines.base.QueuedEngine`."""
        return self._graph is not None and self._shapes == _shapes_of(feeds)

    def layer_times(self, feeds: Mapping[str, np.ndarray], rounds: int) -> dict[str, float]:
        """Mean milliseconds of every layer of the engine, over `rounds` runs of `feeds`."""
        totals: dict[str, float] = {}
        trt = self._trt

        class Profiler(trt.IProfiler):  # type: ignore[misc,name-defined]  # a class that is known at run time only
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                totals[layer_name] = totals.get(layer_name, 0.0) + float(ms)

        device, context = self._prepare(feeds)
        context.profiler = Profiler()
        try:
            for _ in range(rounds):
                if not context.execute_async_v3(device.stream):
                    raise EngineError(f"{self.file}: TensorRT failed: {said_errors()}")
                device.synchronize()
        finally:
            self._rebind()
            self._contexts.clear()  # a context with a profiler runs layer by layer: the next run gets a fresh one
        return {name: total / rounds for name, total in totals.items()}

    def close(self) -> None:
        """Free the engine and its memory."""
        if self._device is None:
            return
        self._device.activate()  # for the thread that closes it may be another than the one that ran it
        self._rebind()
        for address, _ in self._buffers.values():
            self._device.free(address)
        self._contexts.clear()
        self._engine = self._runtime = None
        self._device.close()
        self._device = None

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        device, context = self._prepare(feeds)
        self._enqueue(device, context)
        outputs = {}
        for name in self.outputs:
            outputs[name] = np.empty(tuple(context.get_tensor_shape(name)), self._types[name])
            device.download(outputs[name], self._buffers[name][0])
        device.synchronize()
        return {name: array.astype(np.float32) for name, array in outputs.items()}

    def _prepare(self, feeds: Mapping[str, np.ndarray]) -> tuple[Device, ExecutionContext]:
        """Upload `feeds` and bind every tensor; the context is ready to be enqueued."""
        if self._device is None:
            raise EngineError(f"{self.file}: this engine was closed")
        device = self._device
        device.activate()
        forget_errors()
        context = self._context(*_batch_and_sequence(feeds[self.inputs[0]].shape))
        shapes = _shapes_of(feeds)
        if shapes != self._shapes:
            self._rebind()
            self._bind(context, shapes)
        by_name = {binding.name: binding for binding in self._bindings}
        for name, array in feeds.items():
            typed = np.ascontiguousarray(as_bound(by_name[name], array))
            device.upload(self._buffers[name][0], typed)
            device.synchronize()  # `typed` may be gone before an asynchronous copy
        return device, context

    def _prepared_to_time(self, feeds: Mapping[str, np.ndarray]) -> tuple[Device, ExecutionContext]:
        """The same, behind the runs that a graph needs: none is made in a run that is timed."""
        device, context = self._prepare(feeds)
        for _ in range(_RUNS_BEFORE_CAPTURE):
            self._enqueue(device, context)
        device.synchronize()
        return device, context

    def _bind(self, context: ExecutionContext, shapes: dict[str, tuple[int, ...]]) -> None:
        """Tell a context the shapes of its inputs, and where every tensor lies."""
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise EngineError(f"{self.file}: TensorRT refuses shape {shape} for {name}: {said_errors()}")
            self._bound(context, name, shape)
        for name in self.outputs:
            shape = tuple(context.get_tensor_shape(name))
            if -1 in shape:
                raise EngineError(f"{self.file}: the shape of {name} is still unknown with all inputs given: {shape}")
            self._bound(context, name, shape)
        self._shapes = shapes

    def _rebind(self) -> None:
        """Forget what the next run would go on with: its graph holds addresses and shapes that will change."""
        if self._graph is not None and self._device is not None:
            self._device.forget(self._graph)
        self._graph, self._shapes, self._runs = None, None, 0

    def _enqueue(self, device: Device, context: ExecutionContext) -> None:
        """Put a run into the stream: all of it at once, where there is a graph of these shapes."""
        if self._graph is not None:
            device.launch(self._graph)
            return
        if not context.execute_async_v3(device.stream):
            raise EngineError(f"{self.file}: TensorRT failed: {said_errors()}")
        self._runs += 1
        if self._runs < _RUNS_BEFORE_CAPTURE or not self._can_capture:
            return
        device.synchronize()
        self._graph = device.captured(lambda: context.execute_async_v3(device.stream))
        if self._graph is None:
            self._can_capture = False
            notice(
                f"{self.file}: its runs cannot be captured in a CUDA graph here; kernels are launched one by one, "
                "which is slower for small batches"
            )

    def _bound(self, context: ExecutionContext, name: str, shape: tuple[int, ...]) -> None:
        """A buffer for a tensor of this shape."""
        assert self._device is not None
        size = int(np.prod(shape)) * np.dtype(self._types[name]).itemsize
        address, held = self._buffers.get(name, (0, -1))
        if held < size:
            if held >= 0:
                self._device.free(address)
            address = self._device.allocate(size)
            self._buffers[name] = (address, size)
        if not context.set_tensor_address(name, address):
            raise EngineError(f"{self.file}: TensorRT refuses a buffer for {name}: {said_errors()}")

    def _context(self, batch: int, sequence: int) -> ExecutionContext:
        index = pick(self.profiles, batch, sequence)
        if index is None:
            ranges = "; ".join(f"{p.minimum[0]}x{p.minimum[1]} to {p.maximum[0]}x{p.maximum[1]}" for p in self.profiles)
            raise EngineError(
                f"{self.file}: no profile holds batch {batch} x sequence {sequence} (it has {ranges}); truncate, or "
                f"{self._rebuild}"
            )
        if index not in self._contexts:
            assert self._device is not None
            assert self._engine is not None
            context = self._engine.create_execution_context()
            if context is None:
                raise EngineError(f"{self.file}: not enough GPU memory to run it: {said_errors()}")
            if index and not context.set_optimization_profile_async(index, self._device.stream):
                raise EngineError(f"{self.file}: TensorRT refuses profile {index}: {said_errors()}")
            self._device.synchronize()
            self._contexts[index] = context
        return self._contexts[index]

    def _profile(self, engine: CudaEngine, index: int) -> Profile:
        shapes = [tuple(shape) for shape in engine.get_tensor_profile_shape(self.inputs[0], index)]
        low, best, high = (_batch_and_sequence(shape) for shape in shapes)
        return Profile(low, best, high)

    def _type(self, engine: CudaEngine, name: str) -> type[np.generic]:
        kind = engine.get_tensor_dtype(name).name
        if kind not in _NUMPY:
            raise EngineError(
                f"{self.file}: {name} is {kind}, which has no numpy type; export a graph with float32 outputs"
            )
        return _NUMPY[kind]


def _shapes_of(feeds: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in feeds.items()}


def _batch_and_sequence(shape: tuple[int, ...]) -> tuple[int, int]:
    """The first two sizes of a shape; 1 where it has none."""
    batch, sequence = (*map(int, shape), 1, 1)[:2]
    return batch, sequence
