"""A stand-in for TensorRT whose API is that of the real bindings and whose behaviour is rehearsal, not truth.

Classes, methods, parameters, properties and enums come from the JSON that ``api_surface.py`` wrote from the real
bindings (``NXM_FAKE_TENSORRT`` names the file): anything that the real thing lacks raises here, too. Behind it,
"engines" are run by ONNX Runtime on the fake driver's memory, and kernels are named by a rule of thumb: sparse for 2:4
weights with INT8 out, if the flag is set. So the rehearsal runs every line of ours up to numbers, and proves nothing
about TensorRT.
"""

import base64
import ctypes
import enum
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Made of the recorded API by `_build_classes`, as all other names of TensorRT are; named here for readers and type
# checkers.
BuilderFlag: Any = None
DataType: Any = None
IHostMemory: Any = None
ILogger: Any = None
LayerInformationFormat: Any = None
TensorIOMode: Any = None

Overloads = Sequence[Sequence[str]]
_API = json.loads(Path(os.environ["NXM_FAKE_TENSORRT"]).read_text(encoding="utf-8"))
__version__ = _API["version"]
_MAGIC = b"fake engine\n"
_MAJOR = int(__version__.split(".")[0])
_SPARSE = "sm80_xmma_sparse_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x128_stage3_warpsize2x2x1_sptensor16x8x64"
_DENSE = "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x64_stage4_warpsize2x2x1_tensor16x8x32"
_FLOAT = "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x16"


def _method(kind: str, name: str, overloads: Overloads, behaviour: Callable[..., Any] | None) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if overloads and not any(_binds(parameters, args, kwargs) for parameters in overloads):
            raise TypeError(f"{kind}.{name} of TensorRT {__version__} takes {overloads}, got {args} {kwargs}")
        if behaviour is None:
            raise NotImplementedError(f"the fake has no behaviour for {kind}.{name}")
        return behaviour(self, *args, **kwargs)

    return call


def _binds(parameters: Sequence[str], args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    names = [name.rstrip("=") for name in parameters]
    if len(args) > len(names) or any(name not in names[len(args) :] for name in kwargs):
        return False
    given = set(names[: len(args)]) | set(kwargs)
    return all(name.endswith("=") or name in given for name in parameters)


def _property(name: str, behaviour: Any) -> property:
    def get(self: Any) -> Any:
        if name in self.__dict__.get("_set", {}):
            return self.__dict__["_set"][name]
        if behaviour is None:
            raise NotImplementedError(f"the fake has no behaviour for property {type(self).__name__}.{name}")
        return behaviour(self) if callable(behaviour) else behaviour

    def put(self: Any, value: object) -> None:
        self.__dict__.setdefault("_set", {})[name] = value

    return property(get, put)


def _refuse(self: object, name: str, value: object) -> None:
    if not name.startswith("_") and not isinstance(getattr(type(self), name, None), property):
        raise AttributeError(f"{type(self).__name__} of TensorRT {__version__} has no property {name!r}")
    object.__setattr__(self, name, value)


def _build_classes() -> None:
    for name, entry in _API["classes"].items():
        if "enum" in entry:
            globals()[name] = enum.IntEnum(name, entry["enum"])
            continue
        behaviour = _BEHAVIOUR.get(name, {})
        body: dict[str, Any] = {key: _property(key, behaviour.get(key)) for key in entry["properties"]}
        for key, overloads in entry["methods"].items():
            body[key] = _method(
                name, key, overloads, behaviour.get(key, (lambda self: None) if key == "__init__" else None)
            )
        for key, members in entry["enums"].items():
            body[key] = enum.IntEnum(key, members)
        for key, kind in entry["constants"].items():
            body[key] = body[kind][key] if kind in body else globals()["ILogger"].Severity[key]
        bases: tuple[type, ...] = (
            (globals()["ILogger"],) if name == "Logger" else (bytes,) if name == "IHostMemory" else (object,)
        )
        if name == "IHostMemory":
            body = {"nbytes": property(len), "__enter__": lambda self: self, "__exit__": lambda self, *_: None}
        elif not name.startswith("I") or name not in ("ILogger", "IProfiler", "IProgressMonitor"):
            body["__setattr__"] = _refuse
        globals()[name] = type(name, bases, body)


def _made(name: str, **attributes: object) -> Any:
    made = object.__new__(globals()[name])
    made.__dict__.update(attributes)
    return made


def init_libnvinfer_plugins(logger: object, namespace: str) -> bool:
    return True


# Network and parser


def _parse_from_file(self: Any, model: str) -> bool:
    import onnx

    network = self.__dict__["_network"]
    graph = onnx.load(model).graph
    errors = [i for i, node in enumerate(graph.node) if node.domain not in ("", "ai.onnx")]
    self.__dict__["_errors"] = [
        _made("ParserError", _node=i, _desc=f"No importer registered for op: {graph.node[i].op_type}") for i in errors
    ]
    network.__dict__.update(_onnx=str(Path(model).resolve()), _graph=graph)
    return not errors


def _io(network: Any, values: str) -> list[Any]:
    return [_made("ITensor", _value=value) for value in network.__dict__["_graph"].__getattribute__(values)]


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim)


