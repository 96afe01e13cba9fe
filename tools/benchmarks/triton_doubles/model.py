"""A DOUBLE of Triton's onnxruntime and tensorrt backends: ONNX Runtime on the CPU, called from Triton's Python backend.

Triton lets a backend be a Python file, so this one stands where the wheel that the tests use has no compiled backend.
The server around it is the real one: model configuration, repository, HTTP, gRPC, batcher, ensemble. It reads whatever
model file the configuration names as ONNX, also one called ``model.plan``: what it proves is that the generated
repository is loaded and spoken to, never that a TensorRT plan runs.
"""

from __future__ import annotations

import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as backend

_NUMPY = {"TYPE_INT64": np.int64, "TYPE_INT32": np.int32, "TYPE_FP32": np.float32, "TYPE_FP16": np.float16}

_LEVELS = {  # as Triton's compiled backend reads optimization.graph.level
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", 0))
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        level = config.get("optimization", {}).get("graph", {}).get("level", 0)
        options.graph_optimization_level = _LEVELS[level]
        here = os.path.join(args["model_repository"], args["model_version"])
        name = config.get("default_model_filename") or "model.onnx"
        self.session = onnxruntime.InferenceSession(
            os.path.join(here, name), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = {entry["name"]: _NUMPY[entry["data_type"]] for entry in config["output"]}

    def execute(self, requests: list[backend.InferenceRequest]) -> list[backend.InferenceResponse]:
        """One run for all requests: Triton's batcher only hands over requests of one shape together."""
        arrays = [
            [backend.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs] for request in requests
        ]
        sizes = [request[0].shape[0] for request in arrays]
        feeds = {
            name: np.concatenate([request[i] for request in arrays]).astype(np.int64)
            for i, name in enumerate(self.inputs)
        }
        try:
            names = [value.name for value in self.session.get_outputs()]
            answers = dict(zip(names, self.session.run(None, feeds), strict=True))
        except Exception as error:
            return [backend.InferenceResponse([], backend.TritonError(str(error))) for _ in requests]
        ends = np.cumsum(sizes)[:-1]
        parts = {name: np.split(answers[name].astype(dtype), ends) for name, dtype in self.outputs.items()}
        return [
            backend.InferenceResponse([backend.Tensor(name, part[i]) for name, part in parts.items()])
            for i in range(len(requests))
        ]
