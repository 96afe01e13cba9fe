"""TensorRT-RTX: builds ahead of time, without a GPU; runs where a supported RTX GPU is.

The build runs in a child process: polygraphy decides between TensorRT and TensorRT-RTX by an environment variable, once
per process. The child's verbose output is ``build.log``, and the layers it prints say which products run on integers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import Binding, BuildOptions, Closing, Profile, copy_companions, require_feeds
from engines.passport import EnginePassport, load_passport
from engines.truth import integer_products, parse_layers
from nxm_export.errors import EngineError, EngineUnavailable
from nxm_export.spec import load_spec

NAME = "trt_rtx"
ENGINE_FILE = "model.engine"
LOG_FILE = "build.log"
PACKAGE = "tensorrt-rtx-cu13"
COMPUTE_CAPABILITIES = ((8, 6), (8, 9), (12, 0))  # Ampere, Ada and Blackwell RTX
_BINDINGS_FILE = "bindings.json"  # how the child tells what the network takes and gives; goes into the passport
_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"


def build(onnx: str | Path, out: Path, options: BuildOptions = BuildOptions()) -> EnginePassport:
    """Write an engine directory with ``model.engine`` and ``build.log``. Raises `EngineError`, `EngineUnavailable`."""
    from nxm_export.weights import load_graph

    onnx = Path(onnx)
    _require_installed()
    model = load_graph(onnx)
    profiles = tuple(options.profiles) or (_default_profile(onnx.parent),)
    request = {
        "onnx": str(onnx),
        "engine": str(out / ENGINE_FILE),
        "bindings": str(out / _BINDINGS_FILE),
        "profiles": [asdict(p) for p in profiles],
        "sparse": options.sparse,
    }
    with (out / LOG_FILE).open("w", encoding="utf-8") as log:
        child = subprocess.run(
            [sys.executable, "-m", "engines.trt_rtx", json.dumps(request)],
            env={**os.environ, _SWITCH: "1"},
            stdout=log,
            stderr=log,
            check=False,
        )
    if child.returncode or not (out / ENGINE_FILE).is_file():
        raise EngineError(f"{onnx}: TensorRT-RTX could not build it: {_last_error(out / LOG_FILE)}")
    bindings = json.loads((out / _BINDINGS_FILE).read_text(encoding="utf-8"))
    (out / _BINDINGS_FILE).unlink()
    copy_companions(onnx.parent, out)
    facts = _facts()
    return EnginePassport.issue(
        NAME,
        out / ENGINE_FILE,
        onnx,
        device={
            "kind": "gpu",
            "compute_capabilities": ", ".join(f"{major}.{minor}" for major, minor in COMPUTE_CAPABILITIES),
        },
        requires=facts,
        options={"sparse": options.sparse} | _count(out / LOG_FILE, model),
        profiles=request["profiles"],  # type: ignore[arg-type]
        graph=model.metadata_props,
        bindings=bindings,
    )


def load(directory: str | Path) -> RtxEngine:
    """Load an engine directory; version and hash are checked before anything is deserialized."""
    directory = Path(directory)
    passport = load_passport(directory)
    _require_installed()
    passport.require_here(directory, _facts())
    return RtxEngine(directory)


class RtxEngine(Closing):
    """An engine on the first supported GPU, through polygraphy's runner. See `engines.base.Engine`."""

    def __init__(self, directory: Path) -> None:
        if os.environ.get(_SWITCH) != "1" and "polygraphy" in sys.modules:
            raise EngineError(
                "polygraphy was imported for TensorRT in this process; load TensorRT-RTX engines in a process of their own"
            )
        os.environ[_SWITCH] = "1"
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner
        from polygraphy.logger import G_LOGGER

        G_LOGGER.module_severity = G_LOGGER.CRITICAL
        spec = load_spec(directory)
        self.directory, self.inputs, self.outputs = directory, spec.inputs, tuple(spec.outputs)
        _require_gpu()
        try:
            self._runner: Any = TrtRunner(EngineFromBytes(BytesFromPath(str(directory / ENGINE_FILE))))
            self._runner.activate()
        except Exception as error:  # polygraphy and the runtime raise many kinds
            raise EngineUnavailable(f"{directory}: TensorRT-RTX cannot load it on this machine: {error}") from error

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        require_feeds(self, feeds)
        try:
            outputs = self._runner.infer(dict(feeds))
        except Exception as error:
            raise EngineError(f"{self.directory}: TensorRT-RTX failed: {error}") from error
        return {name: np.array(outputs[name], np.float32) for name in self.outputs}

    def close(self) -> None:
        """Free the engine."""
        if self._runner is not None:
            self._runner.deactivate()
            self._runner = None


