"""Where a CPU engine's time goes: the runtimes' own profiles by operator, and what this machine's products reach."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engines.base import LoadOptions, backend
from engines.benchmark.latency import feeds_for
from engines.ort.backend import ENGINE_FILE
from engines.passport import load_passport
from nxm_export.graph.reading.graph_weights import load_graph
from tools.benchmarks.cpu_record import ProfileRow

if TYPE_CHECKING:
    import onnx


def onnxruntime_profile(
    directory: Path, name: str, shape: tuple[int, int], threads: int, rounds: int = 20
) -> ProfileRow:
    """Milliseconds by operator type in ONNX Runtime's own profile, medians over rounds, and INT8 products a second."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.enable_profiling = True
    options.profile_file_prefix = str(directory / "profile")
    without = load_passport(directory).options["disabled_optimizers"]
    session = onnxruntime.InferenceSession(
        str(directory / ENGINE_FILE), options, providers=["CPUExecutionProvider"], disabled_optimizers=without
    )
    with backend("ort").load(directory, LoadOptions(threads=1)) as engine:
        feeds = feeds_for(engine, *shape, 1000, 0)
    for _ in range(rounds):
        session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            taken[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e3)
    by_operator: dict[str, float] = defaultdict(float)
    for (operator, _), times in taken.items():
        by_operator[operator] += float(np.median(times))
    products = by_operator.get("MatMulIntegerToFloat")
    operations = 2.0 * _planned_weights(directory) * shape[0] * shape[1]
    return {
        "engine": name,
        "batch": shape[0],
        "sequence": shape[1],
        "milliseconds": dict(sorted(by_operator.items(), key=lambda item: -item[1])),
        "int8_gops": operations / products / 1e6 if products else None,
    }


def openvino_profiles(
    models: Mapping[str, Path], shape: tuple[int, int], threads: int, rounds: int = 200
) -> list[ProfileRow]:
    """Milliseconds by operator in OpenVINO's own profile of model files, medians over rounds that take turns.

    The files are ONNX or OpenVINO's own. An operator is told by its type and the precision of its kernel; `nodes`
    counts those that ran.
    """
    import openvino

    from engines.openvino.backend import settings

    core, ids = openvino.Core(), np.random.default_rng(0).integers(1, 1000, shape)
    by_input = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    requests, feeds = {}, {}
    for name, model in models.items():
        compiled = core.compile_model(core.read_model(str(model)), "CPU", settings(threads) | {"PERF_COUNT": True})
        requests[name] = compiled.create_infer_request()
        feeds[name] = {port.get_any_name(): by_input[port.get_any_name()] for port in compiled.inputs}
    taken: dict[str, dict[tuple[str, str], list[float]]] = {name: defaultdict(list) for name in models}
    for _ in range(rounds):
        for name, request in requests.items():
            request.infer(feeds[name])  # once unseen: the caches hold the model before
            request.infer(feeds[name])
            for node in request.profiling_info:
                if node.status == openvino.ProfilingInfo.Status.EXECUTED:
                    kind = f"{node.node_type} {node.exec_type.rpartition('_')[2]}"
                    taken[name][kind, node.node_name].append(node.real_time.total_seconds() * 1e3)
    profiles: list[ProfileRow] = []
    for name, by_node in taken.items():
        by_operator: dict[str, float] = defaultdict(float)
        for (kind, _), times in by_node.items():
            by_operator[kind] += float(np.median(times))
        profiles.append(
            {
                "engine": name,
                "batch": shape[0],
                "sequence": shape[1],
                "milliseconds": dict(sorted(by_operator.items(), key=lambda item: -item[1])),
                "nodes": len(by_node),
            }
        )
    return profiles


def _planned_weights(directory: Path) -> int:
    """Weights of the encoder's INT8 matrices, as the engine file holds them."""
    sizes = []
    for node in load_graph(directory / ENGINE_FILE).graph:
        weight = node.inputs[1] if node.op_type == "MatMulIntegerToFloat" else None
        if weight is not None and weight.shape is not None:
            sizes.append(math.prod(weight.shape.numpy()))
    return sum(sizes)


def peaks(threads: int, work: Path) -> dict[str, float]:
    """GOPS of one large product, (2048, 2048) x (2048, 2048), with ONNX Runtime: INT8 (uint8 x int8) and FP32; best of
    10."""
    import onnx
    import onnxruntime

    size, rng, reached = 2048, np.random.default_rng(0), {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for kind in ("int8", "fp32"):
        weight = rng.integers(-127, 128, (size, size), np.int8)
        feeds = {"x": rng.integers(0, 255, (size, size)).astype(np.uint8 if kind == "int8" else np.float32)}
        onnx.save(_one_product(weight if kind == "int8" else weight.astype(np.float32)), work / "peak.onnx")
        session = onnxruntime.InferenceSession(str(work / "peak.onnx"), options, providers=["CPUExecutionProvider"])
        times = []
        for _ in range(12):
            began = time.perf_counter()
            session.run(None, feeds)
            times.append(time.perf_counter() - began)
        reached[f"{kind}_gops"] = 2.0 * size**3 / min(times[2:]) / 1e9
    return reached


def _one_product(weight: npt.NDArray[np.int8] | npt.NDArray[np.float32]) -> onnx.ModelProto:
    """A model of one matrix product ``y = x @ weight``, of integers where the weight is INT8."""
    from onnx import TensorProto, helper, numpy_helper

    constants = [numpy_helper.from_array(weight, "w")]
    if weight.dtype == np.int8:
        node = helper.make_node("MatMulIntegerToFloat", ["x", "w", "s", "s", "z"], ["y"], domain="com.microsoft")
        constants += [numpy_helper.from_array(np.array(0.01, np.float32), "s")]
        constants += [numpy_helper.from_array(np.array(128, np.uint8), "z")]
        kinds = {"x": TensorProto.UINT8, "y": TensorProto.FLOAT}
    else:
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        kinds = {"x": TensorProto.FLOAT, "y": TensorProto.FLOAT}
    x, y = (helper.make_tensor_value_info(name, kind, list(weight.shape)) for name, kind in kinds.items())
    graph = helper.make_graph([node], "peak", [x], [y], constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