# Building


def _products(file: str, sparse_flag: bool) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """A layer per product with a constant weight, and the names for the builder's sparse lists."""
    from nxm_export.graph.reading.graph_weights import load_graph
    from nxm_export.graph.reading.sparsity_scan import scan_products

    layers: list[dict[str, Any]] = []
    eligible: list[str] = []
    picked: list[str] = []
    for fact in scan_products(load_graph(Path(file)), file).facts:
        sparse = (
            sparse_flag and fact.sparse_along_k and fact.integer_weight and fact.integer_input and fact.output == "int8"
        )
        kernel = _SPARSE if sparse else _DENSE if fact.integer_weight else _FLOAT
        kind = "Int8" if fact.integer_weight else "Half"
        if sparse_flag and fact.sparse_along_k:
            eligible.append(fact.node)
        if sparse:
            picked.append(fact.node)
        key = "Datatype" if _MAJOR >= 11 else "Format/Datatype"
        layers.append(
            {"Name": f"{fact.node}_myl0_{len(layers)}", "LayerType": "gemm", "Inputs": [{"Name": "x", key: kind}], "Outputs": [{"Name": "y", key: kind}],
             "TacticName": kernel, "HasSparseWeights": int(fact.sparse_along_k), "StreamId": 0, "Metadata": f"[ONNX Layer: {fact.node}]"}
        )  # fmt: skip
    return layers, eligible, picked


def _build_serialized_network(self: Any, network: Any, config: Any) -> Any:
    state = config.__dict__
    log = self.__dict__["_logger"].log
    quantized = any(node.op_type == "QuantizeLinear" for node in network.__dict__["_graph"].node)
    if _MAJOR < 10 and int(BuilderFlag.INT8) in state["_flags"] and not quantized:
        log(ILogger.Severity.ERROR, "Calibration failure occurred with no scaling factors detected.")
        return None
    layers, eligible, picked = _products(network.__dict__["_onnx"], int(BuilderFlag.SPARSE_WEIGHTS) in state["_flags"])
    monitor = state.get("_set", {}).get("progress_monitor")
    if monitor is not None:
        monitor.phase_start("Building Engine", None, 2)
        monitor.phase_start("Tactics", "Building Engine", 1)
        monitor.step_complete("Building Engine", 0)
        monitor.step_complete("Building Engine", 1)
        monitor.phase_finish("Tactics")
        monitor.phase_finish("Building Engine")
    texts = (
        (f"(Sparsity) Found {len(eligible)} layer(s) eligible to use sparse tactics: ", f"(Sparsity) Chose {len(picked)} layer(s) using sparse tactics: ")
        if _MAJOR >= 11
        else ("(Sparsity) Layers eligible for sparse math: ", "(Sparsity) TRT inference plan picked sparse implementation for layers: ")
    )  # fmt: skip
    log(ILogger.Severity.INFO, texts[0] + ", ".join(eligible))
    log(ILogger.Severity.INFO, texts[1] + ", ".join(picked))
    graph = network.__dict__["_graph"]
    described = {
        "version": __version__,
        "onnx": base64.b64encode(Path(network.__dict__["_onnx"]).read_bytes()).decode(),
        "layers": layers,
        "profiles": [profile.__dict__["_shapes"] for profile in state["_profiles"]],
        "inputs": {value.name: _shape(value) for value in graph.input},
        "outputs": {value.name: _shape(value) for value in graph.output},
        "flags": sorted(BuilderFlag(flag).name for flag in state["_flags"]),
        "set": {key: str(value) for key, value in state.get("_set", {}).items()},
    }
    return IHostMemory(_MAGIC + json.dumps(described).encode())


def _set_timing_cache(self: Any, cache: object, ignore_mismatch: bool) -> bool:
    self.__dict__["_cache"] = cache
    return True


def _create_timing_cache(self: Any, serialized_timing_cache: bytes) -> Any:
    data = bytes(serialized_timing_cache)
    if data and not data.startswith(b"fake cache"):
        return None
    return _made("ITimingCache", _data=data or b"fake cache\n")


# Running