def inspect(directory: str | Path) -> dict[str, Any]:
    """Facts of an engine directory: how many products the builder runs on integers."""
    passport = load_passport(directory)
    return {
        "backend": NAME,
        **{key: passport.options.get(key) for key in ("integer_products", "planned_products", "sparse_kernels")},
    }


def _count(log: Path, model: Any) -> dict[str, Any]:
    """How many of the graph's quantized products run on integers, from the layers that the builder printed."""
    from nxm_export.weights import graph_weights

    products = [weight.node.name or "" for weight in graph_weights(model) if weight.is_quantized]
    with log.open(encoding="utf-8", errors="replace") as lines:
        found = integer_products(parse_layers(lines), products)
    return {
        "planned_products": len(found),
        "integer_products": sum(found.values()),
        "float_products": sorted(name for name, integer in found.items() if not integer),
        "sparse_kernels": "unknown: kernels are chosen on the GPU, and this engine was built without one",
    }


def _default_profile(directory: Path) -> Profile:
    limit = load_spec(directory).max_length if (directory / "spec.json").is_file() else 512
    return Profile((1, 1), (8, min(128, limit)), (32, limit))


def _facts() -> dict[str, str]:
    from importlib.metadata import version

    return {PACKAGE: version(PACKAGE)}


def _require_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("tensorrt_rtx", "polygraphy") if find_spec(name) is None]
    if missing:
        raise EngineUnavailable(f"{' and '.join(missing)} is not installed; pip install 'nxm-export[trt-rtx]'")


def _require_gpu() -> None:
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineUnavailable(
            "running a TensorRT-RTX engine needs an NVIDIA RTX GPU and its driver; none is on this machine (building does not need one)"
        ) from error
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise EngineUnavailable(
            "running a TensorRT-RTX engine needs an NVIDIA RTX GPU; the driver is here and finds none"
        )


def _last_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line.strip() for line in lines if line.startswith("[E]") or "Error" in line]
    return f"{errors[-1] if errors else 'no error text'} (log: {log})"


def _child(request: Mapping[str, Any]) -> None:
    """In the child process: parse, configure, build, write the plain engine bytes."""
    from polygraphy.backend.common import SaveBytes
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.backend.trt import Profile as TrtProfile
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.EXTRA_VERBOSE  # the layer list is printed at this level only
    _, network, _ = loaded = NetworkFromOnnxPath(request["onnx"], strongly_typed=True)()
    profiles = []
    for sizes in request["profiles"]:
        profile = TrtProfile()
        for i in range(network.num_inputs):
            profile.add(
                network.get_input(i).name, tuple(sizes["minimum"]), tuple(sizes["optimum"]), tuple(sizes["maximum"])
            )
        profiles.append(profile)
    config = CreateConfigRTX(
        profiles=profiles, sparse_weights=request["sparse"], compute_capabilities=list(COMPUTE_CAPABILITIES)
    )
    SaveBytes(EngineBytesFromNetwork(loaded, config=config), request["engine"])()
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    bindings = {"inputs": [_binding(t) for t in inputs], "outputs": [_binding(t) for t in outputs]}
    Path(request["bindings"]).write_text(json.dumps(bindings), encoding="utf-8")


def _binding(tensor: Any) -> dict[str, Any]:
    """A network's input or output as a `Binding`: networks are strongly typed, so the engine has the same types."""
    names = {"float": "float32", "half": "float16", "bf16": "bfloat16"}
    dtype = tensor.dtype.name.lower()
    return asdict(Binding(tensor.name, names.get(dtype, dtype), tuple(tensor.shape)))


if __name__ == "__main__":
    try:
        _child(json.loads(sys.argv[1]))
    except Exception as failure:
        print(f"[E] {failure}", file=sys.stderr)
        sys.exit(1)
