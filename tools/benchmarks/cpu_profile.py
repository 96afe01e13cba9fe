"""Where a CPU engine's time goes: the runtimes' own profiles by operator, and what the same products reach
alone."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engines.base import LoadOptions, backend
from engines.benchmark.latency import feeds_for
from engines.ort.backend import ENGINE_FILE, left_out
from engines.passport import load_passport
from nxm_export.graph.reading.graph_weights import load_graph
from tools.benchmarks.cpu_record import ProfileRow

if TYPE_CHECKING:
    import onnx


def onnxruntime_profile(
    directory: Path, name: str, shape: tuple[int, int], threads: int, rounds: int = 20
) -> ProfileRow:
    """Milliseconds by operator type in ONNX Runtime's own profile, medians over rounds, INT8 products a second, and how
    many a second the same products reach alone."""
    without = left_out(load_passport(directory))
    with backend("ort").load(directory, LoadOptions(threads=1)) as engine:
        feeds = feeds_for(engine, *shape, 1000, 0)
    by_operator: dict[str, float] = defaultdict(float)
    for (operator, _), times in _kernel_times(directory / ENGINE_FILE, feeds, threads, rounds, without).items():
        by_operator[operator] += float(np.median(times))
    products, tokens, sizes = by_operator.get("MatMulIntegerToFloat"), shape[0] * shape[1], _planned_sizes(directory)
    operations = 2.0 * tokens * sum(math.prod(size) * count for size, count in sizes.items())
    alone = sum(count * _milliseconds_alone(size, tokens, threads) for size, count in sizes.items())
    return {
        "engine": name,
        "batch": shape[0],
        "sequence": shape[1],
        "milliseconds": dict(sorted(by_operator.items(), key=lambda item: -item[1])),
        "int8_gops": operations / products / 1e6 if products else None,
        "int8_gops_alone": operations / alone / 1e6 if alone else None,
    }


def _kernel_times(
    file: Path, feeds: Mapping[str, np.ndarray], threads: int, rounds: int, without: Sequence[str] = ()
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of every run of every node in ONNX Runtime's own profile, by (operator type, node)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.enable_profiling = True
    options.profile_file_prefix = str(file.parent / "profile")
    session = onnxruntime.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without)
    )
    for _ in range(rounds):
        session.run(None, dict(feeds))
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            taken[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e3)
    return taken


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


def _planned_sizes(directory: Path) -> Counter[tuple[int, int]]:
    """How many INT8 matrices of each size (K, N) the engine file multiplies by."""
    sizes: Counter[tuple[int, int]] = Counter()
    for node in load_graph(directory / ENGINE_FILE).graph:
        weight = node.inputs[1] if node.op_type == "MatMulIntegerToFloat" else None
        if weight is not None and weight.shape is not None and len(weight.shape) == 2:
            across, features = weight.shape.numpy()
            sizes[across, features] += 1
    return sizes


def _milliseconds_alone(size: tuple[int, int], tokens: int, threads: int, rounds: int = 200) -> float:
    """The least time of one product (tokens, K) x (K, N) that is all of its graph: the weight stays in the caches, and
    so it is the peak of the same kernel on the same cores."""
    import onnx

    rng = np.random.default_rng(0)
    feeds = {"x": rng.integers(0, 255, (tokens, size[0])).astype(np.uint8)}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "product.onnx"
        onnx.save(_integer_product(rng.integers(-127, 128, size, np.int8)), file)
        return min(min(times) for times in _kernel_times(file, feeds, threads, rounds).values())


def _integer_product(weight: npt.NDArray[np.int8]) -> onnx.ModelProto:
    """A model of one product ``y = x @ weight`` of integers, x UINT8 (tokens, K)."""
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node("MatMulIntegerToFloat", ["x", "w", "s", "s", "z"], ["y"], domain="com.microsoft")
    constants = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.array(0.01, np.float32), "s"),
        numpy_helper.from_array(np.array(128, np.uint8), "z"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, ["tokens", weight.shape[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", weight.shape[1]])
    graph = helper.make_graph([node], "product", [x], [y], constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
