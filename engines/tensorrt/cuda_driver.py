"""The little of CUDA that running and timing a TensorRT engine needs, through the driver library alone.

``libcuda.so.1`` comes with every NVIDIA driver, so an engine host needs no CUDA toolkit, no torch and no cuda-python.
The device's primary context is used, which is the one that TensorRT (through the runtime API) uses, too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from nxm_export.errors import EngineError, EngineUnavailable

_LIBRARY = "libcuda.so.1"
_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_NO_GPU = "building and running TensorRT engines needs an NVIDIA GPU and its driver"
_SIGNATURES: Mapping[str, tuple[type, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDriverGetVersion": (ctypes.POINTER(ctypes.c_int),),
    "cuDeviceGetCount": (ctypes.POINTER(ctypes.c_int),),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDeviceGetName": (ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    "cuDeviceTotalMem_v2": (ctypes.POINTER(ctypes.c_size_t), ctypes.c_int),
    "cuDeviceGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_int),
    "cuDevicePrimaryCtxRelease_v2": (ctypes.c_int,),
    "cuCtxSetCurrent": (ctypes.c_void_p,),
    "cuMemAlloc_v2": (ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t),
    "cuMemFree_v2": (ctypes.c_uint64,),
    "cuMemcpyHtoDAsync_v2": (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p),
    "cuMemcpyDtoHAsync_v2": (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p),
    "cuStreamCreate": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint),
    "cuStreamSynchronize": (ctypes.c_void_p,),
    "cuStreamDestroy_v2": (ctypes.c_void_p,),
    "cuEventCreate": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint),
    "cuEventRecord": (ctypes.c_void_p, ctypes.c_void_p),
    "cuEventSynchronize": (ctypes.c_void_p,),
    "cuEventElapsedTime": (ctypes.POINTER(ctypes.c_float), ctypes.c_void_p, ctypes.c_void_p),
    "cuEventDestroy_v2": (ctypes.c_void_p,),
    "cuStreamBeginCapture_v2": (ctypes.c_void_p, ctypes.c_int),
    "cuStreamEndCapture": (ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)),
    "cuGraphInstantiateWithFlags": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint64),
    "cuGraphLaunch": (ctypes.c_void_p, ctypes.c_void_p),
    "cuGraphDestroy": (ctypes.c_void_p,),
    "cuGraphExecDestroy": (ctypes.c_void_p,),
}
_CAPTURE_THIS_THREAD = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may do what a capture forbids


def device_facts(index: int = 0) -> dict[str, str]:
    """Name, compute capability, driver and CUDA version of a GPU; raises `EngineUnavailable` where there is none."""
    driver = _driver()
    device, value = ctypes.c_int(), ctypes.c_int()
    _check(driver, "cuDeviceGet", ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    _check(driver, "cuDeviceGetName", name, len(name), device)
    capability = []
    for attribute in _COMPUTE_CAPABILITY:
        _check(driver, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        capability.append(str(value.value))
    _check(driver, "cuDriverGetVersion", ctypes.byref(value))
    return {
        "gpu": name.value.decode(errors="replace"),
        "compute_capability": ".".join(capability),
        "driver": _driver_version(),
        "cuda": f"{value.value // 1000}.{value.value % 1000 // 10}",
    }


def device_memory(index: int = 0) -> int:
    """Bytes of a GPU's memory, all of it; raises `EngineUnavailable` where there is none."""
    driver = _driver()
    device, size = ctypes.c_int(), ctypes.c_size_t()
    _check(driver, "cuDeviceGet", ctypes.byref(device), index)
    _check(driver, "cuDeviceTotalMem_v2", ctypes.byref(size), device)
    return int(size.value)


class Device:
    """A GPU's primary context, with one stream; memory is addressed by integers, as TensorRT wants it."""

    def __init__(self, index: int = 0) -> None:
        self._driver = _driver()
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._device, self._context = device, context
        self.activate()
        self._call("cuStreamCreate", ctypes.byref(stream), 1)  # non-blocking: no implicit order with the default stream
        self.stream = int(stream.value or 0)
        self._events: list[int] = []

    def _call(self, name: str, *arguments: object) -> None:
        _check(self._driver, name, *arguments)

    def activate(self) -> None:
        """Make this context the calling thread's."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """Address of `size` new bytes."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), max(1, size))
        return int(address.value)

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cuMemFree_v2", address)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device, in stream order."""
        self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self.stream)

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy device memory into a contiguous array, in stream order."""
        self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self.stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cuStreamSynchronize", self.stream)

    def captured(self, work: Callable[[], bool]) -> int | None:
        """A CUDA graph of what `work` puts into the stream, which does not run it; None where `work` says that it
        failed, or puts something there that no graph holds. `launch` runs it, `forget` gives it back."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        if self._driver.cuStreamBeginCapture_v2(self.stream, _CAPTURE_THIS_THREAD):
            return None
        try:
            done = work()
        finally:
            # Also of a capture that went wrong, which says so only here: else the stream would stay in it.
            ended = self._driver.cuStreamEndCapture(self.stream, ctypes.byref(graph)) == 0 and bool(graph.value)
        if not ended:
            return None
        failed = not done or self._driver.cuGraphInstantiateWithFlags(ctypes.byref(ready), graph, 0)
        self._call("cuGraphDestroy", graph)
        return None if failed else int(ready.value or 0) or None

    def launch(self, graph: int) -> None:
        """Run a graph of `captured` in the stream."""
        self._call("cuGraphLaunch", graph, self.stream)

    def forget(self, graph: int) -> None:
        """Give a graph of `captured` back."""
        self._call("cuGraphExecDestroy", graph)

    def event(self) -> int:
        """A new event that can be timed; it lasts until `close`."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), 0)
        self._events.append(int(event.value or 0))
        return self._events[-1]

    def record(self, event: int) -> None:
        """Record `event` in the stream."""
        self._call("cuEventRecord", event, self.stream)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two recorded events; waits for the second."""
        value = ctypes.c_float()
        self._call("cuEventSynchronize", end)
        self._call("cuEventElapsedTime", ctypes.byref(value), start, end)
        return float(value.value)

    def close(self) -> None:
        """Give the events, the stream and the context back; calling it again does nothing."""
        if self.stream:
            self.activate()
            while self._events:
                self._call("cuEventDestroy_v2", self._events.pop())
            self._call("cuStreamDestroy_v2", self.stream)
            self._call("cuDevicePrimaryCtxRelease_v2", self._device)
            self.stream = 0


def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise EngineUnavailable(f"{_NO_GPU}; {_LIBRARY} is not on this machine") from error
    try:
        for name, types in _SIGNATURES.items():
            getattr(driver, name).argtypes = types
    except AttributeError as error:
        raise EngineUnavailable(
            f"the NVIDIA driver here is too old ({error}); install one for CUDA 11.4 or later (470)"
        ) from error
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise EngineUnavailable(f"{_NO_GPU}; the driver is here and finds no GPU")
    return driver


def _check(driver: ctypes.CDLL, name: str, *arguments: object) -> None:
    code = getattr(driver, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise EngineError(f"CUDA driver: {name} failed with {code}: {(text.value or b'unknown error').decode()}")


def _driver_version() -> str:
    """The kernel driver's version as ``nvidia-smi`` names it, or ``unknown``."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return next((word for word in text.split() if word.count(".") >= 1 and word.replace(".", "").isdigit()), "unknown")