def _deserialize(self: Any, serialized_engine: bytes) -> Any:
    data = bytes(serialized_engine)
    if not data.startswith(_MAGIC):
        self.__dict__["_logger"].log(ILogger.Severity.ERROR, "Serialization assertion magicTagRead == magicTag failed")
        return None
    return _made("ICudaEngine", _facts=json.loads(data[len(_MAGIC) :]))


def _names(engine: Any) -> list[str]:
    facts = engine.__dict__["_facts"]
    return [*facts["inputs"], *facts["outputs"]]


def _execute(self: Any, stream_handle: int) -> bool:
    """Compute at once; or, while the stream captures, when its graph is launched, with the shapes and addresses of
    now."""
    driver = ctypes.CDLL("libcuda.so.1")
    state = (dict(self.__dict__["_addresses"]), dict(self.__dict__["_shapes"]))
    work = _WORK(lambda: _compute(self, *state))
    if driver.fake_captures(work):
        self.__dict__.setdefault("_captured", []).append(work)  # as long as a graph may call it
    else:
        _compute(self, *state)
    return True


_WORK = ctypes.CFUNCTYPE(None)


def _compute(self: Any, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
    import onnxruntime

    facts = self.__dict__["_facts"]
    if "_session" not in self.__dict__:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        self.__dict__["_session"] = onnxruntime.InferenceSession(
            base64.b64decode(facts["onnx"]), options, providers=["CPUExecutionProvider"]
        )
    dtype: type[np.generic] = np.int32 if _MAJOR < 10 else np.int64
    feeds = {name: _memory(addresses[name], shapes[name], dtype).astype(np.int64) for name in facts["inputs"]}
    for name, array in zip(facts["outputs"], self.__dict__["_session"].run(list(facts["outputs"]), feeds), strict=True):
        _memory(addresses[name], array.shape, np.float32)[...] = array
    profiler = self.__dict__.get("_set", {}).get("profiler")
    if profiler is not None:
        for layer in facts["layers"]:
            profiler.report_layer_time(layer["Name"], 0.01 if "sparse" in layer["TacticName"] else 0.02)


def _memory(address: int, shape: Sequence[int], dtype: type[np.generic]) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory: Any = (ctypes.c_char * size).from_address(address)
    array: np.ndarray = np.frombuffer(memory, dtype=dtype).reshape(shape)
    return array


def _set_input_shape(self: Any, name: str, shape: Sequence[int]) -> bool:
    index = self.__dict__["_profile"]
    low, _, high = self.__dict__["_facts"]["profiles"][index][name]
    if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
        return False
    self.__dict__["_shapes"][name] = tuple(shape)
    return True


def _context_shape(self: Any, name: str) -> Any:
    shapes, facts = self.__dict__["_shapes"], self.__dict__["_facts"]
    if name in shapes:
        return shapes[name]
    batch = next(iter(shapes.values()))[0] if shapes else -1
    return (batch, *facts["outputs"][name][1:])


def _put(key: str, value: object) -> Callable[..., bool]:
    def behaviour(self: Any, *args: object) -> bool:
        self.__dict__[key] = args[0] if args else value
        return True

    return behaviour


def _information(self: Any, format: object) -> str:
    context = self.__dict__["_set"]["execution_context"]
    assert format == LayerInformationFormat.JSON
    text = json.dumps({"Layers": context.__dict__["_facts"]["layers"], "Note": "a\tb"})
    return text.replace("\\t", "\t")  # raw, as TensorRT writes control characters of names


_BEHAVIOUR: dict[str, dict[str, Any]] = {
    "Logger": {"__init__": lambda self, *_: None, "log": lambda self, severity, msg: None},
    "Builder": {
        "__init__": lambda self, logger: self.__dict__.update(_logger=logger),
        "create_network": lambda self, flags=0: _made("INetworkDefinition", _flags=flags),
        "create_builder_config": lambda self: _made("IBuilderConfig", _flags=set(), _profiles=[], _memory={}, _sources=0),
        "create_optimization_profile": lambda self: _made("IOptimizationProfile", _shapes={}),
        "build_serialized_network": _build_serialized_network,
        "num_DLA_cores": 0,
    },
    "INetworkDefinition": {
        "num_inputs": lambda self: len(self.__dict__["_graph"].input),
        "num_outputs": lambda self: len(self.__dict__["_graph"].output),
        "num_layers": lambda self: 0,
        "get_input": lambda self, index: _io(self, "input")[index],
        "get_output": lambda self, index: _io(self, "output")[index],
        "get_flag": lambda self, flag: bool(self.__dict__["_flags"] & (1 << int(flag))),
        "__len__": lambda self: 0,
        "__getitem__": lambda self, index: (_ for _ in ()).throw(IndexError(index)),
        "name": "fake",
    },
    "ITensor": {
        "name": lambda self: self.__dict__["_value"].name,
        "shape": lambda self: _shape(self.__dict__["_value"]),
        "is_shape_tensor": False,
        "dtype": lambda self: DataType.INT64 if _MAJOR >= 10 else DataType.INT32,
    },
    "OnnxParser": {
        "__init__": lambda self, network, logger: self.__dict__.update(_network=network, _errors=[]),
        "parse_from_file": _parse_from_file,
        "num_errors": lambda self: len(self.__dict__["_errors"]),
        "get_error": lambda self, index: self.__dict__["_errors"][index],
    },
    "ParserError": {"node": lambda self: self.__dict__["_node"], "desc": lambda self: self.__dict__["_desc"]},
    "IOptimizationProfile": {
        "set_shape": lambda self, input, min, opt, max: self.__dict__["_shapes"].__setitem__(input, [list(min), list(opt), list(max)]),
        "get_shape": lambda self, input: self.__dict__["_shapes"][input],
        "__init__": lambda self: None,
        "extra_memory_target": 1.0,
    },
    "IBuilderConfig": {
        "set_flag": lambda self, flag: self.__dict__["_flags"].add(int(flag)),
        "clear_flag": lambda self, flag: self.__dict__["_flags"].discard(int(flag)),
        "get_flag": lambda self, flag: int(flag) in self.__dict__["_flags"],
        "add_optimization_profile": lambda self, profile: self.__dict__["_profiles"].append(profile) or len(self.__dict__["_profiles"]) - 1,
        "set_memory_pool_limit": lambda self, pool, pool_size: self.__dict__["_memory"].__setitem__(int(pool), pool_size),
        "get_memory_pool_limit": lambda self, pool: self.__dict__["_memory"].get(int(pool), 0),
        "set_tactic_sources": _put("_sources", 0),
        "get_tactic_sources": lambda self: self.__dict__["_sources"],
        "create_timing_cache": _create_timing_cache,
        "set_timing_cache": _set_timing_cache,
        "get_timing_cache": lambda self: self.__dict__["_cache"],
        "get_preview_feature": lambda self, feature: False,
        "get_quantization_flag": lambda self, flag: False,
        "num_optimization_profiles": lambda self: len(self.__dict__["_profiles"]),
        "DLA_core": -1,
        "default_device_type": 0,
        "engine_capability": 0,
        "int8_calibrator": lambda self: None,
        "builder_optimization_level": 3,
        "hardware_compatibility_level": 0,
        "max_aux_streams": 0,
        "all_build_routes": json.dumps({"tuner_options": [{"option": "-conv_use_long_w", "allowed_values": ["on", "off"], "default_value": "on", "help": ""}]}),
        "build_route": "",
    },
    "ITimingCache": {
        "serialize": lambda self: IHostMemory(self.__dict__["_data"]),
        "combine": lambda self, input_cache, ignore_mismatch: True,
    },
    "Runtime": {"__init__": lambda self, logger: self.__dict__.update(_logger=logger), "deserialize_cuda_engine": _deserialize},
    "ICudaEngine": {
        "num_io_tensors": lambda self: len(_names(self)),
        "num_optimization_profiles": lambda self: len(self.__dict__["_facts"]["profiles"]),
        "get_tensor_name": lambda self, index: _names(self)[index],
        "get_tensor_mode": lambda self, name: TensorIOMode.INPUT if name in self.__dict__["_facts"]["inputs"] else TensorIOMode.OUTPUT,
        "get_tensor_dtype": lambda self, name: DataType.FLOAT if name in self.__dict__["_facts"]["outputs"] else DataType.INT64 if _MAJOR >= 10 else DataType.INT32,
        "get_tensor_shape": lambda self, name: tuple({**self.__dict__["_facts"]["inputs"], **self.__dict__["_facts"]["outputs"]}[name]),
        "get_tensor_profile_shape": lambda self, name, profile_index: [tuple(shape) for shape in self.__dict__["_facts"]["profiles"][profile_index][name]],
        "create_execution_context": lambda self, *_: _made("IExecutionContext", _facts=self.__dict__["_facts"], _shapes={}, _addresses={}, _profile=0),
        "create_engine_inspector": lambda self: _made("EngineInspector"),
    },
    "EngineInspector": {"get_engine_information": _information},
    "IExecutionContext": {
        "set_optimization_profile_async": lambda self, profile_index, stream_handle: self.__dict__.update(_profile=profile_index) or True,
        "set_input_shape": _set_input_shape,
        "get_tensor_shape": _context_shape,
        "set_tensor_address": lambda self, name, memory: self.__dict__["_addresses"].__setitem__(name, memory) or True,
        "execute_async_v3": _execute,
    },
}  # fmt: skip
_build_classes()
assert re.match(r"\d+\.\d+", __version__)
